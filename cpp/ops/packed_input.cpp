#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "ops/packing.h"
#include "runtime/threads.h"

namespace zerofl {
namespace {

constexpr int PLANES_BYTES = 40 << 10;  // of the output gradient that a list of activations reads
constexpr int64_t SPAN = 1 << 15;       // entries of an input that a thread packs at a time, at least
constexpr int64_t LARGE = 1 << 19;      // floats of a gradient that leaves the caches before it is read

// Division by the same number many times: by multiplication with its reciprocal, exact for 32-bit numbers (Lemire et al.,
// "Faster remainder by direct computation", 2019).
struct Divisor {
  explicit Divisor(uint32_t value) : value(value), reciprocal(UINT64_MAX / value + 1) {}
  uint32_t quotient(uint32_t n) const {
    return value == 1 ? n : static_cast<uint32_t>(static_cast<unsigned __int128>(reciprocal) * n >> 64);
  }

  uint32_t value;
  uint64_t reciprocal;
};

// One dimension of the input: the taps of each phase of its stride, and the extent of the plane along it, which reaches
// as far as any tap of any position and holds the output gradient from `before` on.
struct Reach {
  std::vector<Taps> taps;
  int before, extent;

  Reach(int in, int out, int kernel, int stride, int padding, int dilation) {
    int lowest = 0, highest = out - 1;
    for (int phase = 0; phase < stride; ++phase) {
      const Taps t = taps_of_phase(phase, kernel, stride, padding, dilation);
      taps.push_back(t);
      if (!t.count || phase >= in) continue;
      lowest = std::min(lowest, t.shift - t.extent() + 1);
      highest = std::max(highest, (in - 1 - phase) / stride + t.shift);
    }
    before = -lowest, extent = highest - lowest + 1;
  }
};

WeightGradient weight_gradient_of(const Geometry& g, const Reach& rows, const Reach& columns, int64_t position_bytes) {
  WeightGradient w{};
  w.top = rows.before, w.plane_height = rows.extent;
  w.left = columns.before, w.plane_width = columns.extent;
  w.batch = g.batch, w.in_channels = g.in_channels, w.out_channels = g.out_channels;
  w.out_height = g.out_height, w.out_width = g.out_width;
  w.kernel_height = g.kernel_height, w.kernel_width = g.kernel_width;
  w.phases = static_cast<int>(rows.taps.size() * columns.taps.size());
  w.outs = w.phases > 1 ? 2 : 1;
  w.image_group = 1;
  const int64_t plane_bytes = position_bytes * w.plane_height * w.plane_width;
  while (w.image_group < IMAGE_BLOCK && 2 * w.image_group * plane_bytes * w.outs <= PLANES_BYTES) w.image_group *= 2;
  if (w.image_group * plane_bytes > UINT32_MAX)
    throw std::length_error("an image with more than 2^32 bytes of gradients");
  return w;
}

// Of a position its phase's first list (-1 if no tap meets it) and its offset in an image's plane; of an image, which of
// those lists is its own, and where its plane begins.
struct Place {
  int32_t list;
  uint32_t offset;
};

// Where an activation goes, by its index in its channel.
struct Places {
  std::vector<Place> positions, images;
  Divisor batch;

  Places(const Geometry& g, const WeightGradient& w, const Reach& rows, const Reach& columns, int64_t position_bytes)
      : batch(static_cast<uint32_t>(g.batch)) {
    for (int r = 0; r < g.in_height; ++r)
      for (int s = 0; s < g.in_width; ++s) {
        const int a = r % g.stride_height, b = s % g.stride_width;
        const int64_t y = r / g.stride_height + rows.taps[a].shift + w.top;
        const int64_t x = s / g.stride_width + columns.taps[b].shift + w.left;
        if (rows.taps[a].count && columns.taps[b].count)
          positions.push_back({(a * g.stride_width + b) * w.image_groups(),
                               static_cast<uint32_t>((y * w.plane_width + x) * position_bytes)});
        else
          positions.push_back({-1, 0});
      }
    const int64_t plane_bytes = position_bytes * w.plane_height * w.plane_width;
    for (int n = 0; n < g.batch; ++n)
      images.push_back({n / w.image_group, static_cast<uint32_t>(n % w.image_group * plane_bytes)});
  }
};

// Sort a channel's entries, whose indices begin at `first`, into its lists at `to`: `begins` gets where each begins, and
// the end of the last. place: room for `lists` numbers. Returns the end.
int32_t sort_into_lists(const Places& places, int lists, const uint32_t* index, const uint32_t* end, const float* value,
                        uint32_t first, int32_t* place, int32_t* begins, Entry* to) {
  std::fill(place, place + lists, 0);
  for (const uint32_t* at = index; at < end; ++at) {
    const uint32_t i = *at - first, position_index = places.batch.quotient(i);
    const Place& position = places.positions[position_index];
    if (position.list >= 0) ++place[position.list + places.images[i - position_index * places.batch.value].list];
  }
  int32_t total = 0;
  for (int list = 0; list < lists; ++list) {
    const int32_t count = place[list];
    begins[list] = place[list] = total;
    total += count;
  }
  begins[lists] = total;
  for (; index < end; ++index, ++value) {
    const uint32_t i = *index - first, position_index = places.batch.quotient(i);
    const Place &position = places.positions[position_index],
                &image = places.images[i - position_index * places.batch.value];
    if (position.list >= 0) to[place[position.list + image.list]++] = {*value, position.offset + image.offset};
  }
  return total;
}

}  // namespace

PackedInput::PackedInput(const Kernels& kernels, int threads, const Geometry& g, const float* input,
                         const Choice& choice)
    : kernels(kernels), geometry(g), gradient{} {
  const Reach rows(g.in_height, g.out_height, g.kernel_height, g.stride_height, g.padding_height, g.dilation_height);
  const Reach columns(g.in_width, g.out_width, g.kernel_width, g.stride_width, g.padding_width, g.dilation_width);
  for (const Taps& r : rows.taps)
    for (const Taps& c : columns.taps)
      phases.push_back({r.first, r.count, r.step, c.first, c.count, c.step, r.distance, c.distance});
  const int64_t position_bytes = kernels.lanes * sizeof(float);
  gradient = weight_gradient_of(g, rows, columns, position_bytes);
  const Places places(g, gradient, rows, columns, position_bytes);

  const int64_t floats = static_cast<int64_t>(places.positions.size()) * g.batch;
  const int lists = gradient.lists();
  // A thread takes a span of channels, several where they are small.
  const int span = std::max(1, std::min<int>(g.in_channels, static_cast<int>(SPAN / floats)));
  std::vector<Found> found(ceil_div(g.in_channels, span));
  threshold =
      find_chosen(kernels, threads, input, floats * g.in_channels, floats * span, choice, OF_ACTIVATIONS, found);
  starts.resize(static_cast<int64_t>(g.in_channels) * (lists + 1));
  memory.resize(found.size());
  entries.resize(g.in_channels);
  parallel(threads, static_cast<int64_t>(found.size()), [&](int64_t item) {
    const uint32_t *begin = found[item].indices.data(), *index = begin, *end = begin + found[item].size;
    memory[item].allocate(found[item].size);
    Entry* to = memory[item].data();
    int32_t* place = reinterpret_cast<int32_t*>(scratch(0, lists));
    for (int c = 0; c < span && item * span + c < g.in_channels; ++c) {
      const int64_t channel = item * span + c;
      const uint32_t* channel_end = std::lower_bound(index, end, static_cast<uint32_t>((c + 1) * floats));
      entries[channel] = to;
      to += sort_into_lists(places, lists, index, channel_end, found[item].values.data() + (index - begin),
                            static_cast<uint32_t>(c * floats), place, starts.data() + channel * (lists + 1), to);
      index = channel_end;
    }
  });
}

void PackedInput::grad_weight(int threads, const float* grad_output, const Target& target,
                              Candidates* candidates) const {
  WeightGradient w = gradient;
  w.phase = phases.data(), w.entries = entries.data(), w.starts = starts.data();
  w.large = static_cast<int64_t>(w.out_channels) * w.in_channels * w.kernel_height * w.kernel_width >= LARGE;
  if (geometry.is_linear()) {
    const int64_t items = ceil_div(w.out_channels, LINEAR_OUT), entries = int64_t{LINEAR_OUT} * w.in_channels + SPARE;
    const int64_t runs = int64_t{LINEAR_OUT} * ceil_div(w.in_channels, LINEAR_IN);
    if (candidates) candidates->found = std::vector<Found>(items);
    parallel(threads, items, [&](int64_t item) {
      float *planes = scratch(0, static_cast<int64_t>(w.batch) * LINEAR_OUT),
            *sums = scratch(1, LINEAR_IN * LINEAR_OUT);
      Scan scan{};
      if (candidates)
        scan = {scan_from(candidates->near), reinterpret_cast<uint32_t*>(scratch(2, entries)), scratch(3, entries),
                reinterpret_cast<int32_t*>(scratch(4, runs))};
      kernels.linear_gradient(w, grad_output, target, static_cast<int>(item) * LINEAR_OUT, candidates ? &scan : nullptr,
                              planes, sums);
      if (candidates) gather(kernels, scan, item, *candidates);
    });
    return;
  }
  const int lanes = kernels.lanes * w.outs, vectors = ceil_div(w.out_channels, lanes),
            taps = w.kernel_height * w.kernel_width;
  const int splits = std::min(w.in_channels, vectors >= 2 * threads ? 1 : ceil_div(2 * threads, vectors));
  const int share = ceil_div(w.in_channels, splits);
  const int64_t planes_floats = static_cast<int64_t>(w.image_block()) * w.plane_height * w.plane_width * lanes;
  parallel(threads, static_cast<int64_t>(vectors) * splits, [&](int64_t item) {
    const int first_out = static_cast<int>(item / splits) * lanes, begin = static_cast<int>(item % splits) * share;
    const int end = std::min(w.in_channels, begin + share);
    if (begin >= end) return;
    float* planes = scratch(0, planes_floats);
    memset(planes, 0, planes_floats * sizeof(float));
    float* sums = scratch(1, static_cast<int64_t>(end - begin) * taps * lanes);
    kernels.weight_gradient(w, grad_output, target, first_out, begin, end, planes, sums);
  });
}

}  // namespace zerofl

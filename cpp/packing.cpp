#include "packing.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>
#include <utility>

#include "parallel.h"
#include "stopwatch.h"

namespace zerofl {
namespace {

// Sizes are for caches of 32 KiB and up (L1) and 512 KiB and up (L2); docs/kernels.md has what was measured.
constexpr int WINDOW_BYTES = 40 << 10;  // of the input window that every output channel reads: it should stay in L1
constexpr int LIST = 16;                // entries of a list, on average: shorter ones are mostly overhead
constexpr int SUMS = 2048;              // tiles of sums that wait for the next block of input channels: in L2
constexpr int STRIP = 2, ROWS = 8;      // of a sweep: enough that neighbours' windows are seldom packed twice
constexpr int64_t LARGE = 1 << 19;      // floats of an output that leaves the caches before it is read
constexpr int PLANES_BYTES = 40 << 10;  // of the output gradient that a list of activations reads
constexpr int64_t SPAN = 1 << 15;       // entries of an input that a thread packs at a time, at least

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// The taps of one dimension that meet the positions of one phase of the stride: `first`, `first + step`, ...; the first
// meets output position / stride + shift, each further one `distance` less.
struct Taps {
  int first = 0, count = 0, step = 1, shift = 0, distance = 0;

  int extent() const { return std::max(count - 1, 0) * distance + 1; }
};

Taps taps_of_phase(int phase, int kernel, int stride, int padding, int dilation) {
  Taps taps;
  for (int tap = 0; tap < kernel; ++tap)
    if ((phase + padding - tap * dilation) % stride == 0) {
      if (!taps.count) taps.first = tap, taps.shift = (phase + padding - tap * dilation) / stride;
      if (taps.count == 1) taps.step = tap - taps.first;
      ++taps.count;
    }
  taps.distance = taps.step * dilation / stride;
  return taps;
}

bool overlaps(const Convolution& c) { return c.col_step == 1 && c.batch <= TILE; }

int columns_floats(const Convolution& c) { return (c.window_width - 1) * (overlaps(c) ? c.batch : TILE) + TILE; }

// How the work is cut, so that what is read again and again stays in a cache.
void cut(std::vector<Convolution>& phases, int threads, int64_t active) {
  int64_t window = 1;
  for (const Convolution& c : phases)
    window = std::max<int64_t>(window, static_cast<int64_t>(c.window_height) * columns_floats(c) * sizeof(float));
  const int in_channels = phases[0].in_channels, out_channels = phases[0].out_channels;
  int blocks = ceil_div(in_channels, std::max<int64_t>(1, WINDOW_BYTES / window));
  blocks = static_cast<int>(std::min<int64_t>(blocks, std::max<int64_t>(1, active / (int64_t{LIST} * out_channels))));
  if (blocks == 2) blocks = 1;  // a window twice as large costs less than keeping sums
  int64_t items = 0;
  for (Convolution& c : phases) {
    const bool overlap = overlaps(c);
    c.block = ceil_div(in_channels, blocks);
    c.column_floats = overlap ? c.batch : TILE;
    c.tile_floats = overlap ? TILE : columns_floats(c);
    const int sums = blocks == 1 ? STRIP * ROWS : std::max(1, SUMS / out_channels);
    c.rows = std::max(1, std::min({c.out_height, ROWS, sums}));
    c.strip = std::max(1, std::min({c.tiles(), STRIP, sums / c.rows}));
    // Entries' offsets in a window are 32 bits wide.
    if (sizeof(float) * static_cast<double>(c.window_height + SPARE_ROWS) * c.block * c.strip * columns_floats(c) > INT32_MAX)
      throw std::length_error("a kernel that spans more than 2^31 bytes of its input");
    c.strip_floats = overlap ? (c.strip - 1) * TILE + columns_floats(c) : c.strip * columns_floats(c);
    c.large = static_cast<int64_t>(c.full_height) * c.full_width * c.batch * out_channels >= LARGE;
    items += static_cast<int64_t>(c.strips()) * ceil_div(c.out_height, c.rows);
  }
  // Few strips leave threads without work: then output channels are shared out too.
  const int wanted = items >= 2 * threads ? 1 : ceil_div(2 * threads, std::max<int64_t>(items, 1));
  const int group = ceil_div(out_channels, std::min(wanted, ceil_div(out_channels, 16)));
  for (Convolution& c : phases) c.group = group;
}

// Order each list's channels by their number of entries, rounded up, and give each its place. `counts`, by list and
// channel, become the places where their entries begin.
void lay_out(Lists& lists, int multiple, std::vector<int32_t>& counts) {
  const Convolution& c = lists.phases[0];
  const int64_t rows = static_cast<int64_t>(counts.size()) / c.group;
  lists.starts.resize(counts.size() + 1);
  lists.order.resize(counts.size());
  int64_t total = 0;
  for (int32_t count : counts) total += static_cast<int64_t>(ceil_div(count, multiple)) * multiple;
  if (total > INT32_MAX) throw std::length_error("a layer with more than 2^31 active weights");
  lists.entries.allocate(total);
  std::vector<int32_t> at;
  int32_t place = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int first = static_cast<int>(row / c.blocks() % c.groups()) * c.group;
    int32_t *count = counts.data() + row * c.group, *order = lists.order.data() + row * c.group;
    int32_t* starts = lists.starts.data() + row * c.group;
    const int channels = std::min(c.group, c.out_channels - first), most = *std::max_element(count, count + channels);
    at.assign(ceil_div(most, multiple) + 2, 0);
    for (int i = 0; i < channels; ++i) ++at[ceil_div(count[i], multiple) + 1];
    std::partial_sum(at.begin(), at.end(), at.begin());
    for (int i = 0; i < channels; ++i) order[at[ceil_div(count[i], multiple)]++] = i;
    for (int i = 0; i < c.group; ++i) {
      starts[i] = place;
      if (i >= channels) continue;
      int32_t& in_channel = count[order[i]];
      const int32_t end = place + ceil_div(in_channel, multiple) * multiple;
      for (int32_t pad = place + in_channel; pad < end; ++pad) lists.entries.data()[pad] = {0.0f, 0};
      in_channel = place, place = end;
      order[i] += first;
    }
  }
  lists.starts.back() = place;
}

// Where an entry of a weight goes, by its index in its output channel's row.
struct Slot {
  uint32_t list, offset;                     // of the forward pass
  uint32_t back_list, back_offset, phase;    // of grad_input, but for the output channel's part
};

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

}  // namespace

void Lists::run(const Kernels& kernels, int threads, const float* input, const float* bias, const float* addend,
                float* output) const {
  std::vector<Convolution> convolutions = phases;
  std::vector<int64_t> ends;
  for (size_t phase = 0; phase < phases.size(); ++phase) {
    Convolution& c = convolutions[phase];
    c.entries = entries.data(), c.starts = starts.data() + phase * per_phase();
    c.order = order.data() + phase * per_phase();
    ends.push_back((phase ? ends.back() : 0) + int64_t{c.strips()} * ceil_div(c.out_height, c.rows) * c.groups());
  }
  parallel(threads, ends.back(), [&](int64_t item) {
    const size_t phase = std::upper_bound(ends.begin(), ends.end(), item) - ends.begin();
    const Convolution& c = convolutions[phase];
    if (phase) item -= ends[phase - 1];
    const int group = static_cast<int>(item % c.groups()), strip = static_cast<int>(item / c.groups() % c.strips());
    const int begin = static_cast<int>(item / c.groups() / c.strips()) * c.rows;
    float* window = scratch(0, static_cast<int64_t>(c.window_height + SPARE_ROWS) * c.row_floats());
    float* sums = scratch(1, static_cast<int64_t>(c.rows) * c.strip * c.group * TILE);
    kernels.convolve(c, input, bias, phase ? nullptr : addend, output, strip, begin, std::min(c.out_height, begin + c.rows), group, window, sums);
  });
}

PackedWeight::PackedWeight(const Kernels& kernels, int threads, const Geometry& g, const float* weight,
                           const Choice& choice, bool for_grad_input)
    : kernels(kernels), geometry(g) {
  Convolution c{};
  c.batch = g.batch;
  c.in_channels = g.in_channels, c.in_height = g.in_height, c.in_width = g.in_width;
  c.out_channels = g.out_channels, c.out_height = c.full_height = g.out_height, c.out_width = c.full_width = g.out_width;
  c.row_step = g.stride_height, c.row0 = -g.padding_height, c.col_step = g.stride_width, c.col0 = -g.padding_width;
  c.window_height = (g.kernel_height - 1) * g.dilation_height + 1;
  c.window_width = (g.kernel_width - 1) * g.dilation_width + 1;
  c.full_row_step = c.full_col_step = 1;
  forward.phases = {c};
  const int64_t active = choice.k ? choice.k : static_cast<int64_t>(g.out_channels) * g.in_channels * g.taps();
  cut(forward.phases, threads, active);
  c = forward.phases[0];
  const int row = g.in_channels * g.taps();
  std::vector<Slot> slots(row);
  for (int i = 0; i < row; ++i) {
    const int channel = i / g.taps(), p = i % g.taps() / g.kernel_width, q = i % g.kernel_width;
    slots[i].list = channel / c.block * c.group;
    slots[i].offset = sizeof(float) * (p * g.dilation_height * c.row_floats() + channel % c.block * c.strip_floats +
                                       q * g.dilation_width * c.column_floats);
  }

  std::vector<std::pair<Taps, Taps>> taps;
  for (int a = 0; for_grad_input && a < g.stride_height; ++a)
    for (int b = 0; b < g.stride_width; ++b) {
      const Taps h = taps_of_phase(a, g.kernel_height, g.stride_height, g.padding_height, g.dilation_height);
      const Taps w = taps_of_phase(b, g.kernel_width, g.stride_width, g.padding_width, g.dilation_width);
      Convolution back{};
      back.batch = g.batch;
      back.in_channels = g.out_channels, back.in_height = g.out_height, back.in_width = g.out_width;
      back.out_channels = g.in_channels;
      back.out_height = ceil_div(std::max(0, g.in_height - a), g.stride_height);
      back.out_width = ceil_div(std::max(0, g.in_width - b), g.stride_width);
      back.row_step = back.col_step = 1;
      back.row0 = h.shift - h.extent() + 1, back.col0 = w.shift - w.extent() + 1;
      back.window_height = h.extent(), back.window_width = w.extent();
      back.full_height = g.in_height, back.full_width = g.in_width;
      back.full_row_step = g.stride_height, back.full_row0 = a, back.full_col_step = g.stride_width, back.full_col0 = b;
      backward.phases.push_back(back);
      taps.emplace_back(h, w);
    }
  if (for_grad_input) cut(backward.phases, threads, active / static_cast<int64_t>(backward.phases.size()));
  for (size_t phase = 0; phase < taps.size(); ++phase) {
    const auto& [h, w] = taps[phase];
    const Convolution& back = backward.phases[phase];
    for (int channel = 0; channel < g.in_channels; ++channel)
      for (int i = 0; i < h.count; ++i)
        for (int j = 0; j < w.count; ++j) {
          const int tap = (h.first + i * h.step) * g.kernel_width + w.first + j * w.step;
          Slot& slot = slots[channel * g.taps() + tap];
          slot.phase = static_cast<uint32_t>(phase);
          slot.back_list = static_cast<uint32_t>(phase * backward.per_phase() +
                                                 channel / back.group * back.blocks() * back.group + channel % back.group);
          slot.back_offset = sizeof(float) * ((h.extent() - 1 - i * h.distance) * back.row_floats() +
                                              (w.extent() - 1 - j * w.distance) * back.column_floats);
        }
  }

  // A thread takes a stretch of output channels that is one block of grad_input's, so that its lists are its own.
  const int block = for_grad_input ? backward.phases[0].block : 16;
  const int back_group = for_grad_input ? backward.phases[0].group : 0;
  std::vector<Found> found(ceil_div(g.out_channels, block));
  threshold = find_chosen(kernels, threads, weight, static_cast<int64_t>(g.out_channels) * row,
                          static_cast<int64_t>(block) * row, choice, found);
  active_weights = total_size(found);
  std::vector<int32_t> counts(forward.per_phase()), back_counts(taps.size() * (for_grad_input ? backward.per_phase() : 0));
  const auto first_list = [&](int o) { return counts.data() + o / c.group * c.blocks() * c.group + o % c.group; };
  // Calls visit(o, begin, end) with the entries of each output channel of a stretch.
  const auto by_channel = [&](int64_t stretch, const auto& visit) {
    const uint32_t *index = found[stretch].indices.data(), *end = index + found[stretch].size;
    for (int i = 0; i < block && stretch * block + i < g.out_channels; ++i) {
      const uint32_t* row_end = std::lower_bound(index, end, static_cast<uint32_t>((i + 1) * row));
      visit(static_cast<int>(stretch * block + i), static_cast<uint32_t>(i * row), index, row_end);
      index = row_end;
    }
  };
  parallel(threads, static_cast<int64_t>(found.size()), [&](int64_t stretch) {
    int32_t* back_count = back_counts.data() + stretch * back_group;
    by_channel(stretch, [&](int o, uint32_t row_begin, const uint32_t* begin, const uint32_t* end) {
      int32_t* count = first_list(o);
      for (const uint32_t* i = begin; i < end; ++i) ++count[slots[*i - row_begin].list];
      if (for_grad_input)
        for (const uint32_t* i = begin; i < end; ++i) ++back_count[slots[*i - row_begin].back_list];
    });
  });
  parallel(threads, for_grad_input ? 2 : 1, [&](int64_t item) {
    lay_out(item ? backward : forward, kernels.entries_multiple, item ? back_counts : counts);
  });
  parallel(threads, static_cast<int64_t>(found.size()), [&](int64_t stretch) {
    Entry *entries = forward.entries.data(), *back_entries = backward.entries.data();
    int32_t* back_place = back_counts.data() + stretch * back_group;
    const uint32_t* first = found[stretch].indices.data();
    const float* values = found[stretch].values.data();
    std::vector<uint32_t> channel_offset(taps.size());
    by_channel(stretch, [&](int o, uint32_t row_begin, const uint32_t* begin, const uint32_t* end) {
      int32_t* place = first_list(o);
      for (const uint32_t* i = begin; i < end; ++i) {
        const Slot& slot = slots[*i - row_begin];
        entries[place[slot.list]++] = {values[i - first], slot.offset};
      }
      if (!for_grad_input) return;
      for (size_t phase = 0; phase < taps.size(); ++phase)
        channel_offset[phase] = static_cast<uint32_t>(o % block * backward.phases[phase].strip_floats * sizeof(float));
      for (const uint32_t* i = begin; i < end; ++i) {
        const Slot& slot = slots[*i - row_begin];
        back_entries[back_place[slot.back_list]++] = {values[i - first], slot.back_offset + channel_offset[slot.phase]};
      }
    });
  });
}

PackedInput::PackedInput(const Kernels& kernels, int threads, const Geometry& g, const float* input,
                         const Choice& choice)
    : kernels(kernels), geometry(g), gradient{} {
  // The plane reaches as far as any tap of any position, and holds the output gradient where that lies.
  std::vector<Taps> rows, columns;
  const auto reach = [](std::vector<Taps>& taps, int in, int out, int kernel, int stride, int padding, int dilation) {
    int lowest = 0, highest = out - 1;
    for (int phase = 0; phase < stride; ++phase) {
      const Taps t = taps_of_phase(phase, kernel, stride, padding, dilation);
      taps.push_back(t);
      if (!t.count || phase >= in) continue;
      lowest = std::min(lowest, t.shift - t.extent() + 1);
      highest = std::max(highest, (in - 1 - phase) / stride + t.shift);
    }
    return std::pair(-lowest, highest - lowest + 1);
  };
  WeightGradient& w = gradient;
  std::tie(w.top, w.plane_height) =
      reach(rows, g.in_height, g.out_height, g.kernel_height, g.stride_height, g.padding_height, g.dilation_height);
  std::tie(w.left, w.plane_width) =
      reach(columns, g.in_width, g.out_width, g.kernel_width, g.stride_width, g.padding_width, g.dilation_width);
  for (const Taps& r : rows)
    for (const Taps& c : columns)
      phases.push_back({r.first, r.count, r.step, c.first, c.count, c.step, r.distance, c.distance});
  w.batch = g.batch, w.in_channels = g.in_channels, w.out_channels = g.out_channels;
  w.out_height = g.out_height, w.out_width = g.out_width;
  w.kernel_height = g.kernel_height, w.kernel_width = g.kernel_width;
  w.phases = static_cast<int>(phases.size());
  const int64_t position_bytes = kernels.lanes * sizeof(float), plane_bytes = position_bytes * w.plane_height * w.plane_width;
  w.outs = w.phases > 1 ? 2 : 1;
  w.image_group = 1;
  while (w.image_group < IMAGE_BLOCK && 2 * w.image_group * plane_bytes * w.outs <= PLANES_BYTES) w.image_group *= 2;
  if (w.image_group * plane_bytes > UINT32_MAX) throw std::length_error("an image with more than 2^32 bytes of gradients");

  // Of each position: the first list of its phase (-1 if no tap meets it), and its offset in an image's plane.
  struct Position {
    int32_t list;
    uint32_t offset;
  };
  std::vector<Position> positions;
  for (int r = 0; r < g.in_height; ++r)
    for (int s = 0; s < g.in_width; ++s) {
      const int a = r % g.stride_height, b = s % g.stride_width;
      const int64_t y = r / g.stride_height + rows[a].shift + w.top, x = s / g.stride_width + columns[b].shift + w.left;
      if (rows[a].count && columns[b].count)
        positions.push_back({(a * g.stride_width + b) * w.image_groups(),
                             static_cast<uint32_t>((y * w.plane_width + x) * position_bytes)});
      else
        positions.push_back({-1, 0});
    }
  std::vector<Position> images;
  for (int n = 0; n < g.batch; ++n)
    images.push_back({n / w.image_group, static_cast<uint32_t>(n % w.image_group * plane_bytes)});

  const int64_t floats = static_cast<int64_t>(positions.size()) * g.batch;
  const int lists = w.lists();
  const Divisor batch(static_cast<uint32_t>(g.batch));
  // A thread takes a span of channels, several where they are small.
  const int span = std::max(1, std::min<int>(g.in_channels, static_cast<int>(SPAN / floats)));
  std::vector<Found> found(ceil_div(g.in_channels, span));
  threshold = find_chosen(kernels, threads, input, floats * g.in_channels, floats * span, choice, found);
  starts.resize(static_cast<int64_t>(g.in_channels) * (lists + 1));
  memory.resize(found.size());
  entries.resize(g.in_channels);
  parallel(threads, static_cast<int64_t>(found.size()), [&](int64_t item) {
    const uint32_t *index = found[item].indices.data(), *end = index + found[item].size;
    const float* value = found[item].values.data();
    memory[item].allocate(found[item].size);
    Entry* to = memory[item].data();
    int32_t* place = reinterpret_cast<int32_t*>(scratch(0, lists));
    for (int c = 0; c < span && item * span + c < g.in_channels; ++c) {
      const int64_t channel = item * span + c;
      const uint32_t first = static_cast<uint32_t>(c * floats);
      const uint32_t* channel_end = std::lower_bound(index, end, static_cast<uint32_t>((c + 1) * floats));
      int32_t* start = starts.data() + channel * (lists + 1);
      std::fill(place, place + lists, 0);
      for (const uint32_t* at = index; at < channel_end; ++at) {
        const uint32_t i = *at - first, position_index = batch.quotient(i);
        const Position& position = positions[position_index];
        if (position.list >= 0) ++place[position.list + images[i - position_index * batch.value].list];
      }
      int32_t total = 0;
      for (int list = 0; list < lists; ++list) {
        const int32_t count = place[list];
        start[list] = place[list] = total;
        total += count;
      }
      start[lists] = total;
      for (; index < channel_end; ++index, ++value) {
        const uint32_t i = *index - first, position_index = batch.quotient(i);
        const Position &position = positions[position_index], &image = images[i - position_index * batch.value];
        if (position.list >= 0) to[place[position.list + image.list]++] = {*value, position.offset + image.offset};
      }
      entries[channel] = to;
      to += total;
    }
  });
}

void PackedInput::grad_weight(int threads, const float* grad_output, float* grad_weight) const {
  WeightGradient w = gradient;
  w.phase = phases.data(), w.entries = entries.data(), w.starts = starts.data();
  w.large = static_cast<int64_t>(w.out_channels) * w.in_channels * w.kernel_height * w.kernel_width >= LARGE;
  if (geometry.in_height == 1 && geometry.in_width == 1 && w.kernel_height == 1 && w.kernel_width == 1 &&
      w.out_height == 1 && w.out_width == 1) {
    parallel(threads, ceil_div(w.out_channels, LINEAR_OUT), [&](int64_t item) {
      kernels.linear_gradient(w, grad_output, grad_weight, static_cast<int>(item) * LINEAR_OUT, 0, w.in_channels,
                              scratch(0, static_cast<int64_t>(w.batch) * LINEAR_OUT), scratch(1, 16 * LINEAR_OUT));
    });
    return;
  }
  const int lanes = kernels.lanes * w.outs, vectors = ceil_div(w.out_channels, lanes), taps = w.kernel_height * w.kernel_width;
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
    kernels.weight_gradient(w, grad_output, grad_weight, first_out, begin, end, planes, sums);
  });
}

}  // namespace zerofl

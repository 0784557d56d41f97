#include "ops/lists.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "ops/geometry.h"
#include "runtime/threads.h"

namespace zerofl {
namespace {

// Sizes are for caches of 32 KiB and up (L1) and 512 KiB and up (L2); docs/kernels.md has what was measured.
constexpr int WINDOW_BYTES = 40 << 10;  // of the input window that every output channel reads: it should stay in L1
constexpr int LIST = 16;                // entries of a list, on average: shorter ones are mostly overhead
constexpr int SUMS = 2048;              // tiles of sums that wait for the next block of input channels: in L2
constexpr int STRIP = 2, ROWS = 8;      // of a sweep: enough that neighbours' windows are seldom packed twice
constexpr int64_t LARGE = 1 << 19;      // floats of an output that leaves the caches before it is read

bool overlaps(const PackedConvolution& c) { return c.col_step == 1 && c.batch <= TILE; }

int columns_floats(const PackedConvolution& c) { return (c.window_width - 1) * (overlaps(c) ? c.batch : TILE) + TILE; }

}  // namespace

void cut(std::vector<PackedConvolution>& phases, int threads, int64_t active) {
  int64_t window = 1;
  for (const PackedConvolution& c : phases)
    window = std::max<int64_t>(window, static_cast<int64_t>(c.window_height) * columns_floats(c) * sizeof(float));
  const int in_channels = phases[0].in_channels, out_channels = phases[0].out_channels;
  int blocks = ceil_div(in_channels, std::max<int64_t>(1, WINDOW_BYTES / window));
  blocks = static_cast<int>(std::min<int64_t>(blocks, std::max<int64_t>(1, active / (int64_t{LIST} * out_channels))));
  if (blocks == 2) blocks = 1;  // a window twice as large costs less than keeping sums
  int64_t items = 0;
  for (PackedConvolution& c : phases) {
    const bool overlap = overlaps(c);
    c.block = ceil_div(in_channels, blocks);
    c.column_floats = overlap ? c.batch : TILE;
    c.tile_floats = overlap ? TILE : columns_floats(c);
    const int sums = blocks == 1 ? STRIP * ROWS : std::max(1, SUMS / out_channels);
    c.rows = std::max(1, std::min({c.out_height, ROWS, sums}));
    c.strip = std::max(1, std::min({c.tiles(), STRIP, sums / c.rows}));
    // Entries' offsets in a window are 32 bits wide.
    if (sizeof(float) * static_cast<double>(c.window_height + SPARE_ROWS) * c.block * c.strip * columns_floats(c) >
        INT32_MAX)
      throw std::length_error("a kernel that spans more than 2^31 bytes of its input");
    c.strip_floats = overlap ? (c.strip - 1) * TILE + columns_floats(c) : c.strip * columns_floats(c);
    c.large = static_cast<int64_t>(c.full_height) * c.full_width * c.batch * out_channels >= LARGE;
    items += static_cast<int64_t>(c.strips()) * ceil_div(c.out_height, c.rows);
  }
  // Few strips leave threads without work: then output channels are shared out too.
  const int wanted = items >= 2 * threads ? 1 : ceil_div(2 * threads, std::max<int64_t>(items, 1));
  const int group = ceil_div(out_channels, std::min(wanted, ceil_div(out_channels, 16)));
  for (PackedConvolution& c : phases) c.group = group;
}

void Lists::lay_out(int multiple, std::vector<int32_t>& counts) {
  const PackedConvolution& c = phases[0];
  const int64_t rows = static_cast<int64_t>(counts.size()) / c.group;
  starts.resize(counts.size() + 1);
  order.resize(counts.size());
  int64_t total = 0;
  for (int32_t count : counts) total += static_cast<int64_t>(ceil_div(count, multiple)) * multiple;
  if (total > INT32_MAX) throw std::length_error("a layer with more than 2^31 active weights");
  entries.allocate(total);
  std::vector<int32_t> at;
  int32_t place = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int first = static_cast<int>(row / c.blocks() % c.groups()) * c.group;
    int32_t *count = counts.data() + row * c.group, *sorted = order.data() + row * c.group;
    int32_t* begins = starts.data() + row * c.group;
    const int channels = std::min(c.group, c.out_channels - first), most = *std::max_element(count, count + channels);
    at.assign(ceil_div(most, multiple) + 2, 0);
    for (int i = 0; i < channels; ++i) ++at[ceil_div(count[i], multiple) + 1];
    std::partial_sum(at.begin(), at.end(), at.begin());
    for (int i = 0; i < channels; ++i) sorted[at[ceil_div(count[i], multiple)]++] = i;
    for (int i = 0; i < c.group; ++i) {
      begins[i] = place;
      if (i >= channels) continue;
      int32_t& in_channel = count[sorted[i]];
      const int32_t end = place + ceil_div(in_channel, multiple) * multiple;
      for (int32_t pad = place + in_channel; pad < end; ++pad) entries.data()[pad] = {0.0f, 0};
      in_channel = place, place = end;
      sorted[i] += first;
    }
  }
  starts.back() = place;
}

void Lists::run(const Kernels& kernels, int threads, const float* input, const float* bias, const float* addend,
                void* output, Storage storage) const {
  std::vector<PackedConvolution> convolutions = phases;
  std::vector<int64_t> ends;
  for (size_t phase = 0; phase < phases.size(); ++phase) {
    PackedConvolution& c = convolutions[phase];
    c.entries = entries.data(), c.starts = starts.data() + phase * per_phase();
    c.order = order.data() + phase * per_phase();
    c.storage = storage;
    ends.push_back((phase ? ends.back() : 0) + int64_t{c.strips()} * ceil_div(c.out_height, c.rows) * c.groups());
  }
  parallel(threads, ends.back(), [&](int64_t item) {
    const size_t phase = std::upper_bound(ends.begin(), ends.end(), item) - ends.begin();
    const PackedConvolution& c = convolutions[phase];
    if (phase) item -= ends[phase - 1];
    const int group = static_cast<int>(item % c.groups()), strip = static_cast<int>(item / c.groups() % c.strips());
    const int begin = static_cast<int>(item / c.groups() / c.strips()) * c.rows;
    float* window = scratch(0, static_cast<int64_t>(c.window_height + SPARE_ROWS) * c.row_floats());
    float* sums = scratch(1, static_cast<int64_t>(c.rows) * c.strip * c.group * TILE);
    kernels.convolve(c, input, bias, phase ? nullptr : addend, output, strip, begin,
                     std::min(c.out_height, begin + c.rows), group, window, sums);
  });
}

}  // namespace zerofl

#include <algorithm>

#include "ops/packing.h"
#include "runtime/threads.h"

namespace zerofl {
namespace {

// Where an entry of a weight goes, by its index in its output channel's row.
struct Slot {
  uint32_t list, offset;                     // of the forward pass
  uint32_t back_list, back_offset, phase;    // of grad_input, but for the output channel's part
};

PackedConvolution forward_of(const Geometry& g) {
  PackedConvolution c{};
  c.batch = g.batch;
  c.in_channels = g.in_channels, c.in_height = g.in_height, c.in_width = g.in_width;
  c.out_channels = g.out_channels, c.out_height = c.full_height = g.out_height,
  c.out_width = c.full_width = g.out_width;
  c.row_step = g.stride_height, c.row0 = -g.padding_height, c.col_step = g.stride_width, c.col0 = -g.padding_width;
  c.window_height = (g.kernel_height - 1) * g.dilation_height + 1;
  c.window_width = (g.kernel_width - 1) * g.dilation_width + 1;
  c.full_row_step = c.full_col_step = 1;
  return c;
}

// A phase of the stride, and the taps that meet it.
struct GradientPhase {
  int row, column;
  Taps rows, columns;
};

std::vector<GradientPhase> phases_of(const Geometry& g) {
  std::vector<GradientPhase> phases;
  for (int a = 0; a < g.stride_height; ++a)
    for (int b = 0; b < g.stride_width; ++b)
      phases.push_back({a, b, taps_of_phase(a, g.kernel_height, g.stride_height, g.padding_height, g.dilation_height),
                        taps_of_phase(b, g.kernel_width, g.stride_width, g.padding_width, g.dilation_width)});
  return phases;
}

PackedConvolution grad_input_of(const Geometry& g, const GradientPhase& phase) {
  PackedConvolution c{};
  c.batch = g.batch;
  c.in_channels = g.out_channels, c.in_height = g.out_height, c.in_width = g.out_width;
  c.out_channels = g.in_channels;
  c.out_height = ceil_div(std::max(0, g.in_height - phase.row), g.stride_height);
  c.out_width = ceil_div(std::max(0, g.in_width - phase.column), g.stride_width);
  c.row_step = c.col_step = 1;
  c.row0 = phase.rows.shift - phase.rows.extent() + 1, c.col0 = phase.columns.shift - phase.columns.extent() + 1;
  c.window_height = phase.rows.extent(), c.window_width = phase.columns.extent();
  c.full_height = g.in_height, c.full_width = g.in_width;
  c.full_row_step = g.stride_height, c.full_row0 = phase.row;
  c.full_col_step = g.stride_width, c.full_col0 = phase.column;
  return c;
}

void set_forward(std::vector<Slot>& slots, const Geometry& g, const PackedConvolution& c) {
  for (int i = 0; i < static_cast<int>(slots.size()); ++i) {
    const int channel = i / g.taps(), p = i % g.taps() / g.kernel_width, q = i % g.kernel_width;
    slots[i].list = channel / c.block * c.group;
    slots[i].offset = sizeof(float) * (p * g.dilation_height * c.row_floats() + channel % c.block * c.strip_floats +
                                       q * g.dilation_width * c.column_floats);
  }
}

void set_grad_input(std::vector<Slot>& slots, const Geometry& g, const Lists& backward,
                    const std::vector<GradientPhase>& phases) {
  for (size_t phase = 0; phase < phases.size(); ++phase) {
    const Taps &h = phases[phase].rows, &w = phases[phase].columns;
    const PackedConvolution& c = backward.phases[phase];
    for (int channel = 0; channel < g.in_channels; ++channel)
      for (int i = 0; i < h.count; ++i)
        for (int j = 0; j < w.count; ++j) {
          const int tap = (h.first + i * h.step) * g.kernel_width + w.first + j * w.step;
          Slot& slot = slots[channel * g.taps() + tap];
          slot.phase = static_cast<uint32_t>(phase);
          slot.back_list = static_cast<uint32_t>(phase * backward.per_phase() +
                                                 channel / c.group * c.blocks() * c.group + channel % c.group);
          slot.back_offset = sizeof(float) * ((h.extent() - 1 - i * h.distance) * c.row_floats() +
                                              (w.extent() - 1 - j * w.distance) * c.column_floats);
        }
  }
}

// The active entries of a weight by stretches of `channels` output channels, whose rows are `row` entries long.
struct Stretches {
  const std::vector<Found>& found;
  int channels, out_channels, row;

  // Call visit(output channel, index of its row's first entry, begin, end) for each output channel of a stretch.
  template <class Visit>
  void by_channel(int64_t stretch, const Visit& visit) const {
    const uint32_t *index = found[stretch].indices.data(), *end = index + found[stretch].size;
    for (int i = 0; i < channels && stretch * channels + i < out_channels; ++i) {
      const uint32_t* row_end = std::lower_bound(index, end, static_cast<uint32_t>((i + 1) * row));
      visit(static_cast<int>(stretch * channels + i), static_cast<uint32_t>(i * row), index, row_end);
      index = row_end;
    }
  }
};

}  // namespace

PackedWeight::PackedWeight(const Kernels& kernels, int threads, const Geometry& g, const float* weight,
                           const Choice& choice, bool for_grad_input)
    : kernels(kernels), geometry(g) {
  const int row = g.in_channels * g.taps();
  const TopK* top_k = std::get_if<TopK>(&choice);
  const int64_t expected = top_k ? top_k->k : std::get<AtLeast>(choice).expected;
  const int64_t active = expected ? expected : static_cast<int64_t>(g.out_channels) * row;
  std::vector<Slot> slots(row);
  forward.phases = {forward_of(g)};
  cut(forward.phases, threads, active);
  const PackedConvolution& c = forward.phases[0];
  set_forward(slots, g, c);
  std::vector<GradientPhase> phases;
  if (for_grad_input) {
    phases = phases_of(g);
    for (const GradientPhase& phase : phases) backward.phases.push_back(grad_input_of(g, phase));
    cut(backward.phases, threads, active / static_cast<int64_t>(phases.size()));
    set_grad_input(slots, g, backward, phases);
  }

  // A thread takes a stretch of output channels that is one block of grad_input's, so that its lists are its own.
  const int block = for_grad_input ? backward.phases[0].block : 16;
  const int back_group = for_grad_input ? backward.phases[0].group : 0;
  std::vector<Found> found(ceil_div(g.out_channels, block));
  threshold = find_chosen(kernels, threads, weight, static_cast<int64_t>(g.out_channels) * row,
                          static_cast<int64_t>(block) * row, choice, OF_WEIGHTS, found);
  active_weights = total_size(found);
  const Stretches stretches{found, block, g.out_channels, row};

  // How many entries each list has, then where they begin, then the entries.
  std::vector<int32_t> counts(forward.per_phase()),
      back_counts(phases.size() * (for_grad_input ? backward.per_phase() : 0));
  const auto first_list = [&](int o) { return counts.data() + o / c.group * c.blocks() * c.group + o % c.group; };
  parallel(threads, static_cast<int64_t>(found.size()), [&](int64_t stretch) {
    int32_t* back_count = back_counts.data() + stretch * back_group;
    stretches.by_channel(stretch, [&](int o, uint32_t row_begin, const uint32_t* begin, const uint32_t* end) {
      int32_t* count = first_list(o);
      for (const uint32_t* i = begin; i < end; ++i) ++count[slots[*i - row_begin].list];
      if (for_grad_input)
        for (const uint32_t* i = begin; i < end; ++i) ++back_count[slots[*i - row_begin].back_list];
    });
  });
  parallel(threads, for_grad_input ? 2 : 1, [&](int64_t item) {
    (item ? backward : forward).lay_out(kernels.entries_multiple, item ? back_counts : counts);
  });
  parallel(threads, static_cast<int64_t>(found.size()), [&](int64_t stretch) {
    Entry *entries = forward.entries.data(), *back_entries = backward.entries.data();
    int32_t* back_place = back_counts.data() + stretch * back_group;
    const uint32_t* first = found[stretch].indices.data();
    const float* values = found[stretch].values.data();
    std::vector<uint32_t> channel_offset(phases.size());
    stretches.by_channel(stretch, [&](int o, uint32_t row_begin, const uint32_t* begin, const uint32_t* end) {
      int32_t* place = first_list(o);
      for (const uint32_t* i = begin; i < end; ++i) {
        const Slot& slot = slots[*i - row_begin];
        entries[place[slot.list]++] = {values[i - first], slot.offset};
      }
      if (!for_grad_input) return;
      for (size_t phase = 0; phase < phases.size(); ++phase)
        channel_offset[phase] = static_cast<uint32_t>(o % block * backward.phases[phase].strip_floats * sizeof(float));
      for (const uint32_t* i = begin; i < end; ++i) {
        const Slot& slot = slots[*i - row_begin];
        back_entries[back_place[slot.back_list]++] = {values[i - first], slot.back_offset + channel_offset[slot.phase]};
      }
    });
  });
}

}  // namespace zerofl

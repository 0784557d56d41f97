#include "ops/linear_weight.h"

#include <algorithm>
#include <cstring>

#include "runtime/threads.h"

namespace zerofl {
namespace {

constexpr int64_t PART = 1 << 18;  // weights that a thread looks at at a time
constexpr int ROWS = 256;          // of an activation that a thread copies at a time

// Rows of `batch` floats as rows of whole vectors, zero behind the batch; those of `x` itself where they are that already.
struct WholeRows {
  WholeRows(int threads, const float* x, int rows, int batch, int row_floats) : data(x) {
    if (batch == row_floats) return;
    memory.allocate(static_cast<int64_t>(rows) * row_floats);
    data = memory.data();
    parallel(threads, (rows + ROWS - 1) / ROWS, [&](int64_t item) {
      for (int64_t row = item * ROWS; row < std::min<int64_t>(rows, (item + 1) * ROWS); ++row) {
        float* to = memory.data() + row * row_floats;
        memcpy(to, x + row * batch, batch * sizeof(float));
        memset(to + batch, 0, (row_floats - batch) * sizeof(float));
      }
    });
  }

  Array<float> memory;
  const float* data;
};

}  // namespace

LinearWeight::LinearWeight(const Kernels& kernels, int threads, const Geometry& g, const float* weight,
                           const Choice& choice, Candidates* candidates)
    : kernels(kernels), geometry(g), part_rows(LINEAR_OUT) {
  std::optional<float> chosen;
  if (candidates) chosen = choose_among(kernels, threads, g.out_channels, g.in_channels, choice, *candidates, found);
  if (chosen) {
    threshold = *chosen;
  } else {
    part_rows = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(g.out_channels, PART / g.in_channels)));
    found = std::vector<Found>((g.out_channels + part_rows - 1) / part_rows);
    threshold = find_chosen(kernels, threads, weight, static_cast<int64_t>(g.out_channels) * g.in_channels,
                            static_cast<int64_t>(part_rows) * g.in_channels, choice, OF_WEIGHTS, found);
  }
  active_weights = total_size(found);
}

void LinearWeight::forward(int threads, const float* input, const float* bias, float* output) const {
  const int batch = geometry.batch, vectors = (batch + kernels.lanes - 1) / kernels.lanes;
  const WholeRows x(threads, input, geometry.in_channels, batch, vectors * kernels.lanes);
  parallel(threads, static_cast<int64_t>(found.size()), [&](int64_t part) {
    const uint32_t *begin = found[part].indices.data(), *index = begin, *end = begin + found[part].size;
    float sums[TILE];
    for (int64_t o = part * part_rows, row = 0; row < part_rows && o < geometry.out_channels; ++o, ++row) {
      const uint32_t first = static_cast<uint32_t>(row * geometry.in_channels);
      const uint32_t* row_end = std::lower_bound(index, end, first + static_cast<uint32_t>(geometry.in_channels));
      kernels.linear_forward(index, found[part].values.data() + (index - begin), row_end - index, first, x.data,
                             vectors, bias ? bias[o] : 0.0f, sums);
      memcpy(output + o * batch, sums, batch * sizeof(float));
      index = row_end;
    }
  });
}

void LinearWeight::grad_input(int threads, const float* grad_output, float* grad_input) const {
  const int batch = geometry.batch, vectors = (batch + kernels.lanes - 1) / kernels.lanes;
  const int row_floats = vectors * kernels.lanes;
  const WholeRows dy(threads, grad_output, geometry.out_channels, batch, row_floats);
  // A thread takes a range of input channels and adds to them output channel by output channel, the order in which one
  // thread would.
  const int ranges = std::min(threads, geometry.in_channels), range = (geometry.in_channels + ranges - 1) / ranges;
  parallel(threads, ranges, [&](int64_t item) {
    const int64_t in_begin = item * range, in_end = std::min<int64_t>(geometry.in_channels, in_begin + range);
    if (in_begin >= in_end) return;
    float* sums = scratch(0, (in_end - in_begin) * row_floats);
    memset(sums, 0, (in_end - in_begin) * row_floats * sizeof(float));
    for (size_t part = 0; part < found.size(); ++part) {
      const uint32_t *begin = found[part].indices.data(), *index = begin, *end = begin + found[part].size;
      for (int64_t o = part * part_rows, row = 0; row < part_rows && o < geometry.out_channels; ++o, ++row) {
        const uint32_t first = static_cast<uint32_t>(row * geometry.in_channels + in_begin);
        index = std::lower_bound(index, end, first);
        const uint32_t* range_end = std::lower_bound(index, end, first + static_cast<uint32_t>(in_end - in_begin));
        kernels.linear_grad_input(index, found[part].values.data() + (index - begin), range_end - index, first,
                                  dy.data + o * row_floats, vectors, sums);
        index = range_end;
      }
    }
    for (int64_t channel = in_begin; channel < in_end; ++channel)
      memcpy(grad_input + channel * batch, sums + (channel - in_begin) * row_floats, batch * sizeof(float));
  });
}

}  // namespace zerofl

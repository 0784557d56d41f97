// The lists of non-zeros that the convolution kernel runs over, and how its work is cut and shared out.
#pragma once

#include <vector>

#include "kernels/kernels.h"
#include "runtime/memory.h"

namespace zerofl {

// Convolutions with the same blocks and groups, and their lists in one row: the forward pass is one, grad_input one for
// each phase of the stride.
struct Lists {
  std::vector<PackedConvolution> phases;
  Array<Entry> entries;
  std::vector<int32_t> starts, order;

  int64_t per_phase() const { return (int64_t)phases[0].groups() * phases[0].blocks() * phases[0].group; }
  // Order each list's channels by their number of entries, rounded up to `multiple`, and give each its place. `counts`, by
  // list and channel, become the places where their entries begin.
  void lay_out(int multiple, std::vector<int32_t>& counts);
  void run(const Kernels& kernels, int threads, const float* input, const float* bias, const float* addend,
           void* output, Storage storage = FLOAT32) const;
};

// Choose how the work on these convolutions is cut, so that what is read again and again stays in a cache.
void cut(std::vector<PackedConvolution>& phases, int threads, int64_t active);

}  // namespace zerofl

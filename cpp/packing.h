// From dense tensors to the lists of non-zeros that the kernels run over.
#pragma once

#include <memory>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace zerofl {

// A 2-D convolution as PyTorch describes it.
struct Geometry {
  int batch, in_channels, in_height, in_width, out_channels, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
  int dilation_height, dilation_width;

  int taps() const { return kernel_height * kernel_width; }
};

// Memory that is not initialised, for what is about to be written.
template <class T>
struct Array {
  std::unique_ptr<T, void (*)(void*)> memory{nullptr, pool_free};

  void allocate(int64_t count) { memory.reset(static_cast<T*>(pool_allocate(count * sizeof(T)))); }
  T* data() const { return memory.get(); }
};

// Convolutions with the same blocks and groups, and their lists in one row: the forward pass is one, grad_input one for
// each phase of the stride.
struct Lists {
  std::vector<Convolution> phases;
  Array<Entry> entries;
  std::vector<int32_t> starts, order;

  int64_t per_phase() const { return (int64_t)phases[0].groups() * phases[0].blocks() * phases[0].group; }
  void run(const Kernels& kernels, int threads, const float* input, const float* bias, const float* addend,
           float* output) const;
};

// Which entries of a tensor are active: those from `threshold` on, or the k largest in magnitude (all that equal the
// k-th), which begin near `threshold` if that is above 0.
struct Choice {
  int64_t k;
  float threshold;
  bool exact;
};

// A weight's active entries for one training step: for the forward pass, and for grad_input if asked for.
struct PackedWeight {
  PackedWeight(const Kernels& kernels, int threads, const Geometry& geometry, const float* weight, const Choice& choice,
               bool for_grad_input);
  PackedWeight(const PackedWeight&) = delete;

  const Kernels& kernels;
  Geometry geometry;
  float threshold;
  Lists forward, backward;
};

// An input's active entries, for grad_weight.
struct PackedInput {
  PackedInput(const Kernels& kernels, int threads, const Geometry& geometry, const float* input, const Choice& choice);
  PackedInput(const PackedInput&) = delete;

  void grad_weight(int threads, const float* grad_output, float* grad_weight) const;

  const Kernels& kernels;  // the offsets count in their vectors
  Geometry geometry;
  float threshold;
  WeightGradient gradient;
  std::vector<Phase> phases;
  std::vector<Array<Entry>> memory;
  std::vector<const Entry*> entries;  // of each channel
  std::vector<int32_t> starts;
};

// The k-th largest magnitude of x, exactly; NaN counts as the largest.
float top_k_threshold(const Kernels& kernels, int threads, const float* x, int64_t count, int64_t k);

// A buffer of the calling thread that grows and stays; `slot` tells buffers in use at the same time apart.
float* scratch(int slot, int64_t floats);

}  // namespace zerofl

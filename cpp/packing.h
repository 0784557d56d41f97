// From dense tensors to the lists of non-zeros that the kernels run over.
#pragma once

#include <stdexcept>
#include <vector>

#include "choosing.h"
#include "kernels.h"

namespace zerofl {

// A 2-D convolution as PyTorch describes it.
struct Geometry {
  int batch, in_channels, in_height, in_width, out_channels, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
  int dilation_height, dilation_width;

  int taps() const { return kernel_height * kernel_width; }
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

// A weight's active entries for one training step: for the forward pass, and for grad_input if asked for.
struct PackedWeight {
  PackedWeight(const Kernels& kernels, int threads, const Geometry& geometry, const float* weight, const Choice& choice,
               bool for_grad_input);
  PackedWeight(const PackedWeight&) = delete;

  const Kernels& kernels;
  Geometry geometry;
  float threshold;
  int64_t active_weights;
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

}  // namespace zerofl

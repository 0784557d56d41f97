// The active weights of a linear layer, where they are stored: on a small batch that needs no packing.
#pragma once

#include <vector>

#include "ops/geometry.h"
#include "ops/selection.h"

namespace zerofl {

// For a batch of TILE rows or fewer; the geometry is a linear layer's.
struct LinearWeight {
  // `candidates`, if given, are of this weight; they are used up.
  LinearWeight(const Kernels& kernels, int threads, const Geometry& geometry, const float* weight, const Choice& choice,
               Candidates* candidates = nullptr);
  LinearWeight(const LinearWeight&) = delete;

  // output [out_channels, batch] = weight input + bias, input [in_channels, batch]
  void forward(int threads, const float* input, const float* bias, float* output) const;
  // grad_input = transposed weight grad_output
  void grad_input(int threads, const float* grad_output, float* grad_input) const;

  const Kernels& kernels;
  Geometry geometry;
  int part_rows;  // output channels whose weights are in one of `found`
  std::vector<Found> found;
  float threshold;
  int64_t active_weights;
};

}  // namespace zerofl

// From dense tensors to the lists of non-zeros that the kernels run over.
#pragma once

#include <vector>

#include "ops/geometry.h"
#include "ops/lists.h"
#include "ops/selection.h"

namespace zerofl {

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

  // The gradient becomes what `target` says. After a step on a linear layer's weight, `candidates` (if given, and filled
  // but for `found`) gets what the weight has for the next one.
  void grad_weight(int threads, const float* grad_output, const Target& target, Candidates* candidates = nullptr) const;

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

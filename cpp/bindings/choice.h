// What Python may ask of a selection.
#pragma once

#include "bindings/tensors.h"
#include "ops/selection.h"

namespace zerofl {

inline void check(const Choice& choice, int64_t entries) {
  const TopK* top_k = std::get_if<TopK>(&choice);
  if (top_k && (top_k->k < 0 || top_k->k > entries)) throw nb::value_error("k is out of range");
}

}  // namespace zerofl

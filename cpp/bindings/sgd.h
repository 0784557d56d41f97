// A step of SGD that a backward pass takes on its layer's weight, instead of giving its gradient.
#pragma once

#include <nanobind/stl/optional.h>

#include "bindings/tensors.h"
#include "ops/selection.h"

namespace zerofl {

struct Sgd {
  Floats<0> weight;
  std::optional<Floats<0>> velocity;
  float rate, momentum, weight_decay, power;
  Candidates* candidates;  // filled in the same pass if the layer can; or null

  Sgd(Floats<0> weight, std::optional<Floats<0>> velocity, float rate, float momentum, float weight_decay,
      Candidates* candidates, float power)
      : weight(weight),
        velocity(velocity),
        rate(rate),
        momentum(momentum),
        weight_decay(weight_decay),
        power(power),
        candidates(candidates) {
    if (velocity && velocity->size() != weight.size()) throw nb::value_error("velocity is not as large as the weight");
    if (!(power >= 1 && power <= 2)) throw nb::value_error("power: expected 1 to 2");
  }
};

// What becomes of a gradient of this shape; at most one of the two is given.
template <int Dimensions>
Target target(const std::optional<Floats<Dimensions>>& grad_weight, const Sgd* sgd,
              std::initializer_list<int64_t> shape) {
  if (grad_weight && sgd) throw nb::value_error("grad_weight and sgd: expected one of them");
  if (grad_weight) {
    expect(*grad_weight, shape, "grad_weight");
    return {grad_weight->data(), nullptr, nullptr, 0, 0, 0, 1};
  }
  expect(sgd->weight, shape, "the weight of sgd");
  return {nullptr, sgd->weight.data(), pointer(sgd->velocity), sgd->rate, sgd->momentum, sgd->weight_decay, sgd->power};
}

}  // namespace zerofl

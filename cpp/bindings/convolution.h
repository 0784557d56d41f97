// A convolution's operands between the passes.
#pragma once

#include <memory>

#include "bindings/choice.h"
#include "bindings/sgd.h"
#include "bindings/tensors.h"
#include "ops/packing.h"
#include "runtime/clock.h"

namespace zerofl {

// A convolution of one training step, between its forward and its backward pass.
struct Convolution {
  Geometry geometry;
  std::unique_ptr<PackedWeight> weight;
  std::unique_ptr<PackedInput> input;  // null if no gradient of the weight is wanted

  Convolution(const Geometry& g, ConstFloats<4> x, ConstFloats<4> w, std::optional<ConstFloats<1>> bias, void* output,
              Storage storage, const Choice& weight_choice, const std::optional<Choice>& input_choice,
              bool for_grad_input, int threads)
      : geometry(g) {
    threads = sensible(threads);
    expect(x, {g.in_channels, g.in_height, g.in_width, g.batch}, "input");
    expect(w, {g.out_channels, g.in_channels, g.kernel_height, g.kernel_width}, "weight");
    if (bias) expect(*bias, {g.out_channels}, "bias");
    check(weight_choice, w.size());
    if (input_choice) check(*input_choice, x.size());
    {
      const Stopwatch stopwatch(PACKING);
      weight = std::make_unique<PackedWeight>(*kernels, threads, g, w.data(), weight_choice, for_grad_input);
      if (input_choice) input = std::make_unique<PackedInput>(*kernels, threads, g, x.data(), *input_choice);
    }
    const Stopwatch stopwatch(FORWARD);
    weight->forward.run(weight->kernels, threads, x.data(), pointer(bias), nullptr, output, storage);
    weight->forward = {};  // it has served; the backward pass needs the other
  }

  Convolution(const Geometry& g, ConstFloats<4> x, ConstFloats<4> w, std::optional<ConstFloats<1>> bias,
              Floats<4> output, const Choice& weight_choice, const std::optional<Choice>& input_choice,
              bool for_grad_input, int threads)
      : Convolution(g, x, w, bias, checked(output, g).data(), FLOAT32, weight_choice, input_choice, for_grad_input,
                    threads) {}

  static const Floats<4>& checked(const Floats<4>& output, const Geometry& g) {
    expect(output, {g.out_channels, g.out_height, g.out_width, g.batch}, "output");
    return output;
  }

  void backward(ConstFloats<4> grad_output, std::optional<ConstFloats<4>> addend, std::optional<Floats<4>> grad_input,
                std::optional<Floats<4>> grad_weight, int threads, const Sgd* sgd) const {
    const Geometry& g = geometry;
    expect(grad_output, {g.out_channels, g.out_height, g.out_width, g.batch}, "grad_output");
    gradients(grad_output.data(), addend, grad_input, grad_weight, threads, sgd);
  }

  void gradients(const float* grad_output, std::optional<ConstFloats<4>> addend, std::optional<Floats<4>> grad_input,
                 std::optional<Floats<4>> grad_weight, int threads, const Sgd* sgd) const {
    const Geometry& g = geometry;
    threads = sensible(threads);
    if (grad_input) {
      const Lists& backward = weight->backward;
      expect(*grad_input, {g.in_channels, g.in_height, g.in_width, g.batch}, "grad_input");
      if (backward.phases.empty()) throw nb::value_error("the weight was packed without for_grad_input");
      const PackedConvolution& phase = backward.phases[0];
      if (addend) expect(*addend, {g.in_channels, phase.out_height, phase.out_width, g.batch}, "addend");
      const Stopwatch stopwatch(GRAD_INPUT);
      backward.run(weight->kernels, threads, grad_output, nullptr, pointer(addend), grad_input->data());
    }
    if (grad_weight || sgd) {
      const Target to = target(grad_weight, sgd, {g.out_channels, g.in_channels, g.kernel_height, g.kernel_width});
      if (!input) throw nb::value_error("the input was not packed");
      const Stopwatch stopwatch(GRAD_WEIGHT);
      input->grad_weight(threads, grad_output, to);
    }
  }
};

}  // namespace zerofl

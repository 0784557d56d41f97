#include <nanobind/stl/optional.h>
#include <nanobind/stl/variant.h>

#include <memory>

#include "bindings/choice.h"
#include "bindings/sgd.h"
#include "bindings/tensors.h"
#include "ops/linear_weight.h"
#include "ops/packing.h"
#include "runtime/clock.h"

namespace zerofl {
namespace {

Geometry linear_geometry(int64_t in_features, int64_t out_features, int64_t batch) {
  for (int64_t size : {in_features, out_features, batch})
    if (size < 1 || size > INT32_MAX) throw nb::value_error("sizes have to be from 1 to 2^31 - 1");
  Geometry g{};
  g.in_channels = static_cast<int>(in_features), g.out_channels = static_cast<int>(out_features);
  g.batch = static_cast<int>(batch);
  g.in_height = g.in_width = g.out_height = g.out_width = g.kernel_height = g.kernel_width = 1;
  g.stride_height = g.stride_width = g.dilation_height = g.dilation_width = 1;
  return g;
}

// A linear layer of one training step, between its forward and its backward pass.
struct Linear {
  Geometry geometry;
  std::unique_ptr<LinearWeight> small;  // for a batch that fits in a tile; else
  std::unique_ptr<PackedWeight> large;  // as a convolution of one position
  std::unique_ptr<PackedInput> input;   // null if no gradient of the weight is wanted

  Linear(ConstFloats<2> x, ConstFloats<2> w, std::optional<ConstFloats<1>> bias, Floats<2> output,
         const Choice& weight_choice, const std::optional<Choice>& input_choice, bool for_grad_input, int threads,
         Candidates* candidates)
      : geometry(linear_geometry(x.shape(0), w.shape(0), x.shape(1))) {
    const Geometry& g = geometry;
    threads = sensible(threads);
    expect(w, {g.out_channels, g.in_channels}, "weight");
    expect(output, {g.out_channels, g.batch}, "output");
    if (bias) expect(*bias, {g.out_channels}, "bias");
    check(weight_choice, w.size());
    if (input_choice) check(*input_choice, x.size());
    {
      const Stopwatch stopwatch(PACKING);
      if (g.batch <= TILE)
        small = std::make_unique<LinearWeight>(*kernels, threads, g, w.data(), weight_choice, candidates);
      else
        large = std::make_unique<PackedWeight>(*kernels, threads, g, w.data(), weight_choice, for_grad_input);
      if (input_choice) input = std::make_unique<PackedInput>(*kernels, threads, g, x.data(), *input_choice);
    }
    const Stopwatch stopwatch(FORWARD);
    if (small) {
      small->forward(threads, x.data(), pointer(bias), output.data());
    } else {
      large->forward.run(large->kernels, threads, x.data(), pointer(bias), nullptr, output.data());
      large->forward = {};
    }
  }

  void backward(ConstFloats<2> grad_output, std::optional<Floats<2>> grad_input, std::optional<Floats<2>> grad_weight,
                int threads, const Sgd* sgd) const {
    const Geometry& g = geometry;
    threads = sensible(threads);
    expect(grad_output, {g.out_channels, g.batch}, "grad_output");
    if (grad_input) {
      expect(*grad_input, {g.in_channels, g.batch}, "grad_input");
      if (large && large->backward.phases.empty())
        throw nb::value_error("the weight was packed without for_grad_input");
      const Stopwatch stopwatch(GRAD_INPUT);
      if (small)
        small->grad_input(threads, grad_output.data(), grad_input->data());
      else
        large->backward.run(large->kernels, threads, grad_output.data(), nullptr, nullptr, grad_input->data());
    }
    if (grad_weight || sgd) {
      const Target to = target(grad_weight, sgd, {g.out_channels, g.in_channels});
      if (!input) throw nb::value_error("the input was not packed");
      const Stopwatch stopwatch(GRAD_WEIGHT);
      input->grad_weight(threads, grad_output.data(), to, sgd ? scan_ahead(sgd->candidates) : nullptr);
    }
  }

  // `candidates`, to be filled with what the next step's small batch chooses among; or null.
  Candidates* scan_ahead(Candidates* candidates) const {
    if (!candidates) return nullptr;
    *candidates = Candidates();
    if (!small || !can_scan(small->threshold, small->active_weights, geometry.out_channels, geometry.in_channels))
      return nullptr;
    candidates->near = small->threshold;
    candidates->rows = geometry.out_channels, candidates->row = geometry.in_channels;
    return candidates;
  }
};

}  // namespace

void bind_linear(nb::module_& m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<Linear>(m, "Linear")
      .def(nb::init<ConstFloats<2>, ConstFloats<2>, std::optional<ConstFloats<1>>, Floats<2>, const Choice&,
                    const std::optional<Choice>&, bool, int, Candidates*>(),
           "input"_a, "weight"_a, "bias"_a.none(), "output"_a, "weight_choice"_a, "input_choice"_a.none(),
           "for_grad_input"_a, "threads"_a, "candidates"_a.none() = nb::none(), release)
      .def_prop_ro("weight_threshold",
                   [](const Linear& self) { return self.small ? self.small->threshold : self.large->threshold; })
      .def_prop_ro(
          "active_weights",
          [](const Linear& self) { return self.small ? self.small->active_weights : self.large->active_weights; })
      .def_prop_ro(
          "input_threshold",
          [](const Linear& self) { return self.input ? std::optional<float>(self.input->threshold) : std::nullopt; })
      .def("backward", &Linear::backward, "grad_output"_a, "grad_input"_a.none(), "grad_weight"_a.none(), "threads"_a,
           "sgd"_a.none() = nb::none(), release);
}

}  // namespace zerofl

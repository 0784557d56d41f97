#include <nanobind/stl/optional.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "bindings/convolution.h"

namespace zerofl {
namespace {

// Checked here once, so that the kernels can trust it.
Geometry checked(const std::vector<int>& input, const std::vector<int>& weight, const std::vector<int>& stride,
                 const std::vector<int>& padding, const std::vector<int>& dilation) {
  Geometry g{};
  const auto pair = [](const std::vector<int>& v) { return v.size() == 2; };
  if (input.size() != 4 || weight.size() != 4 || !pair(stride) || !pair(padding) || !pair(dilation))
    throw nb::value_error("expected input and weight sizes of 4 numbers, and stride, padding and dilation of 2");
  g.in_channels = input[0], g.in_height = input[1], g.in_width = input[2], g.batch = input[3];
  g.out_channels = weight[0], g.kernel_height = weight[2], g.kernel_width = weight[3];
  g.stride_height = stride[0], g.stride_width = stride[1];
  g.padding_height = padding[0], g.padding_width = padding[1];
  g.dilation_height = dilation[0], g.dilation_width = dilation[1];
  for (int size : {g.batch, g.in_channels, g.in_height, g.in_width, g.out_channels, g.kernel_height, g.kernel_width,
                   g.stride_height, g.stride_width, g.dilation_height, g.dilation_width})
    if (size < 1) throw nb::value_error("sizes, strides and dilations have to be 1 or more");
  if (g.padding_height < 0 || g.padding_width < 0) throw nb::value_error("paddings have to be 0 or more");
  if (weight[1] != g.in_channels) throw nb::value_error("the weight is for another number of input channels");
  // Absurd sizes would overflow the kernels' ints; each phase of the stride has lists of its own.
  const auto far = [](int64_t size) { return size > 1 << 24; };
  if (far(g.padding_height) || far(g.padding_width) || far(int64_t{g.dilation_height} * g.kernel_height) ||
      far(int64_t{g.dilation_width} * g.kernel_width))
    throw nb::value_error("a padding or kernel of more than 2^24");
  if (int64_t{g.stride_height} * g.stride_width > 1 << 20)
    throw nb::value_error("a stride of more than 2^20 positions");
  const auto outputs = [](int64_t in, int64_t kernel, int64_t step, int64_t pad, int64_t spread) {
    return in + 2 * pad - spread * (kernel - 1) - 1 < 0 ? 0 : (in + 2 * pad - spread * (kernel - 1) - 1) / step + 1;
  };
  const int64_t height = outputs(g.in_height, g.kernel_height, g.stride_height, g.padding_height, g.dilation_height);
  const int64_t width = outputs(g.in_width, g.kernel_width, g.stride_width, g.padding_width, g.dilation_width);
  if (height < 1 || width < 1) throw nb::value_error("the kernel is larger than the padded input");
  if (height > (1 << 24) || width > (1 << 24)) throw nb::value_error("an output side of more than 2^24");
  g.out_height = static_cast<int>(height), g.out_width = static_cast<int>(width);
  return g;
}

}  // namespace

void bind_convolution(nb::module_& m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<TopK>(m, "TopK").def(nb::init<int64_t, float>(), "k"_a, "near"_a = 0.0f);
  nb::class_<AtLeast>(m, "AtLeast").def(nb::init<float, int64_t>(), "threshold"_a, "expected"_a = 0);
  m.def(
      "top_k_threshold",
      [](AnyFloats x, int64_t k, int threads) {
        check(TopK{k, 0}, x.size());
        return top_k_threshold(*kernels, threads, x.data(), x.size(), k);
      },
      "x"_a, "k"_a, "threads"_a, release);

  nb::class_<Candidates>(m, "Candidates").def(nb::init<>());
  nb::class_<Sgd>(m, "Sgd")
      .def(nb::init<Floats<0>, std::optional<Floats<0>>, float, float, float, Candidates*, float>(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 7>(), "weight"_a, "velocity"_a.none(),
           "rate"_a, "momentum"_a, "weight_decay"_a, "candidates"_a.none() = nb::none(), "power"_a = 1.0f)
      .def_ro("candidates", &Sgd::candidates);

  nb::class_<Geometry>(m, "Geometry")
      .def(nb::new_(&checked), "input"_a, "weight"_a, "stride"_a, "padding"_a, "dilation"_a)
      .def_prop_ro("output", [](const Geometry& g) {
        return nb::make_tuple(g.out_channels, g.out_height, g.out_width, g.batch);
      });

  nb::class_<Convolution>(m, "Convolution")
      .def(nb::init<const Geometry&, ConstFloats<4>, ConstFloats<4>, std::optional<ConstFloats<1>>, Floats<4>,
                    const Choice&, const std::optional<Choice>&, bool, int>(),
           "geometry"_a, "input"_a, "weight"_a, "bias"_a.none(), "output"_a, "weight_choice"_a, "input_choice"_a.none(),
           "for_grad_input"_a, "threads"_a, release)
      .def_prop_ro("weight_threshold", [](const Convolution& self) { return self.weight->threshold; })
      .def_prop_ro("active_weights", [](const Convolution& self) { return self.weight->active_weights; })
      .def_prop_ro("input_threshold",
                   [](const Convolution& self) {
                     return self.input ? std::optional<float>(self.input->threshold) : std::nullopt;
                   })
      .def("backward", &Convolution::backward, "grad_output"_a, "addend"_a.none(), "grad_input"_a.none(),
           "grad_weight"_a.none(), "threads"_a, "sgd"_a.none() = nb::none(), release);
}

}  // namespace zerofl

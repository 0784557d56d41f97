#include <nanobind/stl/optional.h>
#include <nanobind/stl/variant.h>

#include <vector>

#include "bindings/convolution.h"
#include "ops/normalization.h"

namespace zerofl {
namespace {

// relu(norm(convolution(x)) + residual) of one training step, as one call each way. What the convolution gives is kept
// here, as `storage` says, and its gradient is only there during the call, unless grad_output is to have it.
struct ConvNorm {
  Array<char> stored;
  Convolution convolution;
  Storage storage;
  std::vector<float> mean, variance;
  Array<uint8_t> positive;  // null without ReLU
  float epsilon;

  static Array<char> room(const Geometry& g, Storage storage) {
    Array<char> memory;
    memory.allocate(int64_t{g.out_channels} * g.out_height * g.out_width * g.batch * bytes_of(storage));
    return memory;
  }

  ConvNorm(const Geometry& g, ConstFloats<4> x, ConstFloats<4> w, std::optional<ConstFloats<1>> bias,
           const Choice& weight_choice, const std::optional<Choice>& input_choice, bool for_grad_input,
           std::optional<Floats<1>> running_mean, std::optional<Floats<1>> running_variance, float momentum,
           float epsilon, std::optional<ConstFloats<1>> norm_weight, std::optional<ConstFloats<1>> norm_bias,
           std::optional<ConstFloats<4>> residual, bool relu, int storage, Floats<4> y, int threads)
      : stored(room(g, checked(storage))),
        convolution(g, x, w, bias, stored.data(), checked(storage), weight_choice, input_choice, for_grad_input,
                    threads),
        storage(checked(storage)),
        mean(g.out_channels),
        variance(g.out_channels),
        epsilon(epsilon) {
    const int channels = g.out_channels;
    for (const auto& running : {running_mean, running_variance})
      if (running) expect(*running, {channels}, "running_mean or running_variance");
    if (running_mean && !running_variance) throw nb::value_error("running_mean and running_variance belong together");
    for (const auto& affine : {norm_weight, norm_bias})
      if (affine) expect(*affine, {channels}, "norm_weight or norm_bias");
    const auto shape = {int64_t{channels}, int64_t{g.out_height}, int64_t{g.out_width}, int64_t{g.batch}};
    expect(y, shape, "y");
    if (residual) expect(*residual, shape, "residual");
    if (relu) positive.allocate(channels * ((count() + 7) / 8));
    const Stopwatch stopwatch(NORMALISATION);
    batch_norm(*kernels, sensible(threads), stored.data(), this->storage, channels, count(), true, mean.data(),
               variance.data(), pointer(running_mean), pointer(running_variance), momentum, epsilon,
               pointer(norm_weight), pointer(norm_bias), pointer(residual), relu, y.data(), positive.data());
  }

  static Storage checked(int storage) {
    if (storage < FLOAT32 || storage > BFLOAT16) throw nb::value_error("storage is 0, 1 or 2");
    return static_cast<Storage>(storage);
  }

  int64_t count() const {
    const Geometry& g = convolution.geometry;
    return int64_t{g.out_height} * g.out_width * g.batch;
  }

  void backward(ConstFloats<4> grad_y, std::optional<ConstFloats<1>> norm_weight, std::optional<ConstFloats<4>> addend,
                std::optional<Floats<4>> grad_input, std::optional<Floats<4>> grad_weight,
                std::optional<Floats<4>> grad_output, Floats<1> grad_norm_weight, Floats<1> grad_norm_bias,
                std::optional<Floats<4>> grad_residual, int threads, const Sgd* sgd) const {
    const Geometry& g = convolution.geometry;
    const auto shape = {int64_t{g.out_channels}, int64_t{g.out_height}, int64_t{g.out_width}, int64_t{g.batch}};
    expect(grad_y, shape, "grad_y");
    if (norm_weight) expect(*norm_weight, {g.out_channels}, "norm_weight");
    expect(grad_norm_weight, {g.out_channels}, "grad_norm_weight");
    expect(grad_norm_bias, {g.out_channels}, "grad_norm_bias");
    if (grad_residual) expect(*grad_residual, shape, "grad_residual");
    if (grad_output) expect(*grad_output, shape, "grad_output");
    Array<float> own;
    if (!grad_output) own.allocate(count() * g.out_channels);
    float* between = grad_output ? grad_output->data() : own.data();
    {
      const Stopwatch stopwatch(NORMALISATION);
      batch_norm_backward(*kernels, sensible(threads), grad_y.data(), stored.data(), storage, positive.data(),
                          g.out_channels, count(), mean.data(), variance.data(), epsilon, pointer(norm_weight), between,
                          grad_norm_weight.data(), grad_norm_bias.data(), pointer(grad_residual));
    }
    convolution.gradients(between, addend, grad_input, grad_weight, threads, sgd);
  }
};

}  // namespace

void bind_conv_norm(nb::module_& m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<ConvNorm>(m, "ConvNorm")
      .def(nb::init<const Geometry&, ConstFloats<4>, ConstFloats<4>, std::optional<ConstFloats<1>>, const Choice&,
                    const std::optional<Choice>&, bool, std::optional<Floats<1>>, std::optional<Floats<1>>, float,
                    float, std::optional<ConstFloats<1>>, std::optional<ConstFloats<1>>, std::optional<ConstFloats<4>>,
                    bool, int, Floats<4>, int>(),
           "geometry"_a, "input"_a, "weight"_a, "bias"_a.none(), "weight_choice"_a, "input_choice"_a.none(),
           "for_grad_input"_a, "running_mean"_a.none(), "running_variance"_a.none(), "momentum"_a, "epsilon"_a,
           "norm_weight"_a.none(), "norm_bias"_a.none(), "residual"_a.none(), "relu"_a, "storage"_a, "y"_a, "threads"_a,
           release)
      .def_prop_ro("weight_threshold", [](const ConvNorm& self) { return self.convolution.weight->threshold; })
      .def_prop_ro("active_weights", [](const ConvNorm& self) { return self.convolution.weight->active_weights; })
      .def_prop_ro("input_threshold",
                   [](const ConvNorm& self) {
                     const auto& input = self.convolution.input;
                     return input ? std::optional<float>(input->threshold) : std::nullopt;
                   })
      .def("backward", &ConvNorm::backward, "grad_y"_a, "norm_weight"_a.none(), "addend"_a.none(),
           "grad_input"_a.none(), "grad_weight"_a.none(), "grad_output"_a.none(), "grad_norm_weight"_a,
           "grad_norm_bias"_a, "grad_residual"_a.none(), "threads"_a, "sgd"_a.none() = nb::none(), release);
}

}  // namespace zerofl

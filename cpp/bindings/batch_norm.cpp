#include <nanobind/stl/optional.h>

#include "bindings/tensors.h"
#include "ops/normalization.h"
#include "runtime/clock.h"

namespace zerofl {
namespace {

int64_t channels_of(const Stored& x) {
  if (x.size() == 0) throw nb::value_error("expected a tensor with entries");
  return x.shape(0);
}

}  // namespace

void bind_batch_norm(nb::module_& m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  m.def(
      "batch_norm",
      [](Stored x, bool of_batch, Floats<1> mean, Floats<1> variance, std::optional<Floats<1>> running_mean,
         std::optional<Floats<1>> running_variance, float momentum, float epsilon, std::optional<ConstFloats<1>> weight,
         std::optional<ConstFloats<1>> bias, std::optional<ConstFloats<4>> residual, bool relu, Floats<4> y,
         std::optional<Bytes> positive, int threads) {
        const int64_t channels = channels_of(x), count = x.size() / channels;
        expect(mean, {channels}, "mean");
        expect(variance, {channels}, "variance");
        if (running_mean) expect(*running_mean, {channels}, "running_mean");
        if (running_variance) expect(*running_variance, {channels}, "running_variance");
        if (running_mean && !running_variance)
          throw nb::value_error("running_mean and running_variance belong together");
        if (weight) expect(*weight, {channels}, "weight");
        if (bias) expect(*bias, {channels}, "bias");
        const auto shape = {channels, x.shape(1), x.shape(2), x.shape(3)};
        expect(y, shape, "y");
        if (residual) expect(*residual, shape, "residual");
        if (positive) expect(*positive, {channels, (count + 7) / 8}, "positive");
        const Stopwatch stopwatch(NORMALISATION);
        batch_norm(*kernels, threads, x.data(), x.storage, static_cast<int>(channels), count, of_batch, mean.data(),
                   variance.data(), pointer(running_mean), pointer(running_variance), momentum, epsilon,
                   pointer(weight), pointer(bias), pointer(residual), relu, y.data(), pointer(positive));
      },
      "x"_a, "of_batch"_a, "mean"_a, "variance"_a, "running_mean"_a.none(), "running_variance"_a.none(), "momentum"_a,
      "epsilon"_a, "weight"_a.none(), "bias"_a.none(), "residual"_a.none(), "relu"_a, "y"_a, "positive"_a.none(),
      "threads"_a, release);
  m.def(
      "batch_norm_backward",
      [](ConstFloats<4> grad_y, Stored x, std::optional<ConstBytes> positive, ConstFloats<1> mean,
         ConstFloats<1> variance, float epsilon, std::optional<ConstFloats<1>> weight, Floats<4> grad_x,
         Floats<1> grad_weight, Floats<1> grad_bias, std::optional<Floats<4>> grad_residual, int threads) {
        const int64_t channels = channels_of(x), count = x.size() / channels;
        for (const auto& per_channel : {mean, variance, weight.value_or(mean)})
          expect(per_channel, {channels}, "mean, variance or weight");
        expect(grad_weight, {channels}, "grad_weight");
        expect(grad_bias, {channels}, "grad_bias");
        const auto shape = {channels, x.shape(1), x.shape(2), x.shape(3)};
        expect(grad_y, shape, "grad_y");
        expect(grad_x, shape, "grad_x");
        if (grad_residual) expect(*grad_residual, shape, "grad_residual");
        if (positive) expect(*positive, {channels, (count + 7) / 8}, "positive");
        const Stopwatch stopwatch(NORMALISATION);
        batch_norm_backward(*kernels, threads, grad_y.data(), x.data(), x.storage, pointer(positive),
                            static_cast<int>(channels), count, mean.data(), variance.data(), epsilon, pointer(weight),
                            grad_x.data(), grad_weight.data(), grad_bias.data(), pointer(grad_residual));
      },
      "grad_y"_a, "x"_a, "positive"_a.none(), "mean"_a, "variance"_a, "epsilon"_a, "weight"_a.none(), "grad_x"_a,
      "grad_weight"_a, "grad_bias"_a, "grad_residual"_a.none(), "threads"_a, release);
}

}  // namespace zerofl

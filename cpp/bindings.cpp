// The module zerofl._native. Every tensor is a contiguous float32 one on the CPU, batch innermost: [channels, height,
// width, batch]; the types refuse all others and never convert. native.py makes them and allocates the results.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "linear_weight.h"
#include "normalization.h"
#include "packing.h"
#include "parallel.h"
#include "pool.h"
#include "stopwatch.h"
#include "wire.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace zerofl;

namespace {

// A torch tensor on the CPU: contiguous, of this type and number of dimensions (any, if 0).
template <class T, int Dimensions>
struct Tensor {
  T* memory = nullptr;
  int dimensions = 0;
  int64_t sizes[4] = {};

  T* data() const { return memory; }
  int64_t shape(int i) const { return sizes[i]; }
  int64_t size() const {
    int64_t entries = 1;
    for (int i = 0; i < dimensions; ++i) entries *= sizes[i];
    return entries;
  }
};

// torch's types of the numbers, and the names of what is asked of every tensor; looked up once.
struct Torch {
  nb::object tensor, float32, uint8;
  nb::object dtype = nb::str("dtype"), is_cpu = nb::str("is_cpu"), is_contiguous = nb::str("is_contiguous"),
             shape = nb::str("shape"), data_ptr = nb::str("data_ptr");

  Torch() {
    const nb::module_ torch = nb::module_::import_("torch");
    tensor = torch.attr("Tensor"), float32 = torch.attr("float32"), uint8 = torch.attr("uint8");
  }
};

const Torch& torch() {
  static const Torch* torch = new Torch;  // never destroyed: Python may end before
  return *torch;
}

}  // namespace

// Tensors come by their own attributes: DLPack would take ten times as long, 400 times a training step.
namespace nanobind::detail {

template <class T, int Dimensions>
struct type_caster<Tensor<T, Dimensions>> {
  using Type = Tensor<T, Dimensions>;
  NB_TYPE_CASTER(Type, const_name("torch.Tensor"))

  bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
    try {
      const Torch& names = torch();
      if (!isinstance(source, names.tensor)) return false;
      const handle dtype = std::is_same_v<std::remove_const_t<T>, float> ? names.float32 : names.uint8;
      if (!getattr(source, names.dtype).is(dtype) || !cast<bool>(getattr(source, names.is_cpu)) ||
          !cast<bool>(getattr(source, names.is_contiguous)()))
        return false;
      const object shape = getattr(source, names.shape);
      value.dimensions = static_cast<int>(len(shape));
      if (value.dimensions > 4 || (Dimensions && value.dimensions != Dimensions)) return false;
      for (int i = 0; i < value.dimensions; ++i)
        value.sizes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.memory = reinterpret_cast<T*>(cast<uintptr_t>(getattr(source, names.data_ptr)()));
      return true;
    } catch (...) {  // a tensor without memory, such as a fake one
      PyErr_Clear();
      return false;
    }
  }
};

}  // namespace nanobind::detail

namespace {

template <int Dimensions>
using Floats = Tensor<float, Dimensions>;
template <int Dimensions>
using ConstFloats = Tensor<const float, Dimensions>;
using AnyFloats = Tensor<const float, 0>;
using Bytes = Tensor<uint8_t, 0>;
using ConstBytes = Tensor<const uint8_t, 0>;

const Kernels* kernels = &kernels_baseline;

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> sets = {&kernels_baseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi"))
    sets.push_back(&kernels_avx2);
  if (sets.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    sets.push_back(&kernels_avx512);
#endif
  return sets;
}

template <class AnyTensor>
auto pointer(const std::optional<AnyTensor>& tensor) {
  return tensor ? tensor->data() : nullptr;
}

template <class AnyTensor>
void expect(const AnyTensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  int i = 0;
  bool same = tensor.dimensions == static_cast<int>(shape.size());
  for (int64_t size : shape) same = same && tensor.shape(i++) == size;
  if (!same) throw nb::value_error((std::string(name) + " does not have the shape that the geometry gives it").c_str());
}

int64_t channels_of(const ConstFloats<4>& x) {
  if (x.size() == 0) throw nb::value_error("expected a tensor with entries");
  return x.shape(0);
}

void check(int64_t k, int64_t entries) {
  if (k < 0 || k > entries) throw nb::value_error("k is out of range");
}

template <class T>
using Numbers = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;  // of numpy; to be taken without conversion

// The sums of a byte's probabilities: with others the decoder would read behind them.
const uint32_t* checked(const Numbers<const uint32_t>& cumulative) {
  bool good = cumulative.shape(0) == SYMBOLS + 1 && cumulative.data()[0] == 0 && cumulative.data()[SYMBOLS] == WHOLE;
  for (int i = 0; good && i < SYMBOLS; ++i) good = cumulative.data()[i] < cumulative.data()[i + 1];
  if (!good) throw nb::value_error("expected 257 sums from 0 to 2^24, each above the one before");
  return cumulative.data();
}

void expect_planes(size_t bytes, size_t numbers) {
  if (bytes != 4 * numbers) throw nb::value_error("planes does not have 4 bytes for each number");
}

// The work is cut with a thought to the number of threads, which may be anything.
int sensible(int threads) { return std::clamp(threads, 1, 1024); }

// A convolution whose shapes are checked here once, so that the kernels can trust them.
struct Shape : Geometry {
  Shape(const std::vector<int>& input, const std::vector<int>& weight, const std::vector<int>& stride,
        const std::vector<int>& padding, const std::vector<int>& dilation) {
    const auto pair = [](const std::vector<int>& v) { return v.size() == 2; };
    if (input.size() != 4 || weight.size() != 4 || !pair(stride) || !pair(padding) || !pair(dilation))
      throw nb::value_error("expected input and weight sizes of 4 numbers, and stride, padding and dilation of 2");
    in_channels = input[0], in_height = input[1], in_width = input[2], batch = input[3];
    out_channels = weight[0], kernel_height = weight[2], kernel_width = weight[3];
    stride_height = stride[0], stride_width = stride[1];
    padding_height = padding[0], padding_width = padding[1];
    dilation_height = dilation[0], dilation_width = dilation[1];
    for (int size : {batch, in_channels, in_height, in_width, out_channels, kernel_height, kernel_width, stride_height,
                     stride_width, dilation_height, dilation_width})
      if (size < 1) throw nb::value_error("sizes, strides and dilations have to be 1 or more");
    if (padding_height < 0 || padding_width < 0) throw nb::value_error("paddings have to be 0 or more");
    if (weight[1] != in_channels) throw nb::value_error("the weight is for another number of input channels");
    // Absurd sizes would overflow the kernels' ints; each phase of the stride has lists of its own.
    const auto far = [](int64_t size) { return size > 1 << 24; };
    if (far(padding_height) || far(padding_width) || far(int64_t{dilation_height} * kernel_height) ||
        far(int64_t{dilation_width} * kernel_width))
      throw nb::value_error("a padding or kernel of more than 2^24");
    if (int64_t{stride_height} * stride_width > 1 << 20) throw nb::value_error("a stride of more than 2^20 positions");
    const auto outputs = [](int64_t in, int64_t kernel, int64_t step, int64_t pad, int64_t spread) {
      return in + 2 * pad - spread * (kernel - 1) - 1 < 0 ? 0 : (in + 2 * pad - spread * (kernel - 1) - 1) / step + 1;
    };
    const int64_t height = outputs(in_height, kernel_height, stride_height, padding_height, dilation_height);
    const int64_t width = outputs(in_width, kernel_width, stride_width, padding_width, dilation_width);
    if (height < 1 || width < 1) throw nb::value_error("the kernel is larger than the padded input");
    if (height > (1 << 24) || width > (1 << 24)) throw nb::value_error("an output side of more than 2^24");
    out_height = static_cast<int>(height), out_width = static_cast<int>(width);
  }
};

// A convolution of one training step, between its forward and its backward pass.
struct Sparse {
  Shape geometry;
  std::unique_ptr<PackedWeight> weight;  // or
  std::unique_ptr<LinearWeight> linear;
  std::unique_ptr<PackedInput> input;  // null if no gradient of the weight is wanted
};

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a graph that is alive when Python ends is no error
  kernels = supported().back();
  const auto release = nb::call_guard<nb::gil_scoped_release>();

  m.def(
      "empty",
      [](const std::vector<size_t>& shape) {
        size_t bytes = sizeof(float);
        for (size_t size : shape)
          if (__builtin_mul_overflow(bytes, size, &bytes)) throw nb::value_error("the shape is too large");
        void* memory = pool_allocate(bytes);
        nb::capsule owner(memory, [](void* p) noexcept { pool_free(p); });
        return nb::ndarray<nb::pytorch, float, nb::c_contig, nb::device::cpu>(memory, shape.size(), shape.data(), owner);
      },
      "shape"_a);
  m.def("use_openmp_of", &use_openmp_of, "path"_a);
  m.def("sources", [] { return SOURCES_SHA256; });
  m.def("isa", [] { return kernels->name; });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* set : supported()) names.push_back(set->name);
    return names;
  });
  m.def(
      "set_isa",
      [](const std::string& name) {
        for (const Kernels* set : supported())
          if (name == set->name) {
            kernels = set;
            return;
          }
        throw nb::value_error(("this processor has no " + name).c_str());
      },
      "name"_a);

  m.def("seconds", [] {
    std::map<std::string, double> seconds;
    const char* names[] = {"top_k", "packing", "forward", "grad_input", "grad_weight", "normalisation"};
    for (int part = 0; part < PARTS; ++part) seconds[names[part]] = spent_nanoseconds[part].exchange(0) * 1e-9;
    seconds["packing"] -= seconds["top_k"];  // which is part of it
    return seconds;
  });

  m.def(
      "top_k_threshold",
      [](AnyFloats x, int64_t k, int threads) {
        check(k, x.size());
        return top_k_threshold(*kernels, threads, x.data(), x.size(), k);
      },
      "x"_a, "k"_a, "threads"_a, release);

  nb::class_<Shape>(m, "Geometry")
      .def(nb::init<const std::vector<int>&, const std::vector<int>&, const std::vector<int>&, const std::vector<int>&,
                    const std::vector<int>&>(),
           "input"_a, "weight"_a, "stride"_a, "padding"_a, "dilation"_a)
      .def_prop_ro("output",
                   [](const Shape& s) { return nb::make_tuple(s.out_channels, s.out_height, s.out_width, s.batch); });

  nb::class_<Sparse>(m, "Convolution")
      .def(
          "__init__",
          [](Sparse* self, const Shape& s, ConstFloats<4> input, ConstFloats<4> weight, std::optional<ConstFloats<1>> bias,
             Floats<4> output, std::tuple<int64_t, float, bool> weight_choice,
             std::optional<std::tuple<int64_t, float, bool>> input_choice, bool for_grad_input, int threads) {
            threads = sensible(threads);
            expect(input, {s.in_channels, s.in_height, s.in_width, s.batch}, "input");
            expect(weight, {s.out_channels, s.in_channels, s.kernel_height, s.kernel_width}, "weight");
            expect(output, {s.out_channels, s.out_height, s.out_width, s.batch}, "output");
            if (bias) expect(*bias, {s.out_channels}, "bias");
            const auto checked = [](const std::tuple<int64_t, float, bool>& c, int64_t entries) {
              check(std::get<0>(c), entries);
              return Choice{std::get<0>(c), std::get<1>(c), std::get<2>(c)};
            };
            const Choice of_weight = checked(weight_choice, weight.size());
            std::optional<Choice> of_input;
            if (input_choice) of_input = checked(*input_choice, input.size());
            new (self) Sparse{s, nullptr, nullptr, nullptr};
            try {
              const Stopwatch stopwatch(PACKING);
              if (is_small_linear(s))
                self->linear = std::make_unique<LinearWeight>(*kernels, threads, s, weight.data(), of_weight);
              else
                self->weight = std::make_unique<PackedWeight>(*kernels, threads, s, weight.data(), of_weight, for_grad_input);
              if (of_input) self->input = std::make_unique<PackedInput>(*kernels, threads, s, input.data(), *of_input);
            } catch (...) {
              self->~Sparse();
              throw;
            }
            const Stopwatch stopwatch(FORWARD);
            if (self->linear) return self->linear->forward(threads, input.data(), pointer(bias), output.data());
            Lists& forward = self->weight->forward;
            forward.run(self->weight->kernels, threads, input.data(), pointer(bias), nullptr, output.data());
            forward = {};  // it has served; the backward pass needs the other
          },
          "geometry"_a, "input"_a, "weight"_a, "bias"_a.none(), "output"_a,
          "weight_choice"_a, "input_choice"_a.none(), "for_grad_input"_a, "threads"_a, release)
      .def_prop_ro("weight_threshold", [](const Sparse& self) { return self.linear ? self.linear->threshold : self.weight->threshold; })
      .def_prop_ro("active_weights",
                   [](const Sparse& self) { return self.linear ? self.linear->active_weights : self.weight->active_weights; })
      .def_prop_ro("input_threshold",
                   [](const Sparse& self) {
                     return self.input ? std::optional<float>(self.input->threshold) : std::nullopt;
                   })
      .def(
          "backward",
          [](const Sparse& self, ConstFloats<4> grad_output, std::optional<ConstFloats<4>> addend,
             std::optional<Floats<4>> grad_input, std::optional<Floats<4>> grad_weight, int threads) {
            const Geometry& s = self.geometry;
            threads = sensible(threads);
            expect(grad_output, {s.out_channels, s.out_height, s.out_width, s.batch}, "grad_output");
            if (grad_input && self.linear) {
              expect(*grad_input, {s.in_channels, 1, 1, s.batch}, "grad_input");
              if (addend) expect(*addend, {s.in_channels, 1, 1, s.batch}, "addend");
              const Stopwatch stopwatch(GRAD_INPUT);
              self.linear->grad_input(threads, grad_output.data(), pointer(addend), grad_input->data());
            } else if (grad_input) {
              const Lists& backward = self.weight->backward;
              expect(*grad_input, {s.in_channels, s.in_height, s.in_width, s.batch}, "grad_input");
              if (backward.phases.empty()) throw nb::value_error("the weight was packed without for_grad_input");
              const Convolution& phase = backward.phases[0];
              if (addend) expect(*addend, {s.in_channels, phase.out_height, phase.out_width, s.batch}, "addend");
              const Stopwatch stopwatch(GRAD_INPUT);
              backward.run(self.weight->kernels, threads, grad_output.data(), nullptr, pointer(addend), grad_input->data());
            }
            if (grad_weight) {
              expect(*grad_weight, {s.out_channels, s.in_channels, s.kernel_height, s.kernel_width}, "grad_weight");
              if (!self.input) throw nb::value_error("the input was not packed");
              const Stopwatch stopwatch(GRAD_WEIGHT);
              self.input->grad_weight(threads, grad_output.data(), grad_weight->data());
            }
          },
          "grad_output"_a, "addend"_a.none(), "grad_input"_a.none(),
          "grad_weight"_a.none(), "threads"_a, release);

  m.def(
      "batch_norm",
      [](ConstFloats<4> x, bool of_batch, Floats<1> mean, Floats<1> variance, std::optional<Floats<1>> running_mean,
         std::optional<Floats<1>> running_variance, float momentum, float epsilon,
         std::optional<ConstFloats<1>> weight, std::optional<ConstFloats<1>> bias, std::optional<ConstFloats<4>> residual,
         bool relu, Floats<4> y, std::optional<Bytes> positive, int threads) {
        const int64_t channels = channels_of(x), count = x.size() / channels;
        expect(mean, {channels}, "mean");
        expect(variance, {channels}, "variance");
        if (running_mean) expect(*running_mean, {channels}, "running_mean");
        if (running_variance) expect(*running_variance, {channels}, "running_variance");
        if (running_mean && !running_variance) throw nb::value_error("running_mean and running_variance belong together");
        if (weight) expect(*weight, {channels}, "weight");
        if (bias) expect(*bias, {channels}, "bias");
        const auto shape = {channels, x.shape(1), x.shape(2), x.shape(3)};
        expect(y, shape, "y");
        if (residual) expect(*residual, shape, "residual");
        if (positive) expect(*positive, {channels, (count + 7) / 8}, "positive");
        const Stopwatch stopwatch(NORMALISATION);
        batch_norm(*kernels, threads, x.data(), static_cast<int>(channels), count, of_batch, mean.data(), variance.data(),
                   pointer(running_mean), pointer(running_variance), momentum, epsilon,
                   pointer(weight), pointer(bias), pointer(residual), relu, y.data(), pointer(positive));
      },
      "x"_a, "of_batch"_a, "mean"_a, "variance"_a, "running_mean"_a.none(), "running_variance"_a.none(), "momentum"_a,
      "epsilon"_a, "weight"_a.none(), "bias"_a.none(), "residual"_a.none(), "relu"_a, "y"_a,
      "positive"_a.none(), "threads"_a, release);
  m.def(
      "batch_norm_backward",
      [](ConstFloats<4> grad_y, ConstFloats<4> x, std::optional<ConstBytes> positive, ConstFloats<1> mean,
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
        batch_norm_backward(*kernels, threads, grad_y.data(), x.data(), pointer(positive), static_cast<int>(channels),
                            count, mean.data(), variance.data(), epsilon, pointer(weight), grad_x.data(),
                            grad_weight.data(), grad_bias.data(), pointer(grad_residual));
      },
      "grad_y"_a, "x"_a, "positive"_a.none(), "mean"_a,
      "variance"_a, "epsilon"_a, "weight"_a.none(), "grad_x"_a,
      "grad_weight"_a, "grad_bias"_a, "grad_residual"_a.none(), "threads"_a, release);

  m.def(
      "max_pool",
      [](ConstFloats<4> x, int size, bool relu, Floats<4> y, Bytes place, int threads) {
        const int channels = (int)x.shape(0), height = (int)x.shape(1), width = (int)x.shape(2), batch = (int)x.shape(3);
        if (size < 1 || size > 15) throw nb::value_error("size has to be 1 to 15");
        expect(y, {channels, height / size, width / size, batch}, "y");
        expect(place, {channels, height / size, width / size, batch}, "place");
        if (channels < 1) throw nb::value_error("no channels");
        const int64_t count = x.size() / channels, pooled = y.size() / channels;
        parallel(threads, channels, [&](int64_t c) {
          kernels->max_pool(x.data() + c * count, height, width, batch, size, relu, y.data() + c * pooled,
                            place.data() + c * pooled);
        });
      },
      "x"_a, "size"_a, "relu"_a, "y"_a, "place"_a, "threads"_a, release);
  m.def(
      "max_pool_backward",
      [](ConstFloats<4> grad_y, ConstBytes place, int size, Floats<4> grad_x, int threads) {
        const int channels = (int)grad_x.shape(0), height = (int)grad_x.shape(1), width = (int)grad_x.shape(2);
        const int batch = (int)grad_x.shape(3);
        if (size < 1 || size > 15) throw nb::value_error("size has to be 1 to 15");
        expect(grad_y, {channels, height / size, width / size, batch}, "grad_y");
        expect(place, {channels, height / size, width / size, batch}, "place");
        if (channels < 1) throw nb::value_error("no channels");
        const int64_t count = grad_x.size() / channels, pooled = grad_y.size() / channels;
        parallel(threads, channels, [&](int64_t c) {
          kernels->max_pool_gradient(grad_y.data() + c * pooled, place.data() + c * pooled, height, width, batch, size,
                                     grad_x.data() + c * count);
        });
      },
      "grad_y"_a, "place"_a, "size"_a, "grad_x"_a, "threads"_a, release);

  m.def(
      "ans_decode",
      [](Numbers<const uint32_t> cumulative, Numbers<const uint32_t> words, Numbers<uint8_t> bytes) {
        return ans_decode(checked(cumulative), words.data(), static_cast<int64_t>(words.shape(0)), bytes.data(),
                          static_cast<int64_t>(bytes.shape(0)));
      },
      "cumulative"_a.noconvert(), "words"_a.noconvert(), "bytes"_a.noconvert(), release);
  m.def(
      "active_bits",
      [](ConstFloats<1> x, ConstFloats<1> by, float threshold, Bytes bits) {
        expect(by, {x.size()}, "by");
        expect(bits, {(x.size() + 7) / 8}, "bits");
        return kernels->active_bits(x.data(), by.data(), threshold, x.size(), bits.data());
      },
      "x"_a, "by"_a, "threshold"_a, "bits"_a, release);
  m.def(
      "take_bits",
      [](ConstFloats<1> x, ConstBytes bits, Floats<1> values) {
        expect(bits, {(x.size() + 7) / 8}, "bits");
        if (count_bits(bits.data(), x.size()) != values.size())
          throw nb::value_error("values does not have an entry for each bit, or there is a bit behind the last entry");
        take_bits(x.data(), bits.data(), x.size(), values.data(), values.size());
      },
      "x"_a, "bits"_a, "values"_a, release);
  m.def(
      "split_planes",
      [](Numbers<const uint32_t> numbers, Numbers<uint8_t> planes) {
        expect_planes(planes.shape(0), numbers.shape(0));
        split_planes(numbers.data(), static_cast<int64_t>(numbers.shape(0)), planes.data());
      },
      "numbers"_a.noconvert(), "planes"_a.noconvert(), release);
  m.def(
      "merge_planes",
      [](Numbers<const uint8_t> planes, Numbers<uint32_t> numbers) {
        expect_planes(planes.shape(0), numbers.shape(0));
        merge_planes(planes.data(), static_cast<int64_t>(numbers.shape(0)), numbers.data());
      },
      "planes"_a.noconvert(), "numbers"_a.noconvert(), release);
}

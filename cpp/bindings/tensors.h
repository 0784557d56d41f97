// Tensors that Python gives: contiguous float32 or bytes on the CPU; the types refuse all others and never convert.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>

#include "kernels/kernels.h"

namespace zerofl {

namespace nb = nanobind;
using namespace nb::literals;

// A torch tensor on the CPU: contiguous, of this type (void: float32 or 16 bits wide) and number of dimensions (any, if 0).
template <class T, int Dimensions>
struct Tensor {
  T* memory = nullptr;
  int dimensions = 0;
  int64_t sizes[4] = {};

  Storage storage = FLOAT32;  // of numbers whose type is not said

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
  nb::object tensor, float32, float16, bfloat16, uint8;
  nb::object dtype = nb::str("dtype"), is_cpu = nb::str("is_cpu"), is_contiguous = nb::str("is_contiguous"),
             shape = nb::str("shape"), data_ptr = nb::str("data_ptr");

  Torch() {
    const nb::module_ torch = nb::module_::import_("torch");
    tensor = torch.attr("Tensor"), float32 = torch.attr("float32"), float16 = torch.attr("float16"),
    bfloat16 = torch.attr("bfloat16"), uint8 = torch.attr("uint8");
  }
};

inline const Torch& torch() {
  static const Torch* torch = new Torch;  // never destroyed: Python may end before
  return *torch;
}

}  // namespace zerofl

// Tensors come by their own attributes: DLPack would take ten times as long, 400 times a training step.
namespace nanobind::detail {

template <class T, int Dimensions>
struct type_caster<zerofl::Tensor<T, Dimensions>> {
  using Type = zerofl::Tensor<T, Dimensions>;
  NB_TYPE_CASTER(Type, const_name("torch.Tensor"))

  bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
    try {
      const zerofl::Torch& names = zerofl::torch();
      if (!isinstance(source, names.tensor)) return false;
      const object dtype = getattr(source, names.dtype);
      if (std::is_void_v<std::remove_const_t<T>>)
        value.storage = dtype.is(names.float16)    ? zerofl::FLOAT16
                        : dtype.is(names.bfloat16) ? zerofl::BFLOAT16
                                                   : zerofl::FLOAT32;
      const bool is_float = !std::is_same_v<std::remove_const_t<T>, uint8_t>;
      if (!(value.storage != zerofl::FLOAT32 || dtype.is(is_float ? names.float32 : names.uint8)) ||
          !cast<bool>(getattr(source, names.is_cpu)) || !cast<bool>(getattr(source, names.is_contiguous)()))
        return false;
      const object shape = getattr(source, names.shape);
      value.dimensions = static_cast<int>(len(shape));
      if (value.dimensions > 4 || (Dimensions && value.dimensions != Dimensions)) return false;
      for (int i = 0; i < value.dimensions; ++i) value.sizes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.memory = reinterpret_cast<T*>(cast<uintptr_t>(getattr(source, names.data_ptr)()));
      return true;
    } catch (...) {  // a tensor without memory, such as a fake one
      PyErr_Clear();
      return false;
    }
  }
};

}  // namespace nanobind::detail

namespace zerofl {

template <int Dimensions>
using Floats = Tensor<float, Dimensions>;
template <int Dimensions>
using ConstFloats = Tensor<const float, Dimensions>;
// float32, float16 or bfloat16
using Stored = Tensor<const void, 4>;
using AnyFloats = Tensor<const float, 0>;
using Bytes = Tensor<uint8_t, 0>;
using ConstBytes = Tensor<const uint8_t, 0>;

template <class AnyTensor>
auto pointer(const std::optional<AnyTensor>& tensor) {
  return tensor ? tensor->data() : nullptr;
}

template <class AnyTensor>
void expect(const AnyTensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  int i = 0;
  bool same = tensor.dimensions == static_cast<int>(shape.size());
  for (int64_t size : shape) same = same && tensor.shape(i++) == size;
  if (!same)
    throw nb::value_error((std::string(name) + " does not have the shape that the other arguments give it").c_str());
}

// The work is cut with a thought to the number of threads, which may be anything.
inline int sensible(int threads) { return std::clamp(threads, 1, 1024); }

// The instruction set in use.
extern const Kernels* kernels;

// What each file of this folder adds to the module.
void bind_convolution(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_batch_norm(nb::module_& m);
void bind_conv_norm(nb::module_& m);
void bind_pooling(nb::module_& m);
void bind_codec(nb::module_& m);

}  // namespace zerofl

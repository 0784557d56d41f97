// The module zerofl._native. Every tensor is a contiguous float32 one on the CPU, batch innermost: [channels, height,
// width, batch]. Its users in Python make them and allocate the results.

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bindings/tensors.h"
#include "runtime/clock.h"
#include "runtime/memory.h"
#include "runtime/threads.h"

namespace zerofl {

const Kernels* kernels = &kernels_baseline;

namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> sets = {&kernels_baseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("f16c"))
    sets.push_back(&kernels_avx2);
  if (sets.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    sets.push_back(&kernels_avx512);
#endif
  return sets;
}

}  // namespace
}  // namespace zerofl

using namespace zerofl;

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a graph that is alive when Python ends is no error
  kernels = supported().back();

  m.def(
      "empty",
      [](const std::vector<size_t>& shape) {
        size_t bytes = sizeof(float);
        for (size_t size : shape)
          if (__builtin_mul_overflow(bytes, size, &bytes)) throw nb::value_error("the shape is too large");
        void* memory = pool_allocate(bytes);
        nb::capsule owner(memory, [](void* p) noexcept { pool_free(p); });
        return nb::ndarray<nb::pytorch, float, nb::c_contig, nb::device::cpu>(memory, shape.size(), shape.data(),
                                                                              owner);
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
    double seconds[PARTS];
    for (int part = 0; part < PARTS; ++part) seconds[part] = spent_nanoseconds[part].exchange(0) * 1e-9;
    seconds[PACKING] -= seconds[TOP_K];  // which is part of it
    nb::dict by_name;
    for (int part = 0; part < PARTS; ++part) by_name[PART_NAMES[part]] = seconds[part];
    return by_name;
  });

  bind_convolution(m);
  bind_linear(m);
  bind_batch_norm(m);
  bind_conv_norm(m);
  bind_pooling(m);
  bind_codec(m);
}

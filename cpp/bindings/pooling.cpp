#include "bindings/tensors.h"
#include "runtime/threads.h"

namespace zerofl {

void bind_pooling(nb::module_& m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  m.def(
      "max_pool",
      [](ConstFloats<4> x, int size, bool relu, Floats<4> y, Bytes place, int threads) {
        const int channels = (int)x.shape(0), height = (int)x.shape(1), width = (int)x.shape(2),
                  batch = (int)x.shape(3);
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
}

}  // namespace zerofl

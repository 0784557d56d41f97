// One convolution of ResNet-18's second stage at 95 %, forward, grad_input or grad_weight, again and again: an emulator
// counts its instructions (benchmarks/aarch64.py).
//
//   aarch64 forward|grad_input|grad_weight TIMES     prints the multiply-adds of each time

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ops/packing.h"

using namespace zerofl;

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const Kernels& kernels = zerofl::KERNELS;
  Geometry g{};
  g.batch = 32, g.in_channels = g.out_channels = 128, g.in_height = g.in_width = g.out_height = g.out_width = 16;
  g.kernel_height = g.kernel_width = 3, g.padding_height = g.padding_width = 1;
  g.stride_height = g.stride_width = g.dilation_height = g.dilation_width = 1;
  const int64_t images = int64_t{16} * 16 * 32, weights = int64_t{128} * 128 * 9;
  // Every twentieth entry is large, at a place that nothing tells beforehand.
  const auto sparse = [](int64_t size) {
    std::vector<float> values(size, 0.01f);
    uint64_t state = 1;
    for (int64_t i = 0; i < size; i += 20) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      values[i + (state >> 33) % 20 % (size - i)] = 1 + static_cast<float>(state >> 40);
    }
    return values;
  };
  const std::vector<float> x = sparse(128 * images), w = sparse(weights), dy(128 * images, 1.0f);
  std::vector<float> result(128 * images), gradient(weights);
  const PackedWeight weight(kernels, 1, g, w.data(), TopK{weights / 20, 0}, true);
  const PackedInput input(kernels, 1, g, x.data(), TopK{128 * images / 20, 0});
  for (int i = 0; i < std::atoi(arguments[2]); ++i) {
    if (!std::strcmp(arguments[1], "forward"))
      weight.forward.run(kernels, 1, x.data(), nullptr, nullptr, result.data());
    else if (!std::strcmp(arguments[1], "grad_input"))
      weight.backward.run(kernels, 1, dy.data(), nullptr, nullptr, result.data());
    else
      input.grad_weight(1, dy.data(), Target{gradient.data(), nullptr, nullptr, 0, 0, 0});
  }
  std::printf("%lld\n", static_cast<long long>(weights / 20 * images));
}

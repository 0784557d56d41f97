// A convolution's sizes, and which of its kernel's taps meet which positions of its input.
#pragma once

#include <algorithm>
#include <cstdint>

namespace zerofl {

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// A 2-D convolution as PyTorch describes it.
struct Geometry {
  int batch, in_channels, in_height, in_width, out_channels, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
  int dilation_height, dilation_width;

  int taps() const { return kernel_height * kernel_width; }
  // A linear layer's: one tap, one position.
  bool is_linear() const { return taps() == 1 && in_height == 1 && in_width == 1 && out_height == 1 && out_width == 1; }
};

// The taps of one dimension that meet the positions of one phase of the stride: `first`, `first + step`, ...; the first
// meets output position / stride + shift, each further one `distance` less.
struct Taps {
  int first = 0, count = 0, step = 1, shift = 0, distance = 0;

  int extent() const { return std::max(count - 1, 0) * distance + 1; }
};

inline Taps taps_of_phase(int phase, int kernel, int stride, int padding, int dilation) {
  Taps taps;
  for (int tap = 0; tap < kernel; ++tap)
    if ((phase + padding - tap * dilation) % stride == 0) {
      if (!taps.count) taps.first = tap, taps.shift = (phase + padding - tap * dilation) / stride;
      if (taps.count == 1) taps.step = tap - taps.first;
      ++taps.count;
    }
  taps.distance = taps.step * dilation / stride;
  return taps;
}

}  // namespace zerofl

// Maximum over squares that do not overlap, of one channel.

#include "kernels.h"
#include "simd.h"

namespace zerofl::ISA {
namespace {

constexpr int IMAGES = 64;  // at a time

}  // namespace

void max_pool(const float* x, int height, int width, int batch, int size, bool relu, float* y, uint8_t* place) {
  for (int row = 0; row + size <= height; row += size)
    for (int column = 0; column + size <= width; column += size)
      for (int image = 0; image < batch; image += IMAGES, y += IMAGES, place += IMAGES) {
        const int count = batch - image < IMAGES ? batch - image : IMAGES;
        float best[IMAGES];
        int32_t at[IMAGES];
        for (int i = 0; i < count; ++i) best[i] = relu ? 0.0f : -__builtin_inff(), at[i] = relu ? NOWHERE : 0;
        for (int p = 0; p < size; ++p)
          for (int q = 0; q < size; ++q) {
            const float* from = x + ((int64_t)(row + p) * width + column + q) * batch + image;
            for (int i = 0; i < count; ++i) {
              // True for NaN too, but once a NaN is the best, nothing is better.
              const bool better = !(from[i] <= best[i]) && best[i] == best[i];
              best[i] = better ? from[i] : best[i];
              at[i] = better ? p * size + q : at[i];
            }
          }
        for (int i = 0; i < count; ++i) y[i] = best[i], place[i] = (uint8_t)at[i];
        if (count < IMAGES) {  // the next position follows directly
          y -= IMAGES - count, place -= IMAGES - count;
        }
      }
}

void max_pool_gradient(const float* grad_y, const uint8_t* place, int height, int width, int batch, int size,
                       float* grad_x) {
  const int rows = height / size * size, columns = width / size * size;
  for (int row = 0; row < height; ++row)
    for (int column = 0; column < width; ++column) {
      float* to = grad_x + ((int64_t)row * width + column) * batch;
      if (row >= rows || column >= columns) {
        memset(to, 0, batch * sizeof(float));
        continue;
      }
      const int64_t from = ((int64_t)(row / size) * (width / size) + column / size) * batch;
      const int mine = row % size * size + column % size;
      for (int i = 0; i < batch; ++i) to[i] = place[from + i] == mine ? grad_y[from + i] : 0.0f;
    }
}

}  // namespace zerofl::ISA

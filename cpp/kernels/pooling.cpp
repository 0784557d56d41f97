// Maximum over squares that do not overlap, of one channel.

#include "kernels.h"
#include "simd.h"

namespace zerofl::ISA {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

// The largest of a square and its place, for the images of a vector (or for one). Comparisons are true for NaN too, but
// once a NaN is the best, nothing is better.
INLINE void max_of_images(const float* from, int64_t row_floats, int batch, int size, bool relu, float* y,
                          uint8_t* place) {
  Vec best = broadcast(relu ? 0.0f : -__builtin_inff());
  VecInt at = VecInt{} + (relu ? NOWHERE : 0);
  for (int p = 0; p < size; ++p)
    for (int q = 0; q < size; ++q) {
      const Vec x = load(from + p * row_floats + q * batch);
      const VecInt better = ~(x <= best) & (best == best);
      best = better ? x : best;
      at = better ? VecInt{} + (p * size + q) : at;
    }
  store(y, best);
  const Bytes places = __builtin_convertvector(at, Bytes);
  memcpy(place, &places, LANES);
}

INLINE void max_of_image(const float* from, int64_t row_floats, int batch, int size, bool relu, float* y,
                         uint8_t* place) {
  float best = relu ? 0.0f : -__builtin_inff();
  int at = relu ? NOWHERE : 0;
  for (int p = 0; p < size; ++p)
    for (int q = 0; q < size; ++q) {
      const float x = from[p * row_floats + q * batch];
      const bool better = !(x <= best) && best == best;
      best = better ? x : best;
      at = better ? p * size + q : at;
    }
  *y = best, *place = (uint8_t)at;
}

}  // namespace

void max_pool(const float* x, int height, int width, int batch, int size, bool relu, float* y, uint8_t* place) {
  const int64_t row_floats = (int64_t)width * batch;
  for (int row = 0; row + size <= height; row += size)
    for (int column = 0; column + size <= width; column += size, y += batch, place += batch) {
      const float* from = x + row * row_floats + (int64_t)column * batch;
      int image = 0;
      for (; image + LANES <= batch; image += LANES)
        max_of_images(from + image, row_floats, batch, size, relu, y + image, place + image);
      if (image < batch && batch >= LANES) {  // the last vector overlaps with the one before
        image = batch - LANES;
        max_of_images(from + image, row_floats, batch, size, relu, y + image, place + image);
        image = batch;
      }
      for (; image < batch; ++image)
        max_of_image(from + image, row_floats, batch, size, relu, y + image, place + image);
    }
}

void max_pool_gradient(const float* grad_y, const uint8_t* place, int height, int width, int batch, int size,
                       float* grad_x) {
  const int64_t row_floats = (int64_t)width * batch;
  const int rows = height / size, columns = width / size;
  if (!row_floats) return;
  for (int row = 0; row < rows; ++row) {
    float* to = grad_x + row * size * row_floats;
    for (int column = 0; column < columns; ++column, grad_y += batch, place += batch, to += (int64_t)size * batch) {
      int image = 0;
      while (image < batch && batch >= LANES) {
        if (image + LANES > batch) image = batch - LANES;
        Bytes places;
        memcpy(&places, place + image, LANES);
        const VecInt at = __builtin_convertvector(places, VecInt);
        const Vec gradient = load(grad_y + image);
        for (int p = 0; p < size; ++p)
          for (int q = 0; q < size; ++q)
            store(to + p * row_floats + q * batch + image, at == p * size + q ? gradient : Vec{});
        image += LANES;
      }
      for (; image < batch; ++image)
        for (int p = 0; p < size; ++p)
          for (int q = 0; q < size; ++q)
            to[p * row_floats + q * batch + image] = place[image] == p * size + q ? grad_y[image] : 0.0f;
    }
    for (int p = 0; p < size; ++p)  // what no square reaches
      memset(grad_x + (row * size + p) * row_floats + (int64_t)columns * size * batch, 0,
             (row_floats - (int64_t)columns * size * batch) * sizeof(float));
  }
  if (height > rows * size)
    memset(grad_x + rows * size * row_floats, 0, (height - rows * size) * row_floats * sizeof(float));
}

}  // namespace zerofl::ISA

// A linear layer on a small batch: one output channel at a time, its sums or its output gradient in registers.

#include "kernels.h"
#include "simd.h"

namespace zerofl::ISA {
namespace {

constexpr int MOST = 8;  // vectors of a row that are taken together

// An addition takes about four cycles and two start in each, so eight sums have to be under way.
template <int VECTORS>
void add_products(const uint32_t* index, const float* value, int64_t count, uint32_t first, const float* x, int64_t row,
                  float start, float* y) {
  constexpr int CHAINS = VECTORS >= MOST ? 1 : VECTORS > 2 ? 2 : VECTORS > 1 ? 4 : 8;
  Vec sum[CHAINS][VECTORS] = {};
  for (int v = 0; v < VECTORS; ++v) sum[0][v] = broadcast(start);
  int64_t i = 0;
  for (; i + CHAINS <= count; i += CHAINS)
    for (int c = 0; c < CHAINS; ++c) {
      const float* at = x + (int64_t)(index[i + c] - first) * row;
      const Vec weight = broadcast(value[i + c]);
      for (int v = 0; v < VECTORS; ++v) sum[c][v] += weight * load(at + v * LANES);
    }
  for (; i < count; ++i) {
    const float* at = x + (int64_t)(index[i] - first) * row;
    for (int v = 0; v < VECTORS; ++v) sum[0][v] += broadcast(value[i]) * load(at + v * LANES);
  }
  for (int c = 1; c < CHAINS; ++c)
    for (int v = 0; v < VECTORS; ++v) sum[0][v] += sum[c][v];
  for (int v = 0; v < VECTORS; ++v) store(y + v * LANES, sum[0][v]);
}

template <int VECTORS>
void add_to_rows(const uint32_t* index, const float* value, int64_t count, uint32_t first, const float* dy, int64_t row,
                 float* dx) {
  Vec gradient[VECTORS];
  for (int v = 0; v < VECTORS; ++v) gradient[v] = load(dy + v * LANES);
  for (int64_t i = 0; i < count; ++i) {
    float* at = dx + (int64_t)(index[i] - first) * row;
    const Vec weight = broadcast(value[i]);
    for (int v = 0; v < VECTORS; ++v) store(at + v * LANES, load(at + v * LANES) + weight * gradient[v]);
  }
}

using AddProducts = void (*)(const uint32_t*, const float*, int64_t, uint32_t, const float*, int64_t, float, float*);
using AddToRows = void (*)(const uint32_t*, const float*, int64_t, uint32_t, const float*, int64_t, float*);
const AddProducts ADD_PRODUCTS[MOST] = {add_products<1>, add_products<2>, add_products<3>, add_products<4>,
                                        add_products<5>, add_products<6>, add_products<7>, add_products<8>};
const AddToRows ADD_TO_ROWS[MOST] = {add_to_rows<1>, add_to_rows<2>, add_to_rows<3>, add_to_rows<4>,
                                     add_to_rows<5>, add_to_rows<6>, add_to_rows<7>, add_to_rows<8>};

}  // namespace

void linear_forward(const uint32_t* index, const float* value, int64_t count, uint32_t first, const float* x,
                    int vectors, float start, float* y) {
  const int64_t row = (int64_t)vectors * LANES;
  for (; vectors > 0; vectors -= MOST, x += MOST * LANES, y += MOST * LANES)
    ADD_PRODUCTS[(vectors < MOST ? vectors : MOST) - 1](index, value, count, first, x, row, start, y);
}

void linear_grad_input(const uint32_t* index, const float* value, int64_t count, uint32_t first, const float* dy,
                       int vectors, float* dx) {
  const int64_t row = (int64_t)vectors * LANES;
  for (; vectors > 0; vectors -= MOST, dy += MOST * LANES, dx += MOST * LANES)
    ADD_TO_ROWS[(vectors < MOST ? vectors : MOST) - 1](index, value, count, first, dy, row, dx);
}

}  // namespace zerofl::ISA

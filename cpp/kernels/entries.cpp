// The entries that have a bit in a bitmap: taken out, and added to. A byte's first entry is its highest bit.

#include "kernels.h"
#include "simd.h"

namespace zerofl::ISA {
namespace {

constexpr int BITS = 32;  // entries whose bits are read at once
constexpr uint32_t VECTOR = (1u << LANES) - 1;

INLINE uint32_t mask_of(const uint8_t* bytes) {
  uint32_t mask = 0;
  for (int byte = 0; byte < BITS / 8; ++byte) mask |= (uint32_t)bytes[byte] << 8 * byte;
  return mirrored(mask);
}

}  // namespace

// Whole vectors are read and written, so that the last ones of the values are left to the loops over bytes.

void take_bits(const float* x, const uint8_t* bitmap, int64_t count, float* values, int64_t found) {
  int64_t i = 0, n = 0;
  for (; i + BITS <= count && n + BITS + LANES <= found; i += BITS, bitmap += BITS / 8) {
    const uint32_t mask = mask_of(bitmap);
    prefetch_ahead(x + i), prefetch_ahead(x + i + BITS / 2);
    for (int v = 0; v < BITS; v += LANES) n += compress(load(x + i + v), mask >> v & VECTOR, values + n);
  }
  for (; i < count; i += 8)
    for (unsigned byte = *bitmap++; byte;) {
      const int k = __builtin_clz(byte) - 24;  // the byte's first bit
      values[n++] = x[i + k];
      byte &= ~(0x80u >> k);
    }
}

void add_entries(float* x, const uint8_t* bitmap, int64_t count, const float* values, int64_t found, float weight) {
  int64_t i = 0, n = 0;
  const Vec weights = broadcast(weight);
  for (; i + BITS <= count && n + BITS + LANES <= found; i += BITS, bitmap += BITS / 8) {
    const uint32_t mask = mask_of(bitmap);
    prefetch_ahead(x + i), prefetch_ahead(x + i + BITS / 2);
    for (int v = 0; v < BITS; v += LANES) {
      const uint32_t of_vector = mask >> v & VECTOR;
      const VecInt has = lanes(of_vector);
      const Vec before = load(x + i + v), sum = before + rounded(expand(values + n, of_vector) * weights);
      store(x + i + v, (Vec)(((VecInt)sum & has) | ((VecInt)before & ~has)));
      n += __builtin_popcount(of_vector);
    }
  }
  for (; i < count; i += 8)
    for (unsigned byte = *bitmap++; byte;) {
      const int k = __builtin_clz(byte) - 24;
      x[i + k] += rounded(values[n++] * weight);
      byte &= ~(0x80u >> k);
    }
}

}  // namespace zerofl::ISA

// One pass over a tensor: which entries are active, and which are above, within and below a bracket.

#include "kernels.h"
#include "simd.h"

namespace zerofl::ISA {
namespace {

constexpr int BITS = 32;  // entries whose comparisons make one mask

INLINE float smallest_above_zero() {
  const uint32_t bits = 1;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace

int64_t find_active(const float* x, int64_t count, uint32_t first, float threshold, uint32_t* indices, float* values) {
  int64_t found = 0, i = 0;
  // Comparisons with NaN are false, so NaN is active; with a threshold of 0 so is all that is not zero.
  if (threshold == 0) threshold = smallest_above_zero();
  const Vec limit = broadcast(threshold);
  for (; i + BITS <= count; i += BITS) {
    prefetch_ahead(x + i), prefetch_ahead(x + i + BITS / 2);
    for (int v = 0; v < BITS; v += LANES) {
      const Vec value = load(x + i + v);
      // Without a branch, which would be mispredicted as often as the number of active entries varies.
      found += compress(value, NUMBERS + (int32_t)(first + i + v), bits(~(magnitude(value) < limit)), values + found,
                        indices + found);
    }
  }
  for (; i < count; ++i)
    if (!(__builtin_fabsf(x[i]) < threshold)) {
      indices[found] = first + (uint32_t)i;
      values[found++] = x[i];
    }
  return found;
}

int64_t drop_below(int64_t count, float threshold, uint32_t* indices, float* values) {
  int64_t kept = 0, i = 0;
  const Vec limit = broadcast(threshold);
  for (; i + LANES <= count; i += LANES) {  // what a vector overwrites has been read
    const Vec value = load(values + i);
    const VecInt index = load_ints(indices + i);
    kept += compress(value, index, bits(~(magnitude(value) < limit)), values + kept, indices + kept);
  }
  for (; i < count; ++i) {
    const float value = values[i];
    indices[kept] = indices[i], values[kept] = value;
    kept += !(__builtin_fabsf(value) < threshold);
  }
  return kept;
}

int64_t partition(const float* x, int64_t count, float low, float high, float* between, int64_t* above) {
  int64_t found = 0, over = 0, i = 0;
  const Vec lower = broadcast(low), upper = broadcast(high);
  for (; i + BITS <= count; i += BITS) {
    prefetch_ahead(x + i), prefetch_ahead(x + i + BITS / 2);
    for (int v = 0; v < BITS; v += LANES) {
      const Vec size = magnitude(load(x + i + v));
      const uint32_t is_over = bits(~(size <= upper));
      over += __builtin_popcount(is_over);
      found += compress(size, bits(size >= lower) & ~is_over, between + found);
    }
  }
  for (; i < count; ++i) {
    const float size = __builtin_fabsf(x[i]);
    if (!(size <= high))
      ++over;
    else if (size >= low)
      between[found++] = size;
  }
  *above = over;
  return found;
}

int64_t active_bits(const float* x, const float* by, float threshold, int64_t count, uint8_t* bitmap) {
  int64_t found = 0, i = 0;
  const Vec limit = broadcast(threshold);
  for (; i + BITS <= count; i += BITS) {
    uint32_t mask = 0;
    prefetch_ahead(x + i), prefetch_ahead(x + i + BITS / 2), prefetch_ahead(by + i), prefetch_ahead(by + i + BITS / 2);
    for (int v = 0; v < BITS; v += LANES)
      mask |= bits(~(magnitude(load(by + i + v)) < limit) & ((VecInt)load(x + i + v) != 0)) << v;
    found += __builtin_popcount(mask);
    mask = mirrored(mask);  // a byte's first entry is its highest bit
    for (int byte = 0; byte < BITS / 8; ++byte) *bitmap++ = (uint8_t)(mask >> 8 * byte);
  }
  for (; i < count; i += 8) {
    uint32_t byte = 0;
    for (int k = 0; k < 8 && i + k < count; ++k) {
      uint32_t number;
      memcpy(&number, x + i + k, sizeof number);
      byte |= (uint32_t)(!(__builtin_fabsf(by[i + k]) < threshold) && number != 0) << (7 - k);
    }
    found += __builtin_popcount(byte);
    *bitmap++ = (uint8_t)byte;
  }
  return found;
}

}  // namespace zerofl::ISA

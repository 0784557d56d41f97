#include "codec/codec.h"

namespace zerofl {

void split_planes(const uint32_t* numbers, int64_t count, uint8_t* planes) {
  uint8_t *a = planes, *b = a + count, *c = b + count, *d = c + count;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t x = numbers[i] << 1 | numbers[i] >> 31;
    a[i] = static_cast<uint8_t>(x >> 24), b[i] = static_cast<uint8_t>(x >> 16);
    c[i] = static_cast<uint8_t>(x >> 8), d[i] = static_cast<uint8_t>(x);
  }
}

void merge_planes(const uint8_t* planes, int64_t count, uint32_t* numbers) {
  const uint8_t *a = planes, *b = a + count, *c = b + count, *d = c + count;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t x = uint32_t{a[i]} << 24 | uint32_t{b[i]} << 16 | uint32_t{c[i]} << 8 | d[i];
    numbers[i] = x >> 1 | x << 31;
  }
}

}  // namespace zerofl

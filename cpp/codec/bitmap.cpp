
#include "codec/codec.h"

namespace zerofl {

int64_t count_bits(const uint8_t* bits, int64_t count) {
  const int64_t size = (count + 7) / 8;
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) found += __builtin_popcount(bits[i]);
  return count % 8 && bits[size - 1] & 0xFF >> count % 8 ? -1 : found;
}

void take_bits(const float* x, const uint8_t* bits, int64_t count, float* values, int64_t found) {
  // Without a branch, which would be mispredicted as often as the bits vary: each entry is written, and the next one
  // over it if it has no bit. That needs a place behind the last one.
  int64_t i = 0, n = 0;
  for (; i + 8 <= count && n + 8 < found; i += 8) {
    const unsigned byte = *bits++;
    for (int k = 0; k < 8; ++k) {
      values[n] = x[i + k];
      n += byte >> (7 - k) & 1;
    }
  }
  for (; i < count; i += 8)
    for (unsigned byte = *bits++; byte;) {
      const int k = __builtin_clz(byte) - 24;  // the byte's first bit
      values[n++] = x[i + k];
      byte &= ~(0x80u >> k);
    }
}

}  // namespace zerofl

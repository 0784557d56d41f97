#include <cmath>
#include <cstring>

#include "wire.h"

namespace zerofl {
namespace {

constexpr int BLOCK = 256;  // entries at a time, in loops that compilers turn into vectors

// flags[i] is 1 where entry i is active, else 0.
void find(const float* x, const float* by, float threshold, int count, uint8_t* flags) {
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    flags[i] = !(std::fabs(by[i]) < threshold) & (bits != 0);  // a comparison with NaN is false: NaN is active
  }
}

// Eight flags, the first one in the highest bit.
uint8_t packed(const uint8_t* flags) {
  unsigned byte = 0;
  for (int i = 0; i < 8; ++i) byte |= flags[i] << (7 - i);
  return static_cast<uint8_t>(byte);
}

int first(unsigned byte) { return __builtin_clz(byte) - 24; }  // of its bits

}  // namespace

int64_t active_bits(const float* x, const float* by, float threshold, int64_t count, uint8_t* bits) {
  int64_t found = 0;
  uint8_t flags[BLOCK];
  for (int64_t begin = 0; begin < count; begin += BLOCK) {
    const int n = count - begin < BLOCK ? static_cast<int>(count - begin) : BLOCK;
    if (n < BLOCK) {
      memset(flags, 0, sizeof flags);
      find(x + begin, by + begin, threshold, n, flags);
    } else {
      find(x + begin, by + begin, threshold, BLOCK, flags);
    }
    for (int i = 0; i < n; i += 8) {
      const uint8_t byte = packed(flags + i);
      *bits++ = byte;
      found += __builtin_popcount(byte);
    }
  }
  return found;
}

int64_t count_active(const float* x, float threshold, int64_t count) {
  int64_t below = 0;
  for (int64_t i = 0; i < count; ++i) below += std::fabs(x[i]) < threshold;
  return count - below;
}

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
      const int k = first(byte);
      values[n++] = x[i + k];
      byte &= ~(0x80u >> k);
    }
}

}  // namespace zerofl

#include "codec/codec.h"

namespace zerofl {

int64_t count_bits(const uint8_t* bits, int64_t count) {
  const int64_t size = (count + 7) / 8;
  int64_t found = 0, i = 0;
  for (; i + 8 <= size; i += 8) {
    uint64_t word;
    __builtin_memcpy(&word, bits + i, sizeof word);
    found += __builtin_popcountll(word);
  }
  for (; i < size; ++i) found += __builtin_popcount(bits[i]);
  return count % 8 && bits[size - 1] & 0xFF >> count % 8 ? -1 : found;
}

}  // namespace zerofl

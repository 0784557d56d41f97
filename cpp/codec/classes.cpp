#include <algorithm>

#include "codec/codec.h"

namespace zerofl {
namespace {

uint32_t magnitude(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits & 0x7FFFFFFF;
}

// Where the numbers of each class begin.
struct Begins {
  int64_t of[CLASSES];

  explicit Begins(const int64_t* sizes) {
    int64_t begin = 0;
    for (int c = 0; c < CLASSES; ++c) of[c] = begin, begin += sizes[c];
  }
};

// The bits of a class are kept in a word until there are so many; a one above or below them tells how many there are.
constexpr int KEPT = 56;

// The bitmaps of the classes in memory, of any byte that may be a class: those that are none have no room.
template <class Byte>
struct Bitmaps {
  uint64_t words[256];
  Byte *next[256], *end[256];

  Bitmaps(const int64_t* sizes, uint64_t word, Byte* bytes) {
    for (int c = 0; c < 256; ++c) {
      words[c] = word, next[c] = bytes;
      if (c < CLASSES) bytes += (sizes[c] + 7) / 8;
      end[c] = bytes;
    }
  }
};

}  // namespace

uint32_t largest_magnitude(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, magnitude(x[i]));
  return largest;
}

void magnitude_classes(const float* x, int64_t count, uint32_t largest, uint8_t* classes) {
  const int32_t top = static_cast<int32_t>(largest >> HALF_OCTAVE) - (CLASSES - 1);
  for (int64_t i = 0; i < count; ++i)
    classes[i] = static_cast<uint8_t>(std::max(0, static_cast<int32_t>(magnitude(x[i]) >> HALF_OCTAVE) - top));
}

bool count_classes(const uint8_t* classes, int64_t count, int64_t* sizes) {
  int64_t found[4][256] = {};  // four, so that of equal ones in a row none waits for the one before
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) ++found[k][classes[i + k]];
  for (; i < count; ++i) ++found[0][classes[i]];
  int64_t known = 0;
  for (int c = 0; c < CLASSES; ++c) {
    sizes[c] = found[0][c] + found[1][c] + found[2][c] + found[3][c];
    known += sizes[c];
  }
  return known == count;
}

bool deal_bits(const uint8_t* classes, int64_t count, const int64_t* sizes, const uint8_t* bits, uint8_t* dealt) {
  Bitmaps<uint8_t> bitmaps(sizes, 1, dealt);
  const auto write = [&](int c, int bytes) {
    if (bitmaps.end[c] - bitmaps.next[c] < bytes) return false;
    for (int shift = 8 * (bytes - 1); shift >= 0; shift -= 8)
      *bitmaps.next[c]++ = static_cast<uint8_t>(bitmaps.words[c] >> shift);
    bitmaps.words[c] = 1;
    return true;
  };
  for (int64_t i = 0; i < count; i += 8) {
    const int entries = static_cast<int>(std::min<int64_t>(8, count - i));
    const unsigned byte = bits[i / 8];
    for (int k = 0; k < entries; ++k) {
      const int c = classes[i + k];
      const uint64_t word = bitmaps.words[c] << 1 | (byte >> (7 - k) & 1);
      bitmaps.words[c] = word;
      if (word >> KEPT && !write(c, KEPT / 8)) return false;
    }
  }
  for (int c = 0; c < 256; ++c) {
    const int kept = 63 - __builtin_clzll(bitmaps.words[c]), bytes = (kept + 7) / 8;
    bitmaps.words[c] <<= 8 * bytes - kept;
    if (!write(c, bytes) || bitmaps.next[c] != bitmaps.end[c]) return false;
  }
  return true;
}

bool gather_bits(const uint8_t* classes, int64_t count, const int64_t* sizes, const uint8_t* dealt, uint8_t* bits) {
  constexpr uint64_t NONE = uint64_t{1} << 63;
  Bitmaps<const uint8_t> bitmaps(sizes, NONE, dealt);
  for (int64_t i = 0; i < count; i += 8) {
    const int entries = static_cast<int>(std::min<int64_t>(8, count - i));
    unsigned byte = 0;
    for (int k = 0; k < entries; ++k) {
      const int c = classes[i + k];
      uint64_t& word = bitmaps.words[c];
      if (word == NONE) {
        const int bytes = static_cast<int>(std::min<int64_t>(KEPT / 8, bitmaps.end[c] - bitmaps.next[c]));
        if (!bytes) return false;
        word = 1;
        for (int b = 0; b < bytes; ++b) word = word << 8 | *bitmaps.next[c]++;
        word = word << 1 | 1, word <<= 63 - 8 * bytes;
      }
      byte |= static_cast<unsigned>(word >> 63) << (7 - k);
      word <<= 1;
    }
    bits[i / 8] = static_cast<uint8_t>(byte);
  }
  return true;
}

template <class T>
void deal(const uint8_t* classes, int64_t count, const int64_t* sizes, const T* numbers, T* dealt) {
  Begins next(sizes);
  for (int64_t i = 0; i < count; ++i) dealt[next.of[classes[i]]++] = numbers[i];
}

template <class T>
void gather(const uint8_t* classes, int64_t count, const int64_t* sizes, const T* dealt, T* numbers) {
  Begins next(sizes);
  for (int64_t i = 0; i < count; ++i) numbers[i] = dealt[next.of[classes[i]]++];
}

// A number's place among all: of a negative one the bits below the sign are inverted. The other way is the same.
template <class T>
T turned(T bits) {
  constexpr int SIGN = 8 * sizeof(T) - 1;
  return static_cast<T>(bits ^ (static_cast<T>(-(bits >> SIGN)) >> 1));
}

template <class T>
void subtract(const T* numbers, const T* received, int64_t count, T* differences) {
  for (int64_t i = 0; i < count; ++i) differences[i] = turned(static_cast<T>(turned(numbers[i]) - turned(received[i])));
}

template <class T>
void add(const T* received, const T* differences, int64_t count, T* numbers) {
  for (int64_t i = 0; i < count; ++i) numbers[i] = turned(static_cast<T>(turned(received[i]) + turned(differences[i])));
}

#define OF(T)                                                                \
  template void deal(const uint8_t*, int64_t, const int64_t*, const T*, T*); \
  template void gather(const uint8_t*, int64_t, const int64_t*, const T*, T*);
OF(uint8_t)
OF(uint16_t)
OF(uint32_t)
#undef OF
#define OF(T)                                              \
  template void subtract(const T*, const T*, int64_t, T*); \
  template void add(const T*, const T*, int64_t, T*);
OF(uint16_t)
OF(uint32_t)
#undef OF

}  // namespace zerofl

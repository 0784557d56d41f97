// Vectors of floats in the widest registers the file is compiled for, through the compilers' vector extensions.
//
// The files that include this are compiled once per instruction set (see CMakeLists.txt). They use no template or inline function
// of the standard library: the linker would keep one copy of each, perhaps the one for a processor that is not there.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace zerofl::ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
#if defined(__AVX512F__)
constexpr VecInt NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
constexpr VecInt NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr VecInt NUMBERS = {0, 1, 2, 3};
#endif

typedef float VecUnaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

typedef int32_t VecIntUnaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
INLINE VecInt load_ints(const uint32_t* p) { return *reinterpret_cast<const VecIntUnaligned*>(p); }
INLINE void store_ints(uint32_t* p, VecInt v) { *reinterpret_cast<VecIntUnaligned*>(p) = v; }
// Past the caches, for what is larger than they are: it saves reading each line before it is overwritten. p is aligned
// to a whole vector. fence() before another thread reads.
INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}

INLINE void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The pointer in a register of its own: a multiplication that reads from the sum of two takes the processor an extra step.
template <class T>
static inline __attribute__((always_inline)) T* in_register(T* p) {
  asm("" : "+r"(p));
  return p;
}

// Ask for what a scan reads a little later; the processor's own guess stops at each page.
INLINE void prefetch_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 2048); }

// The same value, which the compiler does not join with the next addition to an operation that rounds once.
template <class T>
static inline __attribute__((always_inline)) T rounded(T value) {
#if defined(__x86_64__)
  asm("" : "+x"(value));
#else
  asm("" : "+w"(value));
#endif
  return value;
}

INLINE bool is_aligned(const float* p) { return (uintptr_t)p % sizeof(Vec) == 0; }

INLINE Vec broadcast(float x) { return x - Vec{}; }

INLINE Vec magnitude(Vec v) { return (Vec)((VecInt)v & 0x7fffffff); }

INLINE float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

// Bit i of the result is set where lane i of a comparison's result is true.
INLINE uint32_t bits(VecInt truth) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)truth);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)truth);
#else
  uint32_t result = 0;
  for (int i = 0; i < LANES; ++i) result |= (uint32_t)(truth[i] & 1) << i;
  return result;
#endif
}

// The bits of each byte in the other order.
INLINE uint32_t mirrored(uint32_t mask) {
  mask = (mask >> 4 & 0x0f0f0f0f) | (mask & 0x0f0f0f0f) << 4;
  mask = (mask >> 2 & 0x33333333) | (mask & 0x33333333) << 2;
  return (mask >> 1 & 0x55555555) | (mask & 0x55555555) << 1;
}

// The lanes from `mask`'s bits: all ones where the bit is set.
INLINE VecInt lanes(uint32_t mask) {
  VecInt bit;
  for (int i = 0; i < LANES; ++i) bit[i] = 1 << i;
  return ((VecInt{} + (int32_t)mask) & bit) != 0;
}

#if (defined(__AVX2__) && !defined(__AVX512F__)) || defined(__aarch64__)
// By a mask of lanes the numbers of those that are set, in order; for NEON those of their bytes.
struct SetLanes {
  static constexpr int BYTES = LANES == 8 ? 1 : 4;
  uint8_t of[1 << LANES][LANES * BYTES];
  constexpr SetLanes() : of{} {
    for (int mask = 0; mask < 1 << LANES; ++mask)
      for (int lane = 0, n = 0; lane < LANES; ++lane)
        for (int byte = 0; byte < BYTES && mask >> lane & 1; ++byte) of[mask][n++] = (uint8_t)(lane * BYTES + byte);
  }
};
constexpr SetLanes SET_LANES;
// The other way: by a mask of lanes how many are set below each one.
struct Ranks {
  static constexpr int BYTES = SetLanes::BYTES;
  uint8_t of[1 << LANES][LANES * BYTES];
  constexpr Ranks() : of{} {
    for (int mask = 0; mask < 1 << LANES; ++mask)
      for (int lane = 0, n = 0; lane < LANES; n += mask >> lane++ & 1)
        for (int byte = 0; byte < BYTES; ++byte) of[mask][lane * BYTES + byte] = (uint8_t)(n * BYTES + byte);
  }
};
constexpr Ranks RANKS;
#endif

// Write the lanes of two vectors where the mask's bits are set; returns how many. Up to LANES entries behind them are
// overwritten.
INLINE int compress(Vec v, VecInt w, uint32_t mask, float* vs, uint32_t* ws) {
#if defined(__AVX512F__)
  store(vs, _mm512_maskz_compress_ps((__mmask16)mask, v));
  store_ints(ws, (VecInt)_mm512_maskz_compress_epi32((__mmask16)mask, (__m512i)w));
#elif defined(__AVX2__)
  const __m256i set = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(SET_LANES.of[mask])));
  store(vs, _mm256_permutevar8x32_ps(v, set));
  store_ints(ws, (VecInt)_mm256_permutevar8x32_epi32((__m256i)w, set));
#elif defined(__aarch64__)
  const uint8x16_t set = vld1q_u8(SET_LANES.of[mask]);
  store(vs, (Vec)vqtbl1q_u8((uint8x16_t)v, set));
  store_ints(ws, (VecInt)vqtbl1q_u8((uint8x16_t)w, set));
#else
  for (int lane = 0, n = 0; lane < LANES; ++lane) {
    vs[n] = v[lane], ws[n] = (uint32_t)w[lane];
    n += (int)(mask >> lane & 1);
  }
#endif
  return __builtin_popcount(mask);
}

// The same of one vector.
INLINE int compress(Vec v, uint32_t mask, float* vs) {
#if defined(__AVX512F__)
  store(vs, _mm512_maskz_compress_ps((__mmask16)mask, v));
#elif defined(__AVX2__)
  const __m256i set = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(SET_LANES.of[mask])));
  store(vs, _mm256_permutevar8x32_ps(v, set));
#elif defined(__aarch64__)
  store(vs, (Vec)vqtbl1q_u8((uint8x16_t)v, vld1q_u8(SET_LANES.of[mask])));
#else
  for (int lane = 0, n = 0; lane < LANES; ++lane) {
    vs[n] = v[lane];
    n += (int)(mask >> lane & 1);
  }
#endif
  return __builtin_popcount(mask);
}

// The numbers from `vs` on, one in each lane where the mask's bit is set; what the others get says nothing.
INLINE Vec expand(const float* vs, uint32_t mask) {
#if defined(__AVX512F__)
  return _mm512_maskz_expand_ps((__mmask16)mask, load(vs));
#elif defined(__AVX2__)
  const __m256i rank = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(RANKS.of[mask])));
  return _mm256_permutevar8x32_ps(load(vs), rank);
#elif defined(__aarch64__)
  return (Vec)vqtbl1q_u8((uint8x16_t)load(vs), vld1q_u8(RANKS.of[mask]));
#else
  Vec v;
  for (int lane = 0, n = 0; lane < LANES; ++lane) {
    v[lane] = vs[n];
    n += (int)(mask >> lane & 1);
  }
  return v;
#endif
}

// rows[i][j] = rows[j][i], by interleaving halves: after log2(LANES) rounds every lane is in its place.
INLINE void transpose(Vec rows[LANES]) {
  Vec other[LANES];
  for (int round = 1; round < LANES; round *= 2) {
    for (int i = 0; i < LANES / 2; ++i) {
      const Vec a = rows[i], b = rows[i + LANES / 2];
#if defined(__AVX512F__)
      other[2 * i] =
          _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
      other[2 * i + 1] =
          _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
#elif defined(__AVX2__)
      const Vec low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
      other[2 * i] = _mm256_permute2f128_ps(low, high, 0x20);
      other[2 * i + 1] = _mm256_permute2f128_ps(low, high, 0x31);
#else
      other[2 * i] = Vec{a[0], b[0], a[1], b[1]};
      other[2 * i + 1] = Vec{a[2], b[2], a[3], b[3]};
#endif
    }
    for (int i = 0; i < LANES; ++i) rows[i] = other[i];
  }
}

}  // namespace zerofl::ISA

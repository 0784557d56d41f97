// Numbers that are stored in 16 bits and computed with as float32: a vector of them from memory, and back, to the nearest.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace zerofl::ISA {

struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));
typedef uint16_t VecShort __attribute__((vector_size(LANES * 2)));
typedef uint16_t VecShortUnaligned __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE VecBits load_bits(const void* p) {
  return __builtin_convertvector((VecShort) * reinterpret_cast<const VecShortUnaligned*>(p), VecBits);
}
INLINE void store_bits(void* p, VecBits bits) {
  *reinterpret_cast<VecShortUnaligned*>(p) = __builtin_convertvector(bits, VecShort);
}
INLINE VecBits choose(VecInt truth, VecBits yes, VecBits no) { return ((VecBits)truth & yes) | (~(VecBits)truth & no); }

INLINE Vec load(const Bfloat16* p) { return (Vec)(load_bits(p) << 16); }

INLINE void store(Bfloat16* p, Vec v) {
  const VecBits bits = (VecBits)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  store_bits(p, choose(v == v, rounded, bits >> 16 | 0x40));  // NaN, which rounding might make infinite, stays one
}

#if defined(__AVX512F__)
INLINE Vec load(const Float16* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE void store(Float16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
INLINE Vec load(const Float16* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE void store(Float16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
INLINE Vec load(const Float16* p) {
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
INLINE void store(Float16* p, Vec v) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
}
#else
// By integers: exponents are 5 bits from -14, mantissas 10, and what is smaller than 2^-14 is a multiple of 2^-24.
INLINE Vec load(const Float16* p) {
  const VecBits half = load_bits(p), exponent = half & 0x7c00;
  const VecBits normal = ((half & 0x7fff) << 13) + ((127u - 15) << 23);
  const Vec tiny = __builtin_convertvector((VecInt)(half & 0x3ff), Vec) * 0x1p-24f;
  const VecBits finite = choose(exponent == 0, (VecBits)tiny, normal);
  return (Vec)(choose(exponent == 0x7c00, normal + ((128u - 16) << 23), finite) | (half & 0x8000) << 16);
}
INLINE void store(Float16* p, Vec v) {
  const VecBits bits = (VecBits)v, size = bits & 0x7fffffff;
  const VecBits normal = (size - ((127u - 15) << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  const VecBits tiny = (VecBits)((Vec)size + 0.5f) - (126u << 23);  // 0.5's last place is 2^-24
  const VecBits finite = choose((VecInt)size < (113 << 23), tiny, normal);
  const VecBits large = choose((VecInt)size > (255 << 23), VecBits{} + 0x7e00u, VecBits{} + 0x7c00u);
  store_bits(p, choose((VecInt)size >= 0x477ff000, large, finite) | (bits >> 16 & 0x8000));
}
#endif

// Less than a vector: what is left of a row.
template <class T>
static inline __attribute__((always_inline)) float load_one(const T* p) {
  T few[LANES] = {};
  few[0] = *p;
  return load(few)[0];
}
INLINE float load_one(const float* p) { return *p; }

// to[0, count) = from[0, count), rounded.
template <class T>
static inline __attribute__((always_inline)) void store_row(T* to, const float* from, int count) {
  int i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  if (i == count) return;
  float rest[LANES] = {};
  memcpy(rest, from + i, (count - i) * sizeof(float));
  T few[LANES];
  store(few, load(rest));
  memcpy(to + i, few, (count - i) * sizeof(T));
}

// Call work(a pointer of the type that is stored) for memory of float32 or 16-bit numbers.
template <class Work>
static inline __attribute__((always_inline)) void with_type(const void* p, Storage storage, const Work& work) {
  switch (storage) {
    case FLOAT32:
      return work(static_cast<const float*>(p));
    case FLOAT16:
      return work(static_cast<const Float16*>(p));
    case BFLOAT16:
      return work(static_cast<const Bfloat16*>(p));
  }
}

}  // namespace zerofl::ISA

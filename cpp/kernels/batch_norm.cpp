// Batch normalisation of one channel, with the residual's addition and the ReLU that follow it in a residual network.

#include "kernels.h"
#include "simd.h"
#include "storage.h"

namespace zerofl::ISA {
namespace {

constexpr int CHAINS = 4;            // sums under way at a time
constexpr int64_t STRETCH = 1 << 14;  // floats whose float32 sum is kept exact enough, before it is added as double

// The lanes whose bits are set in the bitmap at entry i, a multiple of LANES.
INLINE VecInt positive_lanes(const uint8_t* positive, int64_t i) {
#if defined(__AVX512F__)
  uint16_t mask;
  memcpy(&mask, positive + i / 8, 2);
  return (VecInt)_mm512_movm_epi32(mask);
#else
  return lanes((uint32_t)(positive[i / 8] >> (i % 8)));
#endif
}

INLINE bool is_positive(const uint8_t* positive, int64_t i) { return positive[i / 8] >> (i % 8) & 1; }

// The corrected two-pass algorithm (Chan, Golub and LeVeque 1983): the first pass's mean is off by the rounding of its
// float32 sums, and the second finds by how much. Without that a channel of equal numbers would have a spread.
template <class T>
void statistics(const T* x, int64_t count, float* mean, float* variance) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += STRETCH) {
    const int64_t end = begin + STRETCH < count ? begin + STRETCH : count;
    Vec sums[CHAINS] = {};
    int64_t i = begin;
    for (; i + CHAINS * LANES <= end; i += CHAINS * LANES)
      for (int c = 0; c < CHAINS; ++c) {
        if (c * LANES % 16 == 0) prefetch_ahead(x + i + c * LANES);
        sums[c] += load(x + i + c * LANES);
      }
    for (int c = 0; c < CHAINS; ++c) total += sum(sums[c]);
    for (; i < end; ++i) total += load_one(x + i);
  }
  const float center = (float)(total / count);
  double squares = 0, rest = 0;
  for (int64_t begin = 0; begin < count; begin += STRETCH) {
    const int64_t end = begin + STRETCH < count ? begin + STRETCH : count;
    Vec sums[CHAINS] = {}, rests[CHAINS] = {};
    int64_t i = begin;
    for (; i + CHAINS * LANES <= end; i += CHAINS * LANES)
      for (int c = 0; c < CHAINS; ++c) {
        const Vec d = load(x + i + c * LANES) - center;
        sums[c] += d * d;
        rests[c] += d;
      }
    for (int c = 0; c < CHAINS; ++c) squares += sum(sums[c]), rest += sum(rests[c]);
    for (; i < end; ++i) {
      const double d = load_one(x + i) - center;
      squares += d * d, rest += d;
    }
  }
  const double correction = rest / count, rounded = squares / count - correction * correction;
  *mean = (float)(center + correction);
  *variance = (float)(rounded < 0 ? 0 : rounded);  // keeps NaN
}

template <bool STREAM>
INLINE void put(float* p, Vec v) {
  if (STREAM)
    stream(p, v);
  else
    store(p, v);
}

template <bool STREAM, class T>
void apply(const T* x, const float* residual, int64_t count, float scale, float mean, float shift, bool relu, float* y,
           uint8_t* positive) {
  int64_t i = 0;
  if (positive) memset(positive, 0, (count + 7) / 8);
  for (; i + LANES <= count; i += LANES) {
    Vec v = (load(x + i) - mean) * scale + shift;
    if (residual) v += load(residual + i);
    if (relu) v = v < Vec{} ? Vec{} : v;  // as torch's, it keeps NaN
    put<STREAM>(y + i, v);
    if (positive) {
      const uint32_t mask = bits(~(v <= Vec{})) << (LANES < 8 ? i % 8 : 0);
      for (int byte = 0; byte < (LANES + 7) / 8; ++byte) positive[i / 8 + byte] |= (uint8_t)(mask >> 8 * byte);
    }
  }
  for (; i < count; ++i) {
    float v = (load_one(x + i) - mean) * scale + shift;
    if (residual) v += residual[i];
    if (relu) v = v < 0 ? 0 : v;
    y[i] = v;
    if (positive) positive[i / 8] |= (uint8_t)(!(v <= 0) << (i % 8));
  }
  if (STREAM) fence();
}

template <bool STREAM, class T>
void gradient(const float* grad_y, const T* x, const uint8_t* positive, int64_t count, float mean, float scale,
              float slope, float shift, float* grad_x, float* grad_residual) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    Vec g = load(grad_y + i);
    if (positive) g = (Vec)((VecInt)g & positive_lanes(positive, i));
    put<STREAM>(grad_x + i, g * scale + ((load(x + i) - mean) * slope + shift));
    if (grad_residual) put<STREAM>(grad_residual + i, g);
  }
  for (; i < count; ++i) {
    const float g = positive && !is_positive(positive, i) ? 0.0f : grad_y[i];
    grad_x[i] = g * scale + ((load_one(x + i) - mean) * slope + shift);
    if (grad_residual) grad_residual[i] = g;
  }
  if (STREAM) fence();
}

template <class T>
void sums(const float* grad_y, const T* x, const uint8_t* positive, int64_t count, float mean, float* sum_,
          float* dot) {
  double total = 0, product = 0;
  for (int64_t begin = 0; begin < count; begin += STRETCH) {
    const int64_t end = begin + STRETCH < count ? begin + STRETCH : count;
    Vec totals[CHAINS] = {}, products[CHAINS] = {};
    int64_t i = begin;
    for (; i + CHAINS * LANES <= end; i += CHAINS * LANES)
      for (int c = 0; c < CHAINS; ++c) {
        const int64_t at = i + c * LANES;
        if (c * LANES % 16 == 0) prefetch_ahead(grad_y + at), prefetch_ahead(x + at);
        Vec g = load(grad_y + at);
        if (positive) g = (Vec)((VecInt)g & positive_lanes(positive, at));
        totals[c] += g;
        products[c] += g * (load(x + at) - mean);
      }
    for (int c = 0; c < CHAINS; ++c) total += sum(totals[c]), product += sum(products[c]);
    for (; i < end; ++i) {
      const float g = positive && !is_positive(positive, i) ? 0.0f : grad_y[i];
      total += g, product += g * (load_one(x + i) - mean);
    }
  }
  *sum_ = (float)total;
  *dot = (float)product;
}

}  // namespace

void batch_norm_statistics(const void* x, Storage storage, int64_t count, float* mean, float* variance) {
  with_type(x, storage, [&](auto x) { statistics(x, count, mean, variance); });
}

void batch_norm_apply(const void* x, Storage storage, const float* residual, int64_t count, float scale, float mean,
                      float shift, bool relu, bool large, float* y, uint8_t* positive) {
  with_type(x, storage, [&](auto x) {
    if (large && is_aligned(y))
      apply<true>(x, residual, count, scale, mean, shift, relu, y, positive);
    else
      apply<false>(x, residual, count, scale, mean, shift, relu, y, positive);
  });
}

void batch_norm_sums(const float* grad_y, const void* x, Storage storage, const uint8_t* positive, int64_t count,
                     float mean, float* sum, float* dot) {
  with_type(x, storage, [&](auto x) { sums(grad_y, x, positive, count, mean, sum, dot); });
}

void batch_norm_gradient(const float* grad_y, const void* x, Storage storage, const uint8_t* positive, int64_t count,
                         float mean, float scale, float slope, float shift, bool large, float* grad_x,
                         float* grad_residual) {
  const bool streams = large && is_aligned(grad_x) && (!grad_residual || is_aligned(grad_residual));
  with_type(x, storage, [&](auto x) {
    if (streams)
      gradient<true>(grad_y, x, positive, count, mean, scale, slope, shift, grad_x, grad_residual);
    else
      gradient<false>(grad_y, x, positive, count, mean, scale, slope, shift, grad_x, grad_residual);
  });
}

}  // namespace zerofl::ISA

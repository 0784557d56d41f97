// Powers of vectors of floats, and the step of SGD that Powerpropagation takes with them.
#pragma once

#include <float.h>

#include "kernels.h"
#include "simd.h"

namespace zerofl::ISA {

constexpr int32_t EXPONENT = 1 << 23;  // where a float's exponent begins

// The logarithm to base 2 of normal and positive x, to 5e-8 and the rounding of the result. The polynomials here are
// summed in pairs, for what takes time is waiting.
INLINE Vec log2_of(Vec x) {
  constexpr int32_t SQRT_HALF = 0x3f3504f3;  // the bits of sqrt(1/2)
  // x = 2^whole * (1 + t) with 1 + t from sqrt(1/2) to sqrt(2).
  const VecInt whole = ((VecInt)x - SQRT_HALF) >> 23;
  const Vec t = (Vec)((VecInt)x - whole * EXPONENT) - 1.0f, tt = t * t;
  const Vec low = (1.44269478f - 0.721357167f * t) + tt * (0.480939448f - 0.360087186f * t);
  const Vec high = (0.28670764f - 0.250069648f * t) + tt * (0.236889124f - 0.145741150f * t);
  return __builtin_convertvector(whole, Vec) + t * (low + tt * tt * high);
}

// 2^y to 1e-7 of it, where that is a normal number.
INLINE Vec exp2_of(Vec y) {
  constexpr float NO_FRACTION = 12582912.0f;  // added to a number, it leaves no room for a fraction
  // 2^y = 2^n * 2^r with r from -1/2 to 1/2.
  const Vec n = y + NO_FRACTION - NO_FRACTION, r = y - n, rr = r * r;
  const Vec two_to_r = (1.0f + 0.693146944f * r) +
                       rr * ((0.240221217f + 0.0555074252f * r) + rr * (0.00967545994f + 0.00132669706f * r));
  return (Vec)((VecInt)two_to_r + __builtin_convertvector(n, VecInt) * EXPONENT);
}

// What a step on a power needs of its target, computed once for many weights.
struct Power {
  float rate, momentum, weight_decay;
  float to_v, to_slope;  // from log2 |weight| to log2 |v|, and from that to the one of |v|^(power - 1)
  float to_x, scale;  // from log2 |weight| to the one of |x / gradient|, but for the constant `scale`
  float series[5];  // the first coefficients of (1 + x)^power, from x's on
};

INLINE Power power_of(const Target& target) {
  const float power = target.power;
  Power p = {target.rate, target.momentum, target.weight_decay,  1 / power,
             power - 1,   1 - 2 / power,   -target.rate * power, {power}};
  for (int k = 1; k < 5; ++k) p.series[k] = p.series[k - 1] * (power - (float)k) / (float)(k + 1);
  return p;
}

// The weight after a step of SGD on v, where the weight is v |v|^(power - 1). A weight that is zero stays zero, and one
// that does not move keeps all of its bits.
INLINE Vec powered_of_v(const Power& p, Vec weight, Vec gradient, Vec* velocity) {
  const Vec size = magnitude(weight);
  const VecInt small = size < FLT_MIN, usual = ~small & (size <= FLT_MAX);  // not usual: NaN, infinite
  const Vec log2_v = log2_of(usual ? size : Vec{} + 1.0f) * p.to_v;
  const Vec v = (Vec)((VecInt)(usual ? exp2_of(log2_v) : size) | ((VecInt)weight & INT32_MIN));
  gradient *= small ? Vec{} : p.series[0] * (usual ? exp2_of(log2_v * p.to_slope) : size);
  if (p.weight_decay != 0) gradient += p.weight_decay * v;
  if (velocity) gradient = *velocity = rounded(*velocity * p.momentum) + gradient;
  const Vec moved = v - p.rate * gradient, moved_size = magnitude(moved);
  const VecInt moved_usual = (moved_size >= FLT_MIN) & (moved_size <= FLT_MAX);
  const Vec factor = exp2_of(log2_of(moved_usual ? moved_size : Vec{} + 1.0f) * p.to_slope);
  return moved == v ? weight : moved * (moved_usual ? factor : moved_size);
}

// The same. Without momentum and weight decay v becomes v (1 + x) with x = -rate * power * gradient * |v|^(power - 1) / v,
// and the weight is multiplied by (1 + x)^power. Below an eighth, as x mostly is, five terms of its series are as exact as
// a float, and half of the logarithms and exponentials are saved.
INLINE Vec powered(const Power& p, Vec weight, Vec gradient, Vec* velocity) {
  if (velocity || p.weight_decay != 0) return powered_of_v(p, weight, gradient, velocity);
  const Vec size = magnitude(weight);
  const VecInt small = size < FLT_MIN, inside = (size > 1e-30f) & (size < 1e30f);
  const Vec share = exp2_of(log2_of(inside ? size : Vec{} + 1.0f) * p.to_x);
  const Vec x = p.scale * gradient * (Vec)((VecInt)share | ((VecInt)weight & INT32_MIN)), xx = x * x;
  const Vec more = (p.series[0] + p.series[1] * x) + xx * ((p.series[2] + p.series[3] * x) + xx * p.series[4]);
  const Vec stepped = small ? weight : weight + weight * (x * more);
  const VecInt near = small | (inside & (magnitude(x) < 0.125f));
  if (bits(near) == (1u << LANES) - 1) return stepped;
  return near ? stepped : powered_of_v(p, weight, gradient, velocity);
}

// Steps that wait for others, to be taken a whole vector at a time: without momentum and weight decay a weight moves only
// where it is not zero and has a gradient, which after a few rounds of a sparse uplink is one in ten. All of them wait,
// without asking whether any or all of a vector move: that is a guess at random, and a wrong one takes longer.
struct Waiting {
  static constexpr int MOST = 512;
  float gradients[MOST + LANES];
  uint32_t places[MOST + LANES];
  int count;  // 0 at first; a value here would make a constructor, of which the linker keeps one for all instructions

  // The weights in `place` and behind it with these gradients, which may wait; `weight` is their array.
  [[gnu::always_inline]] inline void add(const Power& p, float* weight, uint32_t place, Vec gradient) {
    const Vec before = load(weight + place);
    const uint32_t moving = bits((gradient != 0) & ~(magnitude(before) < FLT_MIN));
    count += compress(gradient, NUMBERS + (int32_t)place, moving, gradients + count, places + count);
    if (count > MOST - LANES) take(p, weight);
  }

  // All steps that wait.
  [[gnu::always_inline]] inline void take(const Power& p, float* weight) {
    store(gradients + count, Vec{});
    store_ints(places + count, VecInt{} + (int32_t)places[0]);
    for (int first = 0; first < count; first += LANES) {
      Vec before;
      for (int i = 0; i < LANES; ++i) before[i] = weight[places[first + i]];
      const Vec after = powered(p, before, load(gradients + first), nullptr);
      const int taken = count - first < LANES ? count - first : LANES;
      for (int i = 0; i < taken; ++i) weight[places[first + i]] = after[i];
    }
    count = 0;
  }
};

INLINE float powered(const Power& p, float weight, float gradient, float* velocity) {
  Vec velocities = broadcast(velocity ? *velocity : 0.0f);
  const Vec weights = powered(p, broadcast(weight), broadcast(gradient), velocity ? &velocities : nullptr);
  if (velocity) *velocity = velocities[0];
  return weights[0];
}

}  // namespace zerofl::ISA

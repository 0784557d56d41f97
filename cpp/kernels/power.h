// Powers of vectors of floats, and the step of SGD that Powerpropagation takes with them.
#pragma once

#include <float.h>

#include "kernels.h"
#include "simd.h"

namespace zerofl::ISA {

// x^exponent to about 5e-7 of it, of normal and positive x, and an exponent in (0, 1]. The polynomials are those with the
// least squares of relative errors, which are below 1e-7; they are summed in pairs, for what takes time is waiting.
INLINE Vec power(Vec x, float exponent) {
  constexpr int32_t SQRT_HALF = 0x3f3504f3, EXPONENT = 1 << 23;  // the bits of sqrt(1/2), and where the exponent is
  constexpr float NO_FRACTION = 12582912.0f;  // added to a number, it leaves no room for a fraction
  // x = 2^whole * m with m from sqrt(1/2) to sqrt(2); log2(m) = 2 / ln 2 * (s + s^3 / 3 + s^5 / 5 + ...).
  const VecInt whole = ((VecInt)x - SQRT_HALF) >> 23;
  const Vec m = (Vec)((VecInt)x - whole * EXPONENT), s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const Vec log2_m = s * ((2.88539004f + 0.961798847f * z) + z * z * (0.576714337f + 0.431740761f * z));
  const Vec y = exponent * (__builtin_convertvector(whole, Vec) + log2_m);
  // 2^y = 2^n * 2^r with r from -1/2 to 1/2.
  const Vec n = y + NO_FRACTION - NO_FRACTION, r = y - n, rr = r * r;
  const Vec two_to_r = (1.0f + 0.693146944f * r) +
                       rr * ((0.240221217f + 0.0555074252f * r) + rr * (0.00967545994f + 0.00132669706f * r));
  return (Vec)((VecInt)two_to_r + __builtin_convertvector(n, VecInt) * EXPONENT);
}

// The weight after a step of SGD on v, where the weight is v |v|^(power - 1). A weight that is zero stays zero, and one
// that does not move keeps all of its bits.
INLINE Vec powered(const Target& target, Vec weight, Vec gradient, Vec* velocity) {
  const Vec size = magnitude(weight);
  const VecInt small = size < FLT_MIN, usual = ~small & (size <= FLT_MAX);  // not usual: NaN, infinite
  const Vec v_size = usual ? power(usual ? size : Vec{} + 1.0f, 1.0f / target.power) : size;
  const Vec v = (Vec)((VecInt)v_size | ((VecInt)weight & INT32_MIN));
  gradient *= small ? Vec{} : target.power * (size / v_size);  // |v|^(power - 1) = |weight| / |v|
  if (target.weight_decay != 0) gradient += target.weight_decay * v;
  if (velocity) gradient = *velocity = rounded(*velocity * target.momentum) + gradient;
  const Vec moved = v - target.rate * gradient, moved_size = magnitude(moved);
  const VecInt moved_usual = (moved_size >= FLT_MIN) & (moved_size <= FLT_MAX);
  const Vec factor = power(moved_usual ? moved_size : Vec{} + 1.0f, target.power - 1.0f);
  return moved == v ? weight : moved * (moved_usual ? factor : moved_size);
}

// Steps that wait for others, to be taken a whole vector at a time: without momentum and weight decay a weight moves only
// where it is not zero and has a gradient, which after a few rounds of a sparse uplink is one in twenty.
struct Waiting {
  float gradients[2 * LANES];
  uint32_t places[2 * LANES];
  int count;  // 0 at first; a value here would make a constructor, of which the linker keeps one for all instructions

  // The weights in `place` and behind it with these gradients, which may wait; `weight` is their array.
  [[gnu::always_inline]] inline void add(const Target& target, float* weight, uint32_t place, Vec gradient) {
    const Vec before = load(weight + place);
    const uint32_t moving = bits((gradient != 0) & ~(magnitude(before) < FLT_MIN));
    if (!moving) return;
    if (__builtin_popcount(moving) > LANES / 2) {
      store(weight + place, powered(target, before, gradient, nullptr));
      return;
    }
    count += compress(gradient, NUMBERS + (int32_t)place, moving, gradients + count, places + count);
    if (count >= LANES) take(target, weight);
  }

  // The steps of a vector, or of what is left.
  [[gnu::always_inline]] inline void take(const Target& target, float* weight) {
    const int taken = count < LANES ? count : LANES;
    Vec before = {};
    for (int i = 0; i < taken; ++i) before[i] = weight[places[i]];
    const Vec after = powered(target, before, load(gradients), nullptr);
    for (int i = 0; i < taken; ++i) weight[places[i]] = after[i];
    count -= taken;
    store(gradients, load(gradients + LANES));
    store_ints(places, load_ints(places + LANES));
  }
};

INLINE float powered(const Target& target, float weight, float gradient, float* velocity) {
  Vec velocities = broadcast(velocity ? *velocity : 0.0f);
  const Vec weights = powered(target, broadcast(weight), broadcast(gradient), velocity ? &velocities : nullptr);
  if (velocity) *velocity = velocities[0];
  return weights[0];
}

}  // namespace zerofl::ISA

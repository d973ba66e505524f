// Activations of networks on vectors of float, to 5 times 2^-23 of the result; below -2, where gelu, gelu_tanh, silu
// and mish vanish, to 3e-8 of x. On 2^24 numbers of every exponent the largest errors were, in 2^-23 of the result:
// silu 1.5, gelu_tanh 3.4, gelu 4.8, tanh 1.2, sigmoid 2.3 (where it is above 1e-36), mish 2.5, elu 0.8. NaN stays NaN.
// Only for <op>/cpu.cpp and amx.cpp, as common/simd.h.
#pragma once

#include "common/simd.h"

namespace fk {
namespace FK_ISA {

// One instruction each where the compiler would take two: it does not know which operand a NaN is to come from.
FK_INLINE vf at_most(vf a, float b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)splat(b), (__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)splat(b), (__m256)a);
#else
  return a > b ? splat(b) : a;
#endif
}
FK_INLINE vf at_least(vf a, float b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)splat(b), (__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)splat(b), (__m256)a);
#else
  return a < b ? splat(b) : a;
#endif
}
FK_INLINE vf magnitude(vf a) {
  return as_float(as_bits(a) & 0x7fffffffu);
}

// 1 / a for |a| in [2^-126, 2^126]
FK_INLINE vf reciprocal(vf a) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_rcp14_ps((__m512)a);  // 14 bits; one Newton step doubles them
  return r + r * (1.0f - a * r);
#else
  return 1.0f / a;
#endif
}

// exp(x) = (1 + rest) * scale with scale a power of two, |rest| < 0.42, for x in [-87, 88]
struct Exp {
  vf rest, scale;
};
FK_INLINE Exp exp_parts(vf x) {
  const vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part is in the low bits
  const vf n = shifted - 12582912.0f;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const vf r = x - n * 0.693147181f;  // one rounding; n times what the constant is off by is 2.4e-7 at most
#else
  const vf r = x - n * 0.693359375f - n * -2.12194440e-4f;  // n times the first is exact
#endif
  vf p = r * 1.3814593518e-3f + 8.3687192800e-3f;  // least relative error of exp, 3.1e-9
  p = p * r + 4.1668388281e-2f;
  p = p * r + 1.6666520612e-1f;
  p = p * r + 4.9999993446e-1f;
  return {p * (r * r) + r, as_float((as_bits(shifted) << 23) + 0x3f800000u)};
}
FK_INLINE vf exp(vf x) {  // for x in [-87, 88]
  const Exp e = exp_parts(x);
  return e.rest * e.scale + e.scale;
}

FK_INLINE vf sigmoid(vf x) {
  return reciprocal(1.0f + exp(-at_most(at_least(x, -87.0f), 87.0f)));
}
// Far below zero, where x times what a bounded exponent leaves would not vanish, x is bounded as well.
FK_INLINE vf silu(vf x) {
  return at_least(x, -87.0f) * sigmoid(x);
}
FK_INLINE vf tanh(vf x) {
  const vf a = magnitude(x), z = a * a;
  vf p = z * -5.70498872745e-3f + 2.06390887954e-2f;  // Cephes, tanhf
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const vf small = p * z * x + x;
  const vf large = 1.0f - 2.0f * reciprocal(exp(2.0f * at_most(a, 20.0f)) + 1.0f);
  return a < 0.625f ? small : as_float(as_bits(large) | (as_bits(x) & 0x80000000u));
}
FK_INLINE vf gelu_tanh(vf x) {  // x (1 + tanh u) / 2 = x sigmoid(2 u)
  return at_least(x, -11.0f) * sigmoid(x * (1.5957691216f + 0.07135481283f * (x * x)));
}
// x Phi(x) = max(x, 0) - |x| Phi(-|x|), and Phi(-a) = exp(-a^2 / 2) t P(t) with t = 1 / (1 + c a)
FK_INLINE vf gelu(vf x) {
  const vf a = at_most(magnitude(x), 13.0f);
  const vf t = reciprocal(1.0f + 0.3f * a);
  vf p = t * 0.0361949973f + -0.159378844f;  // least relative error, 1.1e-7
  p = p * t + 0.210119219f;
  p = p * t + -0.0571680437f;
  p = p * t + 0.130416772f;
  p = p * t + 0.099347039f;
  p = p * t + 0.120845542f;
  p = p * t + 0.119623262f;
  const vf tail = exp(-0.5f * (a * a)) * (p * t);
  return at_least(x, 0.0f) - a * tail;
}
FK_INLINE vf mish(vf x) {  // x tanh(log(1 + e)) = x w / (w + 2), w = e (e + 2)
  const vf bounded = at_least(x, -87.0f), e = exp(at_most(bounded, 40.0f)), w = e * (e + 2.0f);
  return bounded * (w * reciprocal(w + 2.0f));
}
// max(x, 0) + log(1 + e) with e = exp(-|x|), and log(1 + e) = 2 artanh(e / (e + 2)), whose argument is 1 / 3 at most
FK_INLINE vf softplus(vf x) {
  const vf e = exp(-at_most(magnitude(x), 87.0f)), s = e * reciprocal(e + 2.0f), z = s * s;
  vf p = z * 0.133333333f + 0.153846154f;
  p = p * z + 0.181818182f;
  p = p * z + 0.222222222f;
  p = p * z + 0.285714286f;
  p = p * z + 0.4f;
  p = p * z + 0.666666667f;
  p = p * z + 2.0f;
  return at_least(x, 0.0f) + s * p;
}
FK_INLINE vf elu(vf x, float alpha) {
  const Exp e = exp_parts(at_least(at_most(x, 0.0f), -87.0f));
  return x > 0.0f ? x : alpha * (e.rest * e.scale + (e.scale - 1.0f));
}

}  // namespace FK_ISA
}  // namespace fk

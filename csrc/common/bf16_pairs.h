// Products of pairs of bfloat16, summed in float32: the instructions of avx512_bf16. In the set emulated_bf16, which
// test_kernels has for processors without them, the same in plain C++, bit for bit as Intel's manual has it: nearest,
// ties to even, subnormal inputs and results zero, the second product of a pair added before the first.
// Only for <op>/avx512_bf16.cpp and amx.cpp, as common/simd.h.
#pragma once

#include "common/simd.h"

namespace fk {
namespace baseline {}
namespace avx512 {}
namespace FK_ISA {

#if defined(FK_EMULATED_BF16)
namespace below = ::fk::baseline;  // where an op's other work is done
#else
namespace below = ::fk::avx512;
#endif

typedef vu bf16_pairs;  // the first of each pair in the low bits
typedef uint32_t bf16_pairs_mem __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));

FK_INLINE bf16_pairs load_pairs(const void* p) {
  return *(const bf16_pairs_mem*)p;
}
FK_INLINE void store_pairs(void* p, bf16_pairs v) {
  *(bf16_pairs_mem*)p = v;
}
FK_INLINE bf16_pairs splat_pair(const void* p) {
  uint32_t pair;
  memcpy(&pair, p, sizeof(pair));
  return pair - bf16_pairs{};
}

#if defined(FK_EMULATED_BF16)
FK_INLINE vu without_subnormals(vu bits) {
  return (bits & 0x7f800000u) == 0u ? bits & 0x80000000u : bits;
}
FK_INLINE vf add_product(vf sum, vu a, vu b) {  // exact in float64 but for one rounding, which float32's repeats
  const vf s = as_float(without_subnormals(as_bits(sum)));
  const vf x = as_float(without_subnormals(a)), y = as_float(without_subnormals(b));
  vf out;
  for (int l = 0; l < kFloats; l++) {
    const double exact = double(x[l]) * double(y[l]) + double(s[l]);
    out[l] = __builtin_fabs(exact) < 0x1.ffffffp-127 ? float(__builtin_copysign(0.0, exact)) : float(exact);
  }
  return out;
}
FK_INLINE vf add_products(vf sum, bf16_pairs a, bf16_pairs b) {
  sum = add_product(sum, a & 0xffff0000u, b & 0xffff0000u);
  return add_product(sum, a << 16, b << 16);
}
FK_INLINE vu rounded_bf16(vf v) {  // in the low bits
  const vu u = without_subnormals(as_bits(v)), nan = (vu)(v != v);
  return (((u + 0x7fffu + ((u >> 16) & 1u)) & ~nan) | ((u | 0x400000u) & nan)) >> 16;
}
FK_INLINE bf16_pairs round_to_pairs(vf first, vf second) {
  const vu low = rounded_bf16(first), high = rounded_bf16(second);
  bf16_pairs out;
  for (int l = 0; l < kFloats / 2; l++) {
    out[l] = low[2 * l] | low[2 * l + 1] << 16;
    out[kFloats / 2 + l] = high[2 * l] | high[2 * l + 1] << 16;
  }
  return out;
}
#else
// sum + a b of each pair
FK_INLINE vf add_products(vf sum, bf16_pairs a, bf16_pairs b) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
// All numbers of `first` and then of `second`, side by side
FK_INLINE bf16_pairs round_to_pairs(vf first, vf second) {
  return (bf16_pairs)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
#endif

}  // namespace FK_ISA
}  // namespace fk

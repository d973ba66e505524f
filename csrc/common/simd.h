// Vectors of the widest kind that this instruction set has, on the compiler's own vector types.
// Only for <op>/cpu.cpp. Everything is static or in the instruction set's namespace: an inline function shared
// between two instruction sets would be merged by the linker, and the merged one may not run everywhere.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FK_INLINE static inline __attribute__((always_inline))

namespace fk {
namespace FK_ISA {

#if defined(__AVX512F__) || defined(FK_EMULATED_BF16)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kFloats = kVectorBytes / 4;

typedef float vf __attribute__((vector_size(kVectorBytes)));
typedef float vf_mem __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef double vd __attribute__((vector_size(kVectorBytes)));
typedef double vd_mem __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
typedef uint32_t vu __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vh __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t vh_mem __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct NoLow {};  // the type of a low-precision output that is not wanted

// The vector in which elements of a tensor are computed with, and its length.
template <class T>
struct Vector {
  using type = vf;
  static constexpr int n = kFloats;
};
template <>
struct Vector<double> {
  using type = vd;
  static constexpr int n = kVectorBytes / 8;
};

FK_INLINE vf as_float(vu u) {
  return (vf)u;
}
FK_INLINE vu as_bits(vf f) {
  return (vu)f;
}
FK_INLINE vf splat(float a) {
  return a - vf{};  // a + 0 would be another operation: it takes the sign from -0
}
// Keeps a loaded vector in a register. The compiler would rather load it again for each of its uses.
template <class V>
FK_INLINE void hold(V& v) {
#if defined(FK_EMULATED_BF16)  // longer than a register
  (void)v;
#elif defined(__x86_64__)
  asm("" : "+v"(v));
#endif
}

// A product that is rounded before it is added to: the compiler would else be free to contract it with the sum.
template <class V>
FK_INLINE V rounded(V v) {
#if defined(FK_EMULATED_BF16)
  asm("" : "+m"(v));
#elif defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

// ---- loads: kFloats elements as float, or kVectorBytes / 8 as double ----
FK_INLINE vf load(const float* p) {
  return *(const vf_mem*)p;
}
FK_INLINE vd load(const double* p) {
  return *(const vd_mem*)p;
}
FK_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)  // gcc widens the halves one by one
  return as_float((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return as_float((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  return as_float(__builtin_convertvector(*(const vh_mem*)p, vu) << 16);
#endif
}
FK_INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  const vu h = __builtin_convertvector(*(const vh_mem*)p, vu);
  const vf scaled = as_float((h & 0x7fffu) << 13) * 0x1p112f;  // right for subnormals too
  const vu special = (vu)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return as_float(as_bits(scaled) | special | ((h & 0x8000u) << 16));
#endif
}

// ---- stores ----
FK_INLINE void store(float* p, vf v) {
  *(vf_mem*)p = v;
}
FK_INLINE void store(double* p, vd v) {
  *(vd_mem*)p = v;
}
FK_INLINE void store(bf16* p, vf v) {  // to nearest, ties to even; NaN stays NaN
  const vu u = as_bits(v);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (vu)(v != v);
  *(vh_mem*)p = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), vh);
}
FK_INLINE void store(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kFloats; i++) {
    uint32_t u;
    const float f = v[i];
    memcpy(&u, &f, 4);
    const uint16_t sign = uint16_t(u >> 16 & 0x8000u);
    u &= 0x7fffffffu;
    if (u >= 0x47800000u) {  // 65536 and up, Inf, NaN
      p[i].bits = sign | (u > 0x7f800000u ? 0x7e00u : 0x7c00u);
    } else if (u < 0x38800000u) {  // subnormal in half precision: let the adder round
      float m;
      memcpy(&m, &u, 4);
      m += 0.5f;
      memcpy(&u, &m, 4);
      p[i].bits = sign | uint16_t(u - 0x3f000000u);
    } else {
      p[i].bits = sign | uint16_t((u + 0xc8000fffu + (u >> 13 & 1u)) >> 13);
    }
  }
#endif
}

template <class H>  // bf16, f16: through float32, as torch does
FK_INLINE void store(H* p, vd v) {
  float f[kFloats] = {};
  H all[kFloats];
  for (int i = 0; i < kFloats / 2; i++) f[i] = float(v[i]);
  store(all, load(f));
  memcpy((void*)p, all, kFloats / 2 * sizeof(H));
}
FK_INLINE void store(NoLow*, vf) {}
FK_INLINE void store(NoLow*, vd) {}

// ---- stores past the caches, to addresses that are multiples of the bytes stored ----
// For more than the caches hold: a line is then not read only to be overwritten. stream_fence() after the last one.
FK_INLINE void stream(float* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__) && !defined(FK_EMULATED_BF16)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
FK_INLINE void stream(double* p, vd v) {
  stream((float*)p, (vf)v);
}
template <class H>  // bf16, f16: rounded as by store
FK_INLINE void stream(H* p, vf v) {
  alignas(32) H h[kFloats];
  store(h, v);
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, _mm256_load_si256((const __m256i*)h));
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, _mm_load_si128((const __m128i*)h));
#else
  memcpy((void*)p, h, sizeof(h));
#endif
}
template <class H>
FK_INLINE void stream(H* p, vd v) {
  store(p, v);
}
FK_INLINE void stream(NoLow*, vf) {}
FK_INLINE void stream(NoLow*, vd) {}
FK_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- sums of the lanes of four vectors, added to four doubles in a row ----
FK_INLINE void add_lane_sums(double* out, vf a, vf b, vf c, vf d) {
#if defined(__AVX2__)
  typedef double d4 __attribute__((vector_size(32), aligned(8), may_alias));
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 q = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(q), _mm512_extractf32x8_ps(q, 1));
#else
  const __m256 h = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
#endif
  const __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  *(d4*)out += (d4)_mm256_cvtps_pd(s);
#else
  for (int l = 0; l < kFloats; l++) out[0] += a[l], out[1] += b[l], out[2] += c[l], out[3] += d[l];
#endif
}
FK_INLINE void add_lane_sums(double* out, vd a, vd b, vd c, vd d) {
  for (int l = 0; l < kVectorBytes / 8; l++) out[0] += a[l], out[1] += b[l], out[2] += c[l], out[3] += d[l];
}

}  // namespace FK_ISA
}  // namespace fk

#include "ceilings/ceilings.h"
#include "common/simd.h"
#include "common/threads.h"

namespace fk {
namespace FK_ISA {

double multiply_adds(int64_t rounds, int threads, float* sink) {
  constexpr int kChains = 12;  // more than latency times units on any core, and 16 registers hold them
  parallel(threads, [&](int p) {
    const vf scale = vf{} + 0.999f, shift = vf{} + 0.001f;
    vf x[kChains];
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) x[i] = vf{} + 0.1f * float(i);
    for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 12
      for (int i = 0; i < kChains; i++) x[i] = x[i] * scale + shift;
    vf sum = {};
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) sum += x[i];
    if (p == 0) *sink = sum[0];
  });
  return 2.0 * kChains * kFloats * double(rounds) * threads;
}

void triad(const float* a, const float* b, float s, float* out, int64_t n, int threads) {
  parallel(threads, [&](int p) {
    const int64_t lines = n / 64, end = lines * (p + 1) / threads * 64;
    for (int64_t i = lines * p / threads * 64; i < end; i += kFloats) stream(out + i, load(a + i) + s * load(b + i));
    stream_fence();
  });
  for (int64_t i = n / 64 * 64; i < n; i++) out[i] = a[i] + s * b[i];
}

void read_again(const float* a, int64_t n, int64_t rounds, int threads, float* sink) {
  constexpr int kSums = 8;  // so that no sum waits for itself
  parallel(threads, [&](int p) {
    const int64_t blocks = n / (kSums * kFloats), end = blocks * (p + 1) / threads * kSums * kFloats;
    vf sum[kSums] = {};
    for (int64_t r = 0; r < rounds; r++)
      for (int64_t i = blocks * p / threads * kSums * kFloats; i < end; i += kSums * kFloats)
#pragma GCC unroll 8
        for (int k = 0; k < kSums; k++) sum[k] += load(a + i + k * kFloats);
    for (int k = 1; k < kSums; k++) sum[0] += sum[k];
    if (p == 0) *sink = sum[0][0];
  });
}

}  // namespace FK_ISA
}  // namespace fk

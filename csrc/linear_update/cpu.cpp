// Memory bound: every term is read once, and the sum stays in registers, four vectors at a time.
#include "common/memory.h"
#include "common/simd.h"
#include "common/threads.h"
#include "linear_update/linear_update.h"

namespace fk {
namespace FK_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements over all terms that a thread must have for a second one to pay
constexpr int kUnroll = 4;

// kUnroll or one vector at element i
template <class X, class V, class Low, int N>
FK_INLINE void update(const LinearUpdateArgs& a, int64_t i, bool past) {
  constexpr int L = Vector<X>::n;
  const X scale = X(a.scale);
  typename Vector<X>::type sum[N];
#pragma GCC unroll 4
  for (int k = 0; k < N; k++) sum[k] = rounded(scale * load(static_cast<const X*>(a.x) + i + k * L));
  for (int64_t t = 0; t < a.terms; t++) {
    const V* v = static_cast<const V*>(a.v[t]) + i;
    const X b = X(a.b[t]);
#pragma GCC unroll 4
    for (int k = 0; k < N; k++) sum[k] += b * load(v + k * L);
  }
  X* out = static_cast<X*>(a.out) + i;
  Low* low = static_cast<Low*>(a.low);
#pragma GCC unroll 4
  for (int k = 0; k < N; k++)
    if (past) {
      stream(out + k * L, sum[k]);
      stream(low ? low + i + k * L : nullptr, sum[k]);
    } else {
      store(out + k * L, sum[k]);
      store(low ? low + i + k * L : nullptr, sum[k]);
    }
}

// The last few elements, through padded copies: the same arithmetic everywhere.
template <class X, class V, class Low>
void update_rest(const LinearUpdateArgs& a, int64_t i, int64_t rest) {
  constexpr int L = Vector<X>::n;
  X x[L] = {}, out[L];
  Low low[L];
  memcpy(x, static_cast<const X*>(a.x) + i, rest * sizeof(X));
  auto sum = rounded(X(a.scale) * load(x));
  for (int64_t t = 0; t < a.terms; t++) {
    V v[L] = {};
    memcpy(static_cast<void*>(v), static_cast<const V*>(a.v[t]) + i, rest * sizeof(V));
    sum += X(a.b[t]) * load(v);
  }
  store(out, sum);
  store(low, sum);
  memcpy(static_cast<X*>(a.out) + i, out, rest * sizeof(X));
  if (a.low) memcpy(static_cast<void*>(static_cast<Low*>(a.low) + i), low, rest * sizeof(Low));
}

template <class X, class V, class Low>
void run(const LinearUpdateArgs& a) {
  constexpr int L = Vector<X>::n;
  const int64_t want = (a.n * (a.terms + 2) + kGrain - 1) / kGrain, lines = (a.n + 63) / 64;
  const int64_t most = want < lines ? want : lines;
  const int parts = int(most < a.threads ? most : a.threads);
  // parts begin at a multiple of 64 elements, so the vectors are aligned where the tensors are
  const bool aligned = uintptr_t(a.out) % kVectorBytes == 0 && uintptr_t(a.low) % (kVectorBytes / 2) == 0;
  const bool past = aligned && a.out != a.x && past_caches(a.n * int64_t(sizeof(X)) / (parts > 0 ? parts : 1));
  parallel(parts, [&](int p) {
    int64_t i = lines * p / parts * 64, end = lines * (p + 1) / parts * 64;
    if (end > a.n) end = a.n;
    for (; i + kUnroll * L <= end; i += kUnroll * L) update<X, V, Low, kUnroll>(a, i, past);
    for (; i + L <= end; i += L) update<X, V, Low, 1>(a, i, past);
    if (past) stream_fence();
    if (i < end) update_rest<X, V, Low>(a, i, end - i);
  });
}

template <class X, class V>
void by_low(const LinearUpdateArgs& a) {
  if (!a.low)
    run<X, V, NoLow>(a);
  else if (a.low_type == Dtype::bf16)
    run<X, V, bf16>(a);
  else
    run<X, V, f16>(a);
}

}  // namespace

void linear_update(const LinearUpdateArgs& a) {
  if (a.x_type == Dtype::f64) return by_low<double, double>(a);
  switch (a.v_type) {
    case Dtype::bf16: return by_low<float, bf16>(a);
    case Dtype::f16: return by_low<float, f16>(a);
    default: return by_low<float, float>(a);
  }
}

}  // namespace FK_ISA
}  // namespace fk

// Memory bound: every input is read once and every output written once.
#include "common/memory.h"
#include "common/simd.h"
#include "common/threads.h"
#include "euler_step/euler_step.h"

namespace fk {
namespace FK_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread must have for a second one to pay

// One vector. The state in X, the velocity in V, the second output in Low.
template <class X, class V, bool Guided, class Low>
FK_INLINE void step(const X* x, const V* v, const V* u, X* out, Low* low, X h, X w, bool past) {
  typename Vector<X>::type vel = load(v);
  if constexpr (Guided) {
    const auto base = load(u);
    vel = base + w * (vel - base);
  }
  const auto next = load(x) + h * vel;
  if (past) {
    stream(out, next);
    stream(low, next);
  } else {
    store(out, next);
    store(low, next);
  }
}

template <class X, class V, bool Guided, class Low>
void range(const EulerStepArgs& a, int64_t begin, int64_t end, bool past) {
  constexpr int L = Vector<X>::n;
  const X* x = static_cast<const X*>(a.x);
  const V *v = static_cast<const V*>(a.v), *u = static_cast<const V*>(a.v_uncond);
  X* out = static_cast<X*>(a.out);
  Low* low = static_cast<Low*>(a.low);
  const X h = X(a.h), w = X(a.guidance);
  int64_t i = begin;
  for (; i + L <= end; i += L)
    step<X, V, Guided, Low>(x + i, v + i, Guided ? u + i : nullptr, out + i, low ? low + i : nullptr, h, w, past);
  if (past) stream_fence();
  if (const int64_t rest = end - i) {  // the last few through a padded copy: the same arithmetic everywhere
    X xs[L] = {}, os[L];
    V vs[L] = {}, us[L] = {};
    Low ls[L];
    memcpy(xs, x + i, rest * sizeof(X));
    memcpy(vs, v + i, rest * sizeof(V));
    if constexpr (Guided) memcpy(us, u + i, rest * sizeof(V));
    step<X, V, Guided, Low>(xs, vs, us, os, ls, h, w, false);
    memcpy(out + i, os, rest * sizeof(X));
    if (low) memcpy(static_cast<void*>(low + i), ls, rest * sizeof(Low));
  }
}

template <class X, class V, bool Guided, class Low>
void run(const EulerStepArgs& a) {
  const int64_t want = (a.n + kGrain - 1) / kGrain;
  const int parts = int(want < a.threads ? want : a.threads);
  // parts begin at a multiple of 64 elements, so the vectors are aligned where the tensors are
  const bool aligned = uintptr_t(a.out) % kVectorBytes == 0 && uintptr_t(a.low) % (kVectorBytes / 2) == 0;
  const bool past = aligned && a.out != a.x && past_caches(a.n * int64_t(sizeof(X)) / (parts > 0 ? parts : 1));
  parallel(parts, [&](int p) {
    const int64_t lines = (a.n + 63) / 64;  // parts begin at a multiple of 64 elements
    const int64_t begin = lines * p / parts * 64, end = lines * (p + 1) / parts * 64;
    range<X, V, Guided, Low>(a, begin, end < a.n ? end : a.n, past);
  });
}

template <class X, class V, bool Guided>
void by_low(const EulerStepArgs& a) {
  if (!a.low)
    run<X, V, Guided, NoLow>(a);
  else if (a.low_type == Dtype::bf16)
    run<X, V, Guided, bf16>(a);
  else
    run<X, V, Guided, f16>(a);
}

template <class X, class V>
void by_guidance(const EulerStepArgs& a) {
  a.v_uncond ? by_low<X, V, true>(a) : by_low<X, V, false>(a);
}

}  // namespace

void euler_step(const EulerStepArgs& a) {
  if (a.x_type == Dtype::f64) return by_guidance<double, double>(a);
  switch (a.v_type) {
    case Dtype::bf16: return by_guidance<float, bf16>(a);
    case Dtype::f16: return by_guidance<float, f16>(a);
    default: return by_guidance<float, float>(a);
  }
}

}  // namespace FK_ISA
}  // namespace fk

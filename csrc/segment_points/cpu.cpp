// Memory bound: a row is read and written once, in blocks, so that a few long rows keep all threads at work too.
#include "common/memory.h"
#include "common/simd.h"
#include "common/threads.h"
#include "segment_points/segment_points.h"

namespace fk {
namespace FK_ISA {
namespace {

constexpr int64_t kBlock = 16384;  // elements

template <class X, class Out, bool Lerp>
FK_INLINE void point(const X* a, const X* b, X u, Out* out, bool past) {
  auto x = load(a);
  if constexpr (Lerp) x += u * (load(b) - x);
  past ? stream(out, x) : store(out, x);
}

template <class X, class Out, bool Lerp>
void points(const X* a, const X* b, X u, Out* out, int64_t n, bool past) {
  constexpr int L = Vector<X>::n;
  int64_t i = 0;
  for (; i + L <= n; i += L) point<X, Out, Lerp>(a + i, b + i, u, out + i, past);
  if (const int64_t rest = n - i) {  // through padded copies: the same arithmetic everywhere
    X as[L] = {}, bs[L] = {};
    Out os[L];
    memcpy(as, a + i, rest * sizeof(X));
    if constexpr (Lerp) memcpy(bs, b + i, rest * sizeof(X));
    point<X, Out, Lerp>(as, bs, u, os, false);
    memcpy(static_cast<void*>(out + i), os, rest * sizeof(Out));
  }
}

template <class X, class Out>
int64_t run(const SegmentPointsArgs& g) {
  for (int64_t r = 0; r < g.B; r++)
    if (g.interval[r] < 0 || g.interval[r] > g.knots - 2 || g.sample[r] < 0 || g.sample[r] >= g.samples) return r;
  const int64_t blocks = (g.D + kBlock - 1) / kBlock, items = g.B * blocks;
  const int64_t want = (g.B * g.D + kBlock - 1) / kBlock;
  const int parts = int(want < g.threads ? want : g.threads);
  const bool aligned = uintptr_t(g.out) % kVectorBytes == 0 && g.D * sizeof(Out) % kVectorBytes == 0;
  const bool past = aligned && past_caches(g.B * g.D * int64_t(sizeof(Out)) / (parts > 0 ? parts : 1));
  parallel(parts, [&](int p) {
    const int64_t end = items * (p + 1) / parts;
    for (int64_t item = items * p / parts; item < end; item++) {
      const int64_t r = item / blocks, c = item % blocks * kBlock, n = g.D - c < kBlock ? g.D - c : kBlock;
      const X* a = static_cast<const X*>(g.bank) + (g.interval[r] * g.samples + g.sample[r]) * g.D + c;
      Out* out = static_cast<Out*>(g.out) + r * g.D + c;
      if (g.u)
        points<X, Out, true>(a, a + g.samples * g.D, X(static_cast<const double*>(g.u)[r]), out, n, past);
      else
        points<X, Out, false>(a, a, 0, out, n, past);
    }
    if (past) stream_fence();
  });
  return -1;
}

template <class X>
int64_t by_out(const SegmentPointsArgs& g) {
  switch (g.out_type) {
    case Dtype::bf16: return run<X, bf16>(g);
    case Dtype::f16: return run<X, f16>(g);
    default: return run<X, X>(g);
  }
}

}  // namespace

int64_t segment_points(const SegmentPointsArgs& g) {
  return g.bank_type == Dtype::f64 ? by_out<double>(g) : by_out<float>(g);
}

}  // namespace FK_ISA
}  // namespace fk

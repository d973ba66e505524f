// Memory bound: for the squared error every input is read once. The gradient of pseudo-Huber needs the whole sample's
// error first, so there each sample is read a second time, from the cache where it fits.
// Squares are summed in blocks of at most 16,384 elements, whatever the threads, so results do not depend on them.
#include "common/memory.h"
#include "common/simd.h"
#include "common/threads.h"
#include "straighten_loss/straighten_loss.h"

namespace fk {
namespace FK_ISA {
namespace {

constexpr int64_t kBlock = 16384;  // elements
constexpr int64_t kRun = 1024;     // elements summed in X before the sum moves to double

template <class X, class V>
struct Row {
  const V* v;
  const X *a, *b;
  V* gradient;
  X h;
};

// gradient = scale * e where it is wanted; returns e
template <class X, class V, bool Gradient>
FK_INLINE typename Vector<X>::type error(const V* v, const X* a, const X* b, V* gradient, X h, X scale, bool past) {
  const typename Vector<X>::type e = load(v) - (load(b) - load(a)) / h;
  if constexpr (Gradient) past ? stream(gradient, scale * e) : store(gradient, scale * e);
  return e;
}

// Sum of squared errors over columns [begin, end)
template <class X, class V, bool Gradient>
double errors(const Row<X, V>& row, int64_t begin, int64_t end, X scale, bool past) {
  using T = typename Vector<X>::type;
  constexpr int L = Vector<X>::n;
  double total = 0;
  int64_t i = begin;
  while (i + L <= end) {
    const int64_t stop = i + kRun < end ? i + kRun : end;
    T sum[4] = {};
    auto at = [&](int64_t c) {
      return error<X, V, Gradient>(row.v + c, row.a + c, row.b + c, Gradient ? row.gradient + c : nullptr, row.h, scale,
                                   past);
    };
    for (; i + 4 * L <= stop; i += 4 * L)
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        const T e = at(i + k * L);
        sum[k] += e * e;
      }
    for (; i + L <= stop; i += L) {
      const T e = at(i);
      sum[0] += e * e;
    }
    double parts[4] = {};
    add_lane_sums(parts, sum[0], sum[1], sum[2], sum[3]);
    total += (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
  if (const int64_t rest = end - i) {  // through padded copies, whose error is zero beyond the end
    V v[L] = {}, gradient[L];
    X a[L] = {}, b[L] = {};
    memcpy(static_cast<void*>(v), row.v + i, rest * sizeof(V));
    memcpy(a, row.a + i, rest * sizeof(X));
    memcpy(b, row.b + i, rest * sizeof(X));
    const T e = error<X, V, Gradient>(v, a, b, gradient, row.h, scale, false);
    double parts[4] = {};
    add_lane_sums(parts, e * e, T{}, T{}, T{});
    total += parts[0];
    if constexpr (Gradient) memcpy(static_cast<void*>(row.gradient + i), gradient, rest * sizeof(V));
  }
  return total;
}

template <class X, class V>
int64_t run(const StraightenLossArgs& g) {
  for (int64_t r = 0; r < g.B; r++)
    if (g.interval[r] < 0 || g.interval[r] > g.knots - 2 || g.sample[r] < 0 || g.sample[r] >= g.samples) return r;

  const auto *step_sizes = static_cast<const double*>(g.step_sizes), *weight = static_cast<const double*>(g.weight);
  auto *per_sample = static_cast<double*>(g.per_sample), *per_interval = static_cast<double*>(g.per_interval);
  const bool huber = g.huber_c > 0;
  const int64_t blocks = (g.D + kBlock - 1) / kBlock, items = g.B * blocks;
  const int64_t want = g.D > 0 ? (g.B * g.D + kBlock - 1) / kBlock : 1;  // without features the losses are 0 / 0
  const int parts = int(want < g.threads ? want : g.threads);
  const bool aligned = uintptr_t(g.gradient) % kVectorBytes == 0 && g.D * sizeof(V) % kVectorBytes == 0;
  const bool past = aligned && past_caches(g.B * g.D * int64_t(sizeof(V)) / (parts > 0 ? parts : 1));
  double* partial = static_cast<double*>(allocate(size_t(items) * sizeof(double)));

  auto row = [&](int64_t r) {
    const X* a = static_cast<const X*>(g.bank) + (g.interval[r] * g.samples + g.sample[r]) * g.D;
    V* gradient = g.gradient ? static_cast<V*>(g.gradient) + r * g.D : nullptr;
    return Row<X, V>{static_cast<const V*>(g.v) + r * g.D, a, a + g.samples * g.D, gradient,
                     X(step_sizes[g.interval[r]])};
  };
  auto factor = [&](int64_t r) { return (weight ? weight[r] : 1.0) / double(g.B) / double(g.D); };
  auto block = [&](int64_t r, int64_t i) {
    const int64_t begin = i * kBlock, end = g.D - begin < kBlock ? g.D : begin + kBlock;
    if (g.gradient && !huber)
      partial[r * blocks + i] = errors<X, V, true>(row(r), begin, end, X(2 * factor(r)), past);
    else
      partial[r * blocks + i] = errors<X, V, false>(row(r), begin, end, 0, false);
  };
  auto finish = [&](int64_t r) {
    double square = 0;
    for (int64_t i = 0; i < blocks; i++) square += partial[r * blocks + i];
    square /= double(g.D);
    // a difference of two nearly equal roots, written so that nothing cancels
    per_sample[r] = huber ? square / (__builtin_sqrt(square + g.huber_c * g.huber_c) + g.huber_c) : square;
  };
  auto huber_gradient = [&](int64_t r, int64_t begin, int64_t end) {
    errors<X, V, true>(row(r), begin, end, X(factor(r) / (per_sample[r] + g.huber_c)), past);
  };

  if (g.B >= parts) {  // whole samples to each thread
    parallel(parts, [&](int p) {
      const int64_t end = g.B * (p + 1) / parts;
      for (int64_t r = g.B * p / parts; r < end; r++) {
        for (int64_t i = 0; i < blocks; i++) block(r, i);
        finish(r);
        if (g.gradient && huber) huber_gradient(r, 0, g.D);
      }
      if (past) stream_fence();
    });
  } else {
    parallel(parts, [&](int p) {
      for (int64_t i = items * p / parts; i < items * (p + 1) / parts; i++) block(i / blocks, i % blocks);
      if (past) stream_fence();
    });
    for (int64_t r = 0; r < g.B; r++) finish(r);
    if (g.gradient && huber)
      parallel(parts, [&](int p) {
        for (int64_t i = items * p / parts; i < items * (p + 1) / parts; i++) {
          const int64_t begin = i % blocks * kBlock;
          huber_gradient(i / blocks, begin, g.D - begin < kBlock ? g.D : begin + kBlock);
        }
        if (past) stream_fence();
      });
  }
  release(partial);

  double loss = 0;
  for (int64_t i = 0; i + 1 < g.knots; i++) per_interval[i] = 0;
  for (int64_t r = 0; r < g.B; r++) {
    loss += (weight ? weight[r] : 1.0) * per_sample[r];
    per_interval[g.interval[r]] += per_sample[r];
  }
  *static_cast<double*>(g.loss) = loss / double(g.B);
  for (int64_t i = 0; i + 1 < g.knots; i++) {
    int64_t count = 0;
    for (int64_t r = 0; r < g.B; r++) count += g.interval[r] == i;
    per_interval[i] /= double(count);  // 0 / 0 is the NaN of an interval that was not drawn
  }
  return -1;
}

}  // namespace

int64_t straighten_loss(const StraightenLossArgs& g) {
  if (g.bank_type == Dtype::f64) return run<double, double>(g);
  switch (g.v_type) {
    case Dtype::bf16: return run<float, bf16>(g);
    case Dtype::f16: return run<float, f16>(g);
    default: return run<float, float>(g);
  }
}

}  // namespace FK_ISA
}  // namespace fk

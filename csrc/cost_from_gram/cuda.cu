// A block has 32 rows j of costs and goes along k, 32 columns at a time. First a warp is a column: its lanes add up the
// products of a_k with the increments before it, from row k of the symmetric matrix, for every j. Then a warp is a row:
// the recursion along k is three prefix sums over lanes (five with states), carried on from one 32 to the next.
#include "common/cuda.h"
#include "cost_from_gram/cost_from_gram.h"

namespace fk {
namespace cuda {

constexpr int kSide = 32;
constexpr unsigned kAll = 0xffffffffu;

// value of this lane and those before it, and of the lane before: `carry` for the first
struct Prefix {
  double here, before;
};
__device__ __forceinline__ Prefix prefix(double value, double carry, int lane) {
#pragma unroll
  for (int d = 1; d < kSide; d *= 2) {
    const double other = __shfl_up_sync(kAll, value, d);
    if (lane >= d) value += other;
  }
  value += carry;
  const double before = __shfl_up_sync(kAll, value, 1);
  return {value, lane ? before : carry};
}
__device__ __forceinline__ double from_last(double value) {
  return __shfl_sync(kAll, value, kSide - 1);
}

template <bool states>
__global__ void __launch_bounds__(kSide* kSide)
    cost_from_gram_kernel(const double* gram, const double* t, int64_t K, double* cost) {
  FK_SHARED(double, steps, [2][kSide][kSide + 1]);  // |B(j, k)|^2 - |B(j, k-1)|^2 and <S(j, k), a_k> at [k][j]
  const int lane = threadIdx.x % kSide, warp = threadIdx.x / kSide;
  const int64_t R = states ? 2 * K - 1 : K - 1, j0 = int64_t(blockIdx.x) * kSide, j = j0 + warp;
  double BB = 0, SB = 0, SS = 0, Be = 0, Se = 0;  // at the last k of the 32 before
  for (int64_t k0 = 0; k0 <= K; k0 += kSide) {
    const int64_t k = k0 + lane;
    if (k0 + kSide <= j0 + 1) {  // k <= j throughout
      if (j <= K) cost[j * (K + 1) + k] = INFINITY;
      continue;
    }
    const int64_t column = k0 + warp;
    double b = 0, s = 0, far_b = 0, far_s = 0, square = 0;  // sums over m > j, those that all rows share, |a_k|^2
    if (column > j0 && column < K) {
      const double* a = gram + (column - 1) * R;  // <a_column, a_m> at m - 1
      const double end = t[column];
      square = a[column - 1];
      int64_t m = j0 + 1 + lane;
      if (m < column) b = a[m - 1], s = (end - t[m]) * b;
#pragma unroll 4
      for (m += kSide; m < column; m += kSide) far_b += a[m - 1], far_s += (end - t[m]) * a[m - 1];
    }
#pragma unroll
    for (int d = 1; d < kSide; d *= 2) {
      const double next_b = __shfl_down_sync(kAll, b, d), next_s = __shfl_down_sync(kAll, s, d);
      if (lane + d < kSide) b += next_b, s += next_s;
      far_b += __shfl_xor_sync(kAll, far_b, d);
      far_s += __shfl_xor_sync(kAll, far_s, d);
    }
    steps[0][warp][lane] = 2 * (b + far_b) + square;
    steps[1][warp][lane] = s + far_s;
    __syncthreads();

    const bool step = j < k && k <= K, inner = step && k < K;
    const double h = step ? t[k] - t[k - 1] : 0;
    const Prefix bb = prefix(inner ? steps[0][lane][warp] : 0, BB, lane);
    const Prefix sb = prefix(h * bb.before + (inner ? steps[1][lane][warp] : 0), SB, lane);
    const Prefix ss = prefix(2 * h * sb.before + h * h * bb.before, SS, lane);
    double c = ss.here;
    if constexpr (states) {
      const double* e = gram + (K - 1 + j) * R;  // <e_j, a_k> at k - 1
      const Prefix be = prefix(inner ? e[k - 1] : 0, Be, lane);
      const Prefix se = prefix(h * be.before, Se, lane);
      const double span = step ? t[k] - t[j] : 0;
      c += 2 * span * se.here + span * span * (step ? e[K - 1 + j] : 0);
      Be = from_last(be.here);
      Se = from_last(se.here);
    }
    // rounding may leave a residual of zero at -1e-17; NaN stays
    if (j <= K && k <= K) cost[j * (K + 1) + k] = !step ? double(INFINITY) : c < 0 ? 0 : c;
    BB = from_last(bb.here);
    SB = from_last(sb.here);
    SS = from_last(ss.here);
    __syncthreads();  // the next 32 take the place of these
  }
}

int cost_from_gram(const CostFromGramArgs& g, void* stream) {
  const dim3 grid(static_cast<unsigned>((g.K + kSide) / kSide));
  auto run = [&](auto kernel) {
    FK_LAUNCH(kernel, grid, dim3(kSide * kSide), 0, stream, g.gram, g.times, g.K, g.cost);
    return launched();
  };
  return g.states ? run(cost_from_gram_kernel<true>) : run(cost_from_gram_kernel<false>);
}

}  // namespace cuda
}  // namespace fk

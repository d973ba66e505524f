// A launch for each step, since a step needs all values of the step before. A block is one j and 32 knots k, which
// lanes take, so that rows of costs are read in order; its warps share the knots i, with several rows in flight, and
// then find the least of their sums. i ascends in a warp and only a strictly smaller sum, or an equal one of a smaller
// i, replaces: ties go to the smaller i. The first launch looks for NaN and -Inf, and the others ask what it found.
#include "bellman_pairs/bellman_pairs.h"
#include "common/cuda.h"

namespace fk {
namespace cuda {

constexpr int kLanes = 32, kWarps = 8, kInFlight = 4;

// costs (i, j, k) of i, i + kWarps, ..., and Inf from `end` on
__device__ __forceinline__ void load_costs(double (&c)[kInFlight], const double* column, int64_t n, int64_t i,
                                           int64_t end) {
#pragma unroll
  for (int r = 0; r < kInFlight; r++) c[r] = i + r * kWarps < end ? column[(i + r * kWarps) * n * n] : double(INFINITY);
}

__global__ void __launch_bounds__(kLanes* kWarps)
    bellman_pairs_check_kernel(const double* first, const double* cost, int64_t n, unsigned long long* bad) {
  const int64_t j = blockIdx.y, k = int64_t(blockIdx.x) * kLanes + threadIdx.x, end = k < n && j < k ? j : 0;
  const unsigned long long none = ~0ull;
  unsigned long long mine = none;
  if (threadIdx.y == 0 && j == 0 && k > 0 && k < n && !(first[k] > -INFINITY)) mine = k;
#pragma unroll 1
  for (int64_t i = threadIdx.y; i < end; i += kWarps * kInFlight) {
    double c[kInFlight];
    load_costs(c, cost + j * n + k, n, i, end);
#pragma unroll
    for (int r = 0; r < kInFlight; r++) {
      const unsigned long long place = n + ((i + r * kWarps) * n + j) * n + k;
      if (!(c[r] > -INFINITY) && place < mine) mine = place;
    }
  }
  if (mine != none) atomicMin(bad, mine);
}

// Steps 0 and 1, which have no costs of pairs.
__global__ void __launch_bounds__(kLanes* kWarps)
    bellman_pairs_start_kernel(const double* first, int64_t n, double* value, int64_t* parent, const int64_t* bad) {
  const int64_t j = int64_t(blockIdx.y) * kWarps + threadIdx.y, k = int64_t(blockIdx.x) * kLanes + threadIdx.x;
  if (j >= n || k >= n) return;
  const bool refused = *bad != -1;
  const int64_t at = j * n + k;
  value[at] = refused ? NAN : at ? double(INFINITY) : 0;
  value[n * n + at] = refused ? NAN : j == 0 && k > 0 ? first[k] : double(INFINITY);
  parent[at] = parent[n * n + at] = -1;
}

// value and parent are those of this step, before those of the step before: of the pairs (i, j), begin <= i < end.
__global__ void __launch_bounds__(kLanes* kWarps)
    bellman_pairs_step_kernel(const double* cost, int64_t n, int64_t begin, int64_t end, const double* before,
                              double* value, int64_t* parent, const int64_t* bad) {
  FK_SHARED(double, sums, [kWarps][kLanes]);
  FK_SHARED(int64_t, knots, [kWarps][kLanes]);
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t j = blockIdx.y, k = int64_t(blockIdx.x) * kLanes + lane;
  if (end > j) end = j;
  double best = INFINITY;
  int64_t from = -1;
  if (j < k && k < n)
#pragma unroll 1
    for (int64_t i = begin + warp; i < end; i += kWarps * kInFlight) {
      double c[kInFlight];
      load_costs(c, cost + j * n + k, n, i, end);
#pragma unroll
      for (int r = 0; r < kInFlight; r++) {
        const int64_t knot = i + r * kWarps;
        if (knot >= end) continue;
        const double sum = before[knot * n + j] + c[r];
        if (sum < best) best = sum, from = knot;
      }
    }
  sums[warp][lane] = best, knots[warp][lane] = from;
  __syncthreads();
  if (warp || k >= n) return;
#pragma unroll
  for (int w = 1; w < kWarps; w++) {
    const double sum = sums[w][lane];
    const int64_t knot = knots[w][lane];
    if (sum < best || (sum == best && knot < from)) best = sum, from = knot;
  }
  const bool refused = *bad != -1;
  value[j * n + k] = refused ? double(NAN) : best;
  parent[j * n + k] = refused ? -1 : from;
}

int bellman_pairs(const BellmanPairsArgs& a, void* stream) {
  const int64_t n = a.n, plane = n * n;
  const unsigned rows = static_cast<unsigned>(n), columns = static_cast<unsigned>((n + kLanes - 1) / kLanes);
  const dim3 block(kLanes, kWarps), grid(columns, rows);
  FK_LAUNCH(bellman_pairs_check_kernel, grid, block, 0, stream, a.first, a.cost, n,
            reinterpret_cast<unsigned long long*>(a.bad));
  FK_LAUNCH(bellman_pairs_start_kernel, dim3(columns, (rows + kWarps - 1) / kWarps), block, 0, stream, a.first, n,
            a.value, a.parent, a.bad);
  for (int64_t s = 2; s <= a.steps; s++) {
    // a pair (0, j) ends one step and no other; knot i > 0 is at most the i-th of a path
    const int64_t begin = s == 2 ? 0 : s - 2, end = s == 2 ? 1 : n;
    FK_LAUNCH(bellman_pairs_step_kernel, grid, block, 0, stream, a.cost, n, begin, end, a.value + (s - 1) * plane,
              a.value + s * plane, a.parent + s * plane, a.bad);
  }
  return launched();
}

}  // namespace cuda
}  // namespace fk

// A step needs all values of the step before. Up to 32 knots one block makes all steps: a warp is one j, and its lanes
// the knots k, so that rows of costs are read in order, from the second time on out of the L1. With more knots a step
// is a launch: a block is one j and 32 knots k, of which one at least comes after j, and its warps share the knots i,
// with several rows in flight, and then find the least of their sums. Of equal sums the one of the smaller i is taken,
// wherever two meet. Step 2 reads all costs and looks for NaN and -Inf; the last one asks what was found.
#include "bellman_pairs/bellman_pairs.h"
#include "common/cuda.h"

namespace fk {
namespace cuda {

constexpr int kLanes = 32, kWarps = 8, kInFlight = 4;
constexpr unsigned long long kNone = ~0ull;  // -1 as a place: none
constexpr int64_t kCached = 24 << 20;  // bytes of costs that are taken to stay in the L2 until the next step

__global__ void __launch_bounds__(kLanes* kLanes)
    bellman_pairs_kernel(const double* first, const double* cost, int n, int steps, double* value, int64_t* parent,
                         int64_t* bad) {
  FK_SHARED(double, last, [2][kLanes][kLanes]);
  FK_SHARED(unsigned long long, found, [1]);
  const int k = threadIdx.x, j = threadIdx.y, at = j * n + k, plane = n * n;
  const int pairs = j < k && k < n ? j : 0;  // pairs (i, j) before k
  const double inf = INFINITY;
  // f(knot i, cost) for begin <= i < end
  auto each_cost = [&](int begin, int end, auto f) {
#pragma unroll 1
    for (int i = begin; i < end; i += 2 * kInFlight) {
      double c[2 * kInFlight];
#pragma unroll
      for (int r = 0; r < 2 * kInFlight; r++) c[r] = i + r < end ? cost[(i + r) * plane + at] : inf;
#pragma unroll
      for (int r = 0; r < 2 * kInFlight; r++)
        if (i + r < end) f(i + r, c[r]);
    }
  };
  if (at == 0) found[0] = kNone;
  unsigned long long mine = j == 0 && k > 0 && k < n && !(first[k] > -inf) ? k : kNone;
  each_cost(0, pairs, [&](int i, double c) {
    if (!(c > -inf) && mine == kNone) mine = n + i * plane + at;
  });
  __syncthreads();
  if (mine != kNone) atomicMin(found, mine);
  __syncthreads();
  const bool refused = found[0] != kNone, is_pair = j < n && k < n;
  if (at == 0) *bad = static_cast<int64_t>(found[0]);
  const double one = j == 0 && k > 0 && k < n ? first[k] : inf;
  last[1][j][k] = one;
  if (is_pair) {
    value[at] = refused ? NAN : at ? inf : 0, value[plane + at] = refused ? NAN : one;
    parent[at] = parent[plane + at] = -1;
  }
  for (int s = 2; s <= steps; s++) {
    __syncthreads();
    const double (&before)[kLanes][kLanes] = last[(s - 1) % 2];
    double best = inf;
    int from = -1;
    // a pair (0, j) ends one step and no other; knot i > 0 is at most the i-th of a path
    each_cost(s == 2 ? 0 : s - 2, s == 2 && pairs > 1 ? 1 : pairs, [&](int i, double c) {
      const double sum = before[i][j] + c;
      if (sum < best) best = sum, from = i;
    });
    last[s % 2][j][k] = best;
    if (is_pair) value[s * plane + at] = refused ? double(NAN) : best, parent[s * plane + at] = refused ? -1 : from;
  }
}

// ---- a launch for each step ----

// Steps 0 and 1, which have no costs of pairs; of the others, by blockIdx.y, what no step writes.
__global__ void __launch_bounds__(kLanes* kWarps)
    bellman_pairs_start_kernel(const double* first, int n, double* value, int64_t* parent, int64_t* bad) {
  const int j = blockIdx.x * kWarps + threadIdx.y, s = blockIdx.y;
  if (j == 0 && s == 0 && threadIdx.x == 0) *bad = -1;
  if (j >= n) return;
  const int end = s < 2 || j == 0 ? n : j + 1;
  for (int k = threadIdx.x; k < end; k += kLanes) {
    const int64_t at = (int64_t(s) * n + j) * n + k;
    value[at] = at == 0 ? 0 : s == 1 && j == 0 && k > 0 ? first[k] : double(INFINITY);
    parent[at] = -1;
  }
}

__device__ __forceinline__ bool is_refused(const int64_t* bad, int64_t entries, double* value, int64_t* parent) {
  if (*bad == -1) return false;
  const int64_t block = blockIdx.x * kWarps + threadIdx.y, threads = int64_t(gridDim.x) * kWarps * kLanes;
  for (int64_t i = block * kLanes + threadIdx.x; i < entries; i += threads) value[i] = NAN, parent[i] = -1;
  return true;
}
__global__ void __launch_bounds__(kLanes* kWarps)
    bellman_pairs_refused_kernel(const int64_t* bad, int64_t entries, double* value, int64_t* parent) {
  is_refused(bad, entries, value, parent);
}

// The pair of knots j and tile of knots k at a place among those that have a j < k, those with most i before j first.
// With j + 1 in the tile of the number `band`, the tiles are those from `band` on.
struct Block {
  int j, tile;
};
__device__ __forceinline__ Block block_at(int place, int tiles) {
  int band = tiles - 1;
  for (; place >= kLanes * (tiles - band); band--) place -= kLanes * (tiles - band);
  const int wide = tiles - band;
  return {band * kLanes + kLanes - 2 - place / wide, band + place % wide};
}
inline int blocks_of(int tiles) {
  return kLanes * tiles * (tiles + 1) / 2;
}

// Step s from the one before, of pairs (i, j), begin <= i < end; nothing is written of a step after the last.
// check: also looks for what is refused, with all i. back: from the last block to the first.
template <bool check>
__global__ void __launch_bounds__(kLanes* kWarps)
    bellman_pairs_step_kernel(const double* first, const double* cost, int n, int s, int steps, int begin, bool back,
                              double* value, int64_t* parent, int64_t* bad) {
  FK_SHARED(double, sums, [kWarps][kLanes]);
  FK_SHARED(int, knots, [kWarps][kLanes]);
  const int64_t plane = int64_t(n) * n;
  if (!check && s == steps && is_refused(bad, (steps + 1) * plane, value, parent)) return;
  const int lane = threadIdx.x, warp = threadIdx.y;
  const Block own = block_at(back ? gridDim.x - 1 - blockIdx.x : blockIdx.x, (n + kLanes - 1) / kLanes);
  const int j = own.j, k = own.tile * kLanes + lane, end = j < k && k < n ? j : 0;
  const double* before = value + (s - 1) * plane;
  double best = INFINITY;
  int from = -1;
  unsigned long long mine = kNone;
  if (check && warp == 0 && j == 0 && k > 0 && k < n && !(first[k] > -INFINITY)) mine = k;
#pragma unroll 1
  for (int i = begin + warp; i < end; i += kWarps * kInFlight) {
    double c[kInFlight], b[kInFlight];
#pragma unroll
    for (int r = 0; r < kInFlight; r++) {
      const int knot = i + r * kWarps;
      const int64_t pair = int64_t(knot) * n + j;
      c[r] = knot < end ? cost[pair * n + k] : double(INFINITY);
      b[r] = knot < end ? before[pair] : 0;
    }
#pragma unroll
    for (int r = 0; r < kInFlight; r++) {
      const int knot = i + r * kWarps;
      const unsigned long long place = n + (int64_t(knot) * n + j) * n + k;
      if (check && !(c[r] > -INFINITY) && place < mine) mine = place;
      const double sum = b[r] + c[r];
      if (sum < best) best = sum, from = knot;
    }
  }
  if (check && mine != kNone) atomicMin(reinterpret_cast<unsigned long long*>(bad), mine);
  if (s > steps) return;
  sums[warp][lane] = best, knots[warp][lane] = from;
  __syncthreads();
  if (warp || j <= 0 || k <= j || k >= n) return;
#pragma unroll
  for (int w = 1; w < kWarps; w++) {
    const double sum = sums[w][lane];
    const int knot = knots[w][lane];
    if (sum < best || (sum == best && knot < from)) best = sum, from = knot;
  }
  const int64_t at = s * plane + int64_t(j) * n + k;
  value[at] = best, parent[at] = from;
}

int bellman_pairs(const BellmanPairsArgs& a, void* stream) {
  const int n = static_cast<int>(a.n), steps = static_cast<int>(a.steps);
  if (n <= kLanes) {
    FK_LAUNCH(bellman_pairs_kernel, dim3(1), dim3(kLanes, kLanes), 0, stream, a.first, a.cost, n, steps, a.value,
              a.parent, a.bad);
    return launched();
  }
  const dim3 threads(kLanes, kWarps), grid(static_cast<unsigned>(blocks_of((n + kLanes - 1) / kLanes)));
  const bool cached = a.n * a.n * a.n / 6 * 8 <= kCached;
  FK_LAUNCH(bellman_pairs_start_kernel, dim3((n + kWarps - 1) / kWarps, steps + 1), threads, 0, stream, a.first, n,
            a.value, a.parent, a.bad);
  // a pair (0, j) ends one step and no other; knot i > 0 is at most the i-th of a path
  FK_LAUNCH(bellman_pairs_step_kernel<true>, grid, threads, 0, stream, a.first, a.cost, n, 2, steps, 0, false, a.value,
            a.parent, a.bad);
  for (int s = 3; s <= steps; s++)
    FK_LAUNCH(bellman_pairs_step_kernel<false>, grid, threads, 0, stream, a.first, a.cost, n, s, steps, s - 2,
              !cached && s % 2, a.value, a.parent, a.bad);
  if (steps < 3)
    FK_LAUNCH(bellman_pairs_refused_kernel, grid, threads, 0, stream, a.bad, int64_t(steps + 1) * n * n, a.value,
              a.parent);
  return launched();
}

}  // namespace cuda
}  // namespace fk

// One block, because a step needs all values of the step before. Threads are knots k, so that a row of costs is read in
// order, with several rows in flight; the values of the last step, times carry, wait in shared memory, a tile of j at a
// time: as memory holds them, they are rounded before a cost is added. j ascends and only a strictly smaller sum
// replaces, so ties go to the smaller j.
#include "bellman/bellman.h"
#include "common/cuda.h"

namespace fk {
namespace cuda {

constexpr int kThreads = 1024, kTile = 1024, kRows = 8;

// Entries j, j + 1, ... of a column with rows n apart, and Inf from `end` on.
__device__ __forceinline__ void load_rows(double (&rows)[kRows], const double* column, int64_t n, int j, int end) {
#pragma unroll
  for (int i = 0; i < kRows; i++) rows[i] = j + i < end ? column[(j + i) * n] : double(INFINITY);
}

__global__ void __launch_bounds__(kThreads) bellman_kernel(const double* cost, int64_t n, int64_t steps, double carry,
                                                           double* value, int64_t* parent, int64_t* bad) {
  FK_SHARED(double, last, [kTile]);
  FK_SHARED(unsigned long long, first, [1]);
  const int64_t threads = blockDim.x, me = threadIdx.x;
  const double inf = INFINITY;
  const unsigned long long none = ~0ull;

  if (me == 0) first[0] = none;
  unsigned long long mine = none;  // the first place of these columns that holds NaN or -Inf
  for (int64_t k = me; k < n; k += threads)
    for (int j = 0; j < (k | 31); j += kRows) {  // lanes stay on one row
      double rows[kRows];
      load_rows(rows, cost + k, n, j, static_cast<int>(k));
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        const unsigned long long place = (j + i) * n + k;
        if (!(rows[i] > -inf) && place < mine) mine = place;
      }
    }
  __syncthreads();
  if (mine != none) atomicMin(first, mine);
  __syncthreads();
  const bool refused = first[0] != none;
  if (me == 0) *bad = refused ? static_cast<int64_t>(first[0]) : -1;
  if (refused) {
    for (int64_t i = me; i < (steps + 1) * n; i += threads) value[i] = NAN, parent[i] = -1;
    return;
  }

  for (int64_t k = me; k < n; k += threads) value[k] = k ? inf : 0, parent[k] = -1;
  for (int64_t s = 1; s <= steps; s++) {
    const double* before = value + (s - 1) * n;
    for (int64_t start = 0; start < n; start += threads) {
      const int64_t k = start + me, stop = start + threads < n ? start + threads : n;
      double best = inf;
      int64_t from = -1;
      for (int64_t tile = s - 1; tile < stop - 1; tile += kTile) {  // earlier knots are not reached in s - 1 steps
        __syncthreads();
        for (int64_t i = me; i < kTile && tile + i < n; i += threads) last[i] = carry * before[tile + i];
        __syncthreads();
        auto before_knot = [&](int64_t knot) { return int(knot - tile < kTile ? knot - tile : kTile); };  // or negative
        const int end = k < n ? before_knot(k) : 0, warp_end = before_knot(k | 31);
        for (int j = 0; j < warp_end; j += kRows) {
          double rows[kRows];
          load_rows(rows, cost + tile * n + k, n, j, end);
#pragma unroll
          for (int i = 0; i < kRows; i++) {
            if (j + i >= end) continue;
            const double sum = last[j + i] + rows[i];
            if (sum < best) best = sum, from = tile + j + i;
          }
        }
      }
      if (k < n) value[s * n + k] = best, parent[s * n + k] = from;
    }
  }
}

int bellman(const BellmanArgs& a, void* stream) {
  const int64_t threads = a.n < kThreads ? (a.n + 31) / 32 * 32 : kThreads;
  FK_LAUNCH(bellman_kernel, dim3(1), dim3(static_cast<unsigned>(threads)), 0, stream, a.cost, a.n, a.steps, a.carry,
            a.value, a.parent, a.bad);
  return launched();
}

}  // namespace cuda
}  // namespace fk

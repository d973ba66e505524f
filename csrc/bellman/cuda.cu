// One block, because a step needs all values of the step before. Threads are knots k, so that a row of costs is read in
// order, with several rows in flight; the values of the last step wait in shared memory, a tile of j at a time.
// j ascends and only a strictly smaller sum replaces, so ties go to the smaller j.
#include "bellman/bellman.h"
#include "common/cuda.h"

namespace fk {
namespace cuda {

constexpr int kThreads = 1024, kTile = 1024, kRows = 8;

__global__ void __launch_bounds__(kThreads)
    bellman_kernel(const double* cost, int64_t n, int64_t steps, double* value, int64_t* parent, int64_t* bad) {
  FK_SHARED(double, last, [kTile]);
  FK_SHARED(unsigned long long, first, [1]);
  const int64_t threads = blockDim.x, me = threadIdx.x;
  const double inf = INFINITY;
  const unsigned long long none = ~0ull;

  if (me == 0) first[0] = none;
  unsigned long long mine = none;  // the first place of these columns that holds NaN or -Inf
  for (int64_t k = me; k < n; k += threads)
#pragma unroll 8
    for (int64_t j = 0; j < k; j++) {
      const unsigned long long place = j * n + k;
      if (!(cost[place] > -inf) && place < mine) mine = place;
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
        for (int64_t i = me; i < kTile && tile + i < n; i += threads) last[i] = before[tile + i];
        __syncthreads();
        const int64_t most = k < n ? k - tile : 0;
        const int end = static_cast<int>(most < kTile ? most : kTile);  // may be negative
        const double* c = cost + tile * n + k;
        int j = 0;
        for (; j + kRows <= end; j += kRows) {
          double row[kRows];
#pragma unroll
          for (int i = 0; i < kRows; i++) row[i] = c[(j + i) * n];
#pragma unroll
          for (int i = 0; i < kRows; i++) {
            const double sum = last[j + i] + row[i];
            if (sum < best) best = sum, from = tile + j + i;
          }
        }
        for (; j < end; j++) {
          const double sum = last[j] + c[j * n];
          if (sum < best) best = sum, from = tile + j;
        }
      }
      if (k < n) value[s * n + k] = best, parent[s * n + k] = from;
    }
  }
}

int bellman(const BellmanArgs& a, void* stream) {
  const int64_t threads = a.n < kThreads ? (a.n + 31) / 32 * 32 : kThreads;
  FK_LAUNCH(bellman_kernel, dim3(1), dim3(static_cast<unsigned>(threads)), 0, stream, a.cost, a.n, a.steps, a.value,
            a.parent, a.bad);
  return launched();
}

}  // namespace cuda
}  // namespace fk

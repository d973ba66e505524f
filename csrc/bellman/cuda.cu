// A step needs all values of the step before. Up to kMostHeld knots one block makes all steps: a thread is a knot k and
// a kParts-th of the knots j before it, whose costs it keeps in registers; values times carry wait in shared memory: as
// memory holds them, they are rounded before a cost is added. With more knots a step is a launch: a block is some knots
// k and its threads share the knots j. Of equal sums the one of the smaller j is taken, wherever two meet.
#include "bellman/bellman.h"
#include "common/cuda.h"

namespace fk {
namespace cuda {

constexpr unsigned kAll = 0xffffffffu;
constexpr unsigned long long kNone = ~0ull;  // -1 as a place: none

struct Best {
  double sum = INFINITY;
  int knot = -1;
};
__device__ __forceinline__ void meet(Best& best, double sum, int knot) {
  if (sum < best.sum || (sum == best.sum && knot < best.knot)) best.sum = sum, best.knot = knot;
}
// Of the lanes that differ in the bits from `first` on, before `end`.
__device__ __forceinline__ void meet_lanes(Best& best, int first, int end) {
#pragma unroll
  for (int d = first; d < end; d *= 2) {
    const double sum = __shfl_xor_sync(kAll, best.sum, d);
    meet(best, sum, __shfl_xor_sync(kAll, best.knot, d));
  }
}

constexpr int kParts = 8, kMostHeld = 128;

template <int kHeld>  // costs of a thread
__global__ void __launch_bounds__(kParts * kParts * kHeld)
    bellman_kernel(const double* cost, int n, int steps, double carry, double* value, int64_t* parent, int64_t* bad) {
  FK_SHARED(double, last, [2][kParts * kHeld]);
  FK_SHARED(unsigned long long, first, [1]);
  const int me = threadIdx.x, threads = blockDim.x, part = me % kParts, k = me / kParts;
  const double inf = INFINITY;

  double held[kHeld];
#pragma unroll
  for (int r = 0; r < kHeld; r++) {
    const int j = part + r * kParts;
    held[r] = j < k && k < n ? cost[j * n + k] : inf;
  }
  if (me == 0) first[0] = kNone;
  for (int i = me; i < kParts * kHeld; i += threads) last[0][i] = i ? inf : 0, last[1][i] = inf;
  unsigned long long mine = kNone;  // the first of these places that holds NaN or -Inf
#pragma unroll
  for (int r = kHeld - 1; r >= 0; r--)
    if (!(held[r] > -inf)) mine = (part + r * kParts) * n + k;
  __syncthreads();
  if (mine != kNone) atomicMin(first, mine);
  __syncthreads();
  const bool refused = first[0] != kNone;
  if (me == 0) *bad = static_cast<int64_t>(first[0]);
  if (refused) {
    for (int i = me; i < (steps + 1) * n; i += threads) value[i] = NAN, parent[i] = -1;
    return;
  }

  for (int i = me; i < n; i += threads) value[i] = i ? inf : 0, parent[i] = -1;
  const int warp_end = (me | 31) / kParts;  // the largest k of the warp
  for (int s = 1; s <= steps; s++) {
    const double* before = last[(s - 1) % 2];
    Best best;
#pragma unroll
    for (int r = 0; r < kHeld; r++) {
      if (r * kParts >= warp_end) break;
      const double sum = before[part + r * kParts] + held[r];
      if (sum < best.sum) best = {sum, part + r * kParts};
    }
    meet_lanes(best, 1, kParts);
    if (part == 0 && k < n) {
      last[s % 2][k] = carry * best.sum;
      value[s * n + k] = best.sum, parent[s * n + k] = best.knot;
    }
    __syncthreads();
  }
}

// ---- a launch for each step ----

constexpr int kColumns = 8, kRows = 32 / kColumns, kWarps = 16, kInFlight = 4;  // rows of a warp, and of a thread

// No step and one, which has one way to go.
__global__ void __launch_bounds__(256)
    bellman_start_kernel(const double* cost, int n, double* value, int64_t* parent, int64_t* bad) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k == 0) *bad = -1;
  if (k >= n) return;
  value[k] = k ? double(INFINITY) : 0, parent[k] = -1;
  const double c = k ? cost[k] : double(INFINITY);
  value[n + k] = c, parent[n + k] = c < INFINITY ? 0 : -1;
}

__device__ __forceinline__ bool is_refused(const int64_t* bad, int64_t entries, double* value, int64_t* parent) {
  if (*bad == -1) return false;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < entries; i += threads)
    value[i] = NAN, parent[i] = -1;
  return true;
}
__global__ void __launch_bounds__(32 * kWarps)
    bellman_refused_kernel(const int64_t* bad, int64_t entries, double* value, int64_t* parent) {
  is_refused(bad, entries, value, parent);
}

// Step s from the one before, which has reached no knot before `begin`; nothing is written of a step after the last.
// check: also looks for what is refused, with begin = 0. The last one asks what was found, and fills the tables then.
template <bool check>
__global__ void __launch_bounds__(32 * kWarps)
    bellman_step_kernel(const double* cost, int n, int s, int steps, int begin, double carry, double* value,
                        int64_t* parent, int64_t* bad) {
  FK_SHARED(double, sums, [kWarps][kColumns]);
  FK_SHARED(int, knots, [kWarps][kColumns]);
  if (!check && s == steps && is_refused(bad, int64_t(steps + 1) * n, value, parent)) return;
  constexpr int kApart = kRows * kWarps;
  const int me = threadIdx.x, first = blockIdx.x * kColumns, k = first + me % kColumns, end = k < n ? k : 0;
  const double *column = cost + k, *before = value + int64_t(s - 1) * n;
  Best best;
  unsigned long long mine = kNone;
#pragma unroll 1
  for (int j = begin + me / kColumns; j < first + kColumns - 1; j += kApart * kInFlight) {
    double c[kInFlight], b[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      const int at = j + i * kApart;
      c[i] = at < end ? column[int64_t(at) * n] : double(INFINITY);
      b[i] = at < end ? before[at] : 0;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      const int at = j + i * kApart;
      const unsigned long long place = int64_t(at) * n + k;
      if (check && !(c[i] > -INFINITY) && place < mine) mine = place;
      const double sum = __dmul_rn(carry, b[i]) + c[i];
      if (sum < best.sum) best = {sum, at};
    }
  }
  if (check && mine != kNone) atomicMin(reinterpret_cast<unsigned long long*>(bad), mine);
  if (s > steps) return;
  meet_lanes(best, kColumns, 32);
  if (me % 32 < kColumns) sums[me / 32][me % 32] = best.sum, knots[me / 32][me % 32] = best.knot;
  __syncthreads();
  if (me >= kColumns || k >= n) return;
#pragma unroll
  for (int w = 1; w < kWarps; w++) meet(best, sums[w][me], knots[w][me]);
  value[int64_t(s) * n + k] = best.sum, parent[int64_t(s) * n + k] = best.knot;
}

int bellman(const BellmanArgs& a, void* stream) {
  const int n = static_cast<int>(a.n), steps = static_cast<int>(a.steps);
  auto hold = [&](auto kernel) {
    const unsigned threads = (n * kParts + 31) / 32 * 32;
    FK_LAUNCH(kernel, dim3(1), dim3(threads), 0, stream, a.cost, n, steps, a.carry, a.value, a.parent, a.bad);
    return launched();
  };
  if (n <= 4 * kParts) return hold(bellman_kernel<4>);
  if (n <= 8 * kParts) return hold(bellman_kernel<8>);
  if (n <= kMostHeld) return hold(bellman_kernel<kMostHeld / kParts>);

  const dim3 blocks((n + kColumns - 1) / kColumns), threads(32 * kWarps);
  FK_LAUNCH(bellman_start_kernel, dim3((n + 255) / 256), dim3(256), 0, stream, a.cost, n, a.value, a.parent, a.bad);
  FK_LAUNCH(bellman_step_kernel<true>, blocks, threads, 0, stream, a.cost, n, 2, steps, 0, a.carry, a.value, a.parent,
            a.bad);
  for (int s = 3; s <= steps; s++)
    FK_LAUNCH(bellman_step_kernel<false>, blocks, threads, 0, stream, a.cost, n, s, steps, s - 1, a.carry, a.value,
              a.parent, a.bad);
  if (steps < 3)
    FK_LAUNCH(bellman_refused_kernel, blocks, threads, 0, stream, a.bad, int64_t(steps + 1) * n, a.value, a.parent);
  return launched();
}

}  // namespace cuda
}  // namespace fk

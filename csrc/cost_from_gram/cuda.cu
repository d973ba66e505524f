// A block is up to kParts rows j of costs and goes along k, kColumns at a time. First a thread is a column k and a part
// of the increments m before it, whose products with a_k it adds up: those that all rows have, and by itself the first,
// which is only in the rows before it. Then a warp is a row: along k the recursion is linear in |B|^2, <S, B> and
// |S|^2, so that runs of columns are joined as in a prefix sum over lanes, and carried on to the next kColumns.
#include "common/cuda.h"
#include "cost_from_gram/cost_from_gram.h"

namespace fk {
namespace cuda {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kOfLane = 4, kColumns = 32 * kOfLane, kParts = 8, kInFlight = 4;
// Columns in shared memory, as threads write them and lanes read kOfLane each, without bank conflicts.
constexpr int kApart = 36, kRoom = kOfLane * kApart;
__device__ __forceinline__ int place_of(int column) {
  return column % kOfLane * kApart + column / kOfLane;
}

// Of a run of columns: the sum h of its steps, and the |B|^2, <S, B> and |S|^2 that it ends with when it begins with 0.
struct Run {
  double h, bb, sb, ss;
};
__device__ __forceinline__ Run joined(const Run& a, const Run& b) {
  return {a.h + b.h, a.bb + b.bb, a.sb + b.sb + b.h * a.bb, a.ss + b.ss + 2 * b.h * a.sb + b.h * b.h * a.bb};
}
__device__ __forceinline__ Run before(const Run& run, int lanes) {
  return {__shfl_up_sync(kAll, run.h, lanes), __shfl_up_sync(kAll, run.bb, lanes), __shfl_up_sync(kAll, run.sb, lanes),
          __shfl_up_sync(kAll, run.ss, lanes)};
}
__device__ __forceinline__ Run of_last(const Run& run) {
  return {__shfl_sync(kAll, run.h, 31), __shfl_sync(kAll, run.bb, 31), __shfl_sync(kAll, run.sb, 31),
          __shfl_sync(kAll, run.ss, 31)};
}
// Along kColumns columns with steps h, of which each adds b to |B|^2 and s to <S, B>; `carry` is what is before them,
// and then what is before the next. In the place of b comes |S|^2, or without s, for |B|^2 read <B, e>, <S, e>.
template <bool squared>
__device__ __forceinline__ void along(const double* h, double* b, const double* s, Run& carry) {
  const int lane = threadIdx.x % 32;
  auto column = [&](int i) {
    return Run{h[i * kApart + lane], b[i * kApart + lane], squared ? s[i * kApart + lane] : 0, 0};
  };
  Run run = column(0);
#pragma unroll
  for (int i = 1; i < kOfLane; i++) run = joined(run, column(i));
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const Run other = before(run, d);
    if (lane >= d) run = joined(other, run);
  }
  Run here = before(run, 1);
  here = lane ? joined(carry, here) : carry;
  carry = joined(carry, of_last(run));
#pragma unroll
  for (int i = 0; i < kOfLane; i++) {
    here = joined(here, column(i));
    b[i * kApart + lane] = squared ? here.ss : here.sb;
  }
}

template <bool states>
__global__ void __launch_bounds__(kColumns* kParts)
    cost_from_gram_kernel(const double* gram, const double* t, int K, int rows, double* cost) {
  FK_SHARED(double, room, [4 * kParts * kColumns]);  // first sums, then steps
  FK_SHARED(double, h, [kRoom]);
  static_assert(3 * kParts * kRoom <= 4 * kParts * kColumns, "");
  double *sums = room, *steps = room;
  const int column = threadIdx.x % kColumns, part = threadIdx.x / kColumns, warp = threadIdx.x / 32;
  const int R = states ? 2 * K - 1 : K - 1, j0 = blockIdx.x * rows, j = j0 + part;
  const bool is_row = part < rows && j <= K;
  const int64_t row = int64_t(j) * (K + 1);

  const int first = (j0 + 1) / kColumns * kColumns;
  if (is_row)
    for (int k = column; k < first; k += kColumns) cost[row + k] = INFINITY;
  Run carry{0, 0, 0, 0}, carry_e{0, 0, 0, 0};
  for (int k0 = first; k0 <= K; k0 += kColumns) {
    const int k = k0 + column, end = k < K ? k : 0, last = k | 31;  // of the warp
    const int stop = last - 31 >= K ? 0 : last < K ? last : K - 1;
    const double t_k = k <= K ? t[k] : 0;
    const double* a = gram + k - 1;  // <a_m, a_k> at (m - 1) R
    double b = 0, s = 0, far_b = 0, far_s = 0;
    const int near = j0 + 1 + part;
    if (near < end) b = a[int64_t(near - 1) * R], s = (t_k - t[near]) * b;
#pragma unroll 1
    for (int m = near + kParts; m < stop; m += kParts * kInFlight) {
      double product[kInFlight], span[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; i++) {
        const int at = m + i * kParts;
        product[i] = at < end ? a[int64_t(at - 1) * R] : 0;
        span[i] = at < end ? t_k - t[at] : 0;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; i++) far_b += product[i], far_s += span[i] * product[i];
    }
    const bool is_inner = is_row && j < k && k < K;
    const double square = is_inner ? a[int64_t(k - 1) * R] : 0;
    const double e = states && is_inner ? a[int64_t(K - 1 + j) * R] : 0;
    const double sums_of[4] = {b, s, far_b, far_s};
#pragma unroll
    for (int i = 0; i < 4; i++) sums[(i * kParts + part) * kColumns + column] = sums_of[i];
    if (part == 0) h[place_of(column)] = k > 0 && k <= K ? t_k - t[k - 1] : 0;
    __syncthreads();

    b = s = 0;
#pragma unroll
    for (int p = 0; p < kParts; p++) {
      if (p >= part) b += sums[p * kColumns + column], s += sums[(kParts + p) * kColumns + column];
      b += sums[(2 * kParts + p) * kColumns + column], s += sums[(3 * kParts + p) * kColumns + column];
    }
    __syncthreads();
    double* own = steps + part * kRoom + place_of(column);
    own[0] = is_inner ? 2 * b + square : 0;
    own[kParts * kRoom] = is_inner ? s : 0;
    if (states) own[2 * kParts * kRoom] = e;
    __syncthreads();

    if (warp < rows) {
      double* of_row = steps + warp * kRoom;
      along<true>(h, of_row, of_row + kParts * kRoom, carry);
      if (states) along<false>(h, of_row + 2 * kParts * kRoom, nullptr, carry_e);
    }
    __syncthreads();
    if (is_row && k <= K) {
      double c = own[0];
      if (states) {
        const double span = t_k - t[j];
        c += 2 * span * own[2 * kParts * kRoom] + span * span * (j < k ? gram[int64_t(K - 1 + j) * (R + 1)] : 0);
      }
      // rounding may leave a residual of zero at -1e-17; NaN stays
      cost[row + k] = j >= k ? double(INFINITY) : c < 0 ? 0 : c;
    }
    __syncthreads();
  }
}

int cost_from_gram(const CostFromGramArgs& g, void* stream) {
  const int K = static_cast<int>(g.K);
  int rows = 1;
  while (rows < kParts && (K + rows) / rows > multiprocessors()) rows *= 2;
  auto run = [&](auto kernel) {
    FK_LAUNCH(kernel, dim3((K + rows) / rows), dim3(kColumns * kParts), 0, stream, g.gram, g.times, K, rows, g.cost);
    return launched();
  };
  return g.states ? run(cost_from_gram_kernel<true>) : run(cost_from_gram_kernel<false>);
}

}  // namespace cuda
}  // namespace fk

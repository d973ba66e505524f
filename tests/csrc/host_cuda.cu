// Kernels for tests of the emulation and of the checks.
#include "common/cuda.h"

namespace fk {
namespace cuda {

// ---- a kernel that is right, and variants of it with one bug each ----
// A comment that names a variant marks the lines of which its report has to name one.

constexpr int kThreads = 64, kColumns = 4;

enum Bug {
  none,
  missing_barrier,
  missing_wait,
  missing_atomic,
  missing_fence,
  overrun,
  shared_overrun,
  divergent_shuffle,
  shuffle_from_outside,
  divergent_barrier,
  early_exit,
  uninitialised_shared,
  uninitialised_global,
  unwritten_output,
  misaligned,
  shared_store,
  kBugs
};

struct Arrays {
  const float* x;   // [n, 4]
  float* sums;      // [n] of the rows
  float* scratch;   // [blocks]
  float* total;     // [1]
  unsigned* done;   // [1] blocks, 0 before and after
  unsigned* large;  // [1] counts sums that are > 0
  int n;
};

// Every thread copies one row into shared memory and sums that of another; the block that is done last adds all up.
template <Bug bug>
__global__ void seeded_bug_kernel(Arrays a) {
  FK_SHARED(float, rows, [kThreads][kColumns]);
  FK_SHARED(float, parts, [kThreads / 32]);
  FK_SHARED(bool, last, [1]);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, row = blockIdx.x * kThreads + thread;
  if (bug == early_exit && row >= a.n) return;
  cp_async16(rows[thread], row < a.n ? a.x + row * kColumns : a.x, row < a.n ? 16 : 0);
  cp_async_commit();
  if (bug != missing_wait) cp_async_wait<0>();
  if (bug == missing_barrier) {
  } else if (bug != divergent_barrier || warp == 0) {
    __syncthreads();  // divergent_barrier, early_exit
  }

  const int other = kThreads - 1 - thread, other_row = row - thread + other;
  float sum = 0;
  for (int c = 0; c < kColumns; c++) sum += rows[other][c];  // missing_barrier, missing_wait
  if (bug == shared_overrun) sum += rows[other + 1][0];      // shared_overrun
  if (bug == shared_store) {
    const float four[4] = {};
    store_vector(rows[other], four);  // shared_store
  }
  if ((other_row < a.n || bug == overrun) && (bug != unwritten_output || thread != 5)) {
    const float two[2] = {sum, sum};
    if (bug == misaligned)
      store_vector(a.sums + 1, two);  // misaligned
    else
      a.sums[other_row] = sum;  // overrun
  }
  if (sum > 0) {
    if (bug == missing_atomic)
      *a.large += 1;  // missing_atomic
    else
      atomicAdd(a.large, 1);
  }

  for (int step = 16; step > 0; step /= 2) {
    if (bug == shuffle_from_outside)
      sum += __shfl_sync(lane < 16 ? 0xffffu : 0xffff0000u, sum, 0);  // shuffle_from_outside
    else if (bug != divergent_shuffle || other_row < a.n)
      sum += __shfl_xor_sync(~0u, sum, step);  // divergent_shuffle
  }
  if (lane == 0 && (bug != uninitialised_shared || warp == 0)) parts[warp] = sum;
  __syncthreads();
  if (thread == 0) {
    if (bug != uninitialised_global || blockIdx.x != 1)
      a.scratch[blockIdx.x] = parts[0] + parts[1];  // uninitialised_shared
    if (bug != missing_fence) __threadfence();
    last[0] = atomicInc(a.done, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last[0] && thread == 0) {
    float total = 0;
    for (unsigned b = 0; b < gridDim.x; b++) total += a.scratch[b];  // missing_fence, uninitialised_global
    *a.total = total;
  }
}

template <int bug = 0>
int run(int wanted, const Arrays& a) {
  if constexpr (bug < kBugs) {
    if (bug != wanted) return run<bug + 1>(wanted, a);
    const int blocks = (a.n + kThreads - 1) / kThreads;
    FK_LAUNCH(seeded_bug_kernel<Bug(bug)>, dim3(blocks), dim3(kThreads), 0, nullptr, a);
  }
  return launched();
}

int seeded_bug(int bug, const float* x, float* sums, float* scratch, float* total, unsigned* done, unsigned* large,
               int n) {
  return run(bug, {x, sums, scratch, total, done, large, n});
}

// ---- a product of matrices by one warp ----

template <class T>
__global__ void product_kernel(const T* a, const T* b, float* d, int depth) {
  FK_SHARED(T, tile, [24][16]);  // 16 rows of a, then 8 of b
  const int lane = threadIdx.x, part = lane % 2 * 8;
  float sum[4] = {};
  for (int k = 0; k < depth; k += 16) {
    for (int row = lane / 2; row < 24; row += 16)
      cp_async16(tile[row] + part, (row < 16 ? a + row * depth : b + (row - 16) * depth) + k + part);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    uint32_t left[4], right[2];
    ldmatrix_x4(left, tile[lane % 16] + lane / 16 * 8);
    ldmatrix_x2(right, tile[16 + lane % 8] + lane / 8 % 2 * 8);
    mma_m16n8k16<T>(sum, left, right);
    __syncwarp();
  }
  for (int i = 0; i < 4; i++) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// a: [16, depth], b: [8, depth], d: [16, 8].
int product(Dtype type, const void* a, const void* b, float* d, int depth) {
  return with_low_type(type, [&](auto low) {
    using T = typename decltype(low)::type;
    FK_LAUNCH(product_kernel<T>, dim3(1), dim3(32), 0, nullptr, static_cast<const T*>(a), static_cast<const T*>(b), d,
              depth);
    return launched();
  });
}

}  // namespace cuda
}  // namespace fk

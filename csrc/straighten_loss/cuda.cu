// Memory bound. Squares are summed as the errors are formed, and the gradient of the squared error is written in the
// same pass. Pseudo-Huber's needs the sample's sum first: errors of a short sample wait for it in registers, those of a
// long one are formed again, from the L2 cache where they fit. Few long samples are cut in parts, whose number depends
// on the sizes alone, so the same sums are made in the same order on every device.
#include "common/rows_cuda.h"
#include "straighten_loss/straighten_loss.h"

namespace fk {
namespace cuda {

constexpr int kHeld = 4;  // words of a sample whose errors a thread keeps
constexpr unsigned kAll = 0xffffffffu;

template <class X, class V>
struct Job {
  const V* v;
  const X *bank, *step_sizes, *weight;
  const int64_t *interval, *sample;
  X *sums, *loss, *per_sample, *per_interval;
  V* gradient;
  int64_t knots, samples, B, words;  // words: of a row
  X huber_c, features, elements;  // of a sample, and of all
};

// Sum of positive numbers with what its roundings lost.
template <class X>
struct Sum {
  X total = 0, lost = 0;
  __device__ __forceinline__ void add(X x) {
    const X t = total + x, added = t - total;
    lost += (total - (t - added)) + (x - added);
    total = t;
  }
  __device__ __forceinline__ X value() const { return lost == lost ? total + lost : total; }  // Inf has lost NaN
};

// The sum over the threads of a row, the same bits for each of them.
template <class X>
__device__ __forceinline__ X row_sum(X value, X* scratch) {
  for (unsigned d = 1; d < blockDim.x && d < 32; d *= 2) value += __shfl_xor_sync(kAll, value, d);
  if (blockDim.x > 32) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (unsigned i = 0; i < blockDim.x / 32; i++) value += scratch[i];
  }
  return value;
}

__device__ __forceinline__ float root(float x) {
  return sqrtf(x);
}
__device__ __forceinline__ double root(double x) {
  return sqrt(x);
}

// From the sum of a sample's squares.
template <class X, class V>
__device__ __forceinline__ X sample_loss(const Job<X, V>& g, X sum) {
  const X square = sum / g.features;
  return g.huber_c > 0 ? square / (root(square + g.huber_c * g.huber_c) + g.huber_c) : square;
}
template <class X, class V>
__device__ __forceinline__ X huber_scale(const Job<X, V>& g, int64_t row, X loss) {
  return (g.weight ? g.weight[row] : X(1)) / g.elements / (loss + g.huber_c);
}

// Where a row's states are.
template <class X>
struct Place {
  int64_t row = -1;  // in the bank; none for a row past the end or a place out of range
  X inverse = 0;  // of the step
  __device__ __forceinline__ bool inside() const { return row >= 0; }
};
template <class X, class V>
__device__ __forceinline__ Place<X> place(const Job<X, V>& g, int64_t row) {
  if (row >= g.B) return {};
  const int64_t i = g.interval[row], s = g.sample[row];
  if (!in_bank(i, s, g.knots, g.samples)) return {};
  return {i * g.samples + s, 1 / g.step_sizes[i]};
}

// The errors of U words of a row, `stride` words apart, and zeros from word `end` on; all loads are in flight at once.
template <int U, int E, class X, class V>
__device__ __forceinline__ void errors(X (&e)[U][E], const Job<X, V>& g, int64_t row, const Place<X>& at, int64_t w,
                                       int64_t stride, int64_t end) {
  const V* v = g.v + (row * g.words + w) * E;
  const X *first = g.bank + (at.row * g.words + w) * E, *second = first + g.samples * g.words * E;
  V c[U][E] = {};
  X a[U][E] = {}, b[U][E] = {};
#pragma unroll
  for (int n = 0; n < U; n++) {
    if (w + n * stride >= end) continue;
    load_vector(c[n], v + n * stride * E);
    load_vector(a[n], first + n * stride * E);
    load_vector(b[n], second + n * stride * E);
  }
#pragma unroll
  for (int n = 0; n < U; n++)
#pragma unroll
    for (int i = 0; i < E; i++)
      e[n][i] = w + n * stride < end ? convert<X>(c[n][i]) - (b[n][i] - a[n][i]) * at.inverse : 0;
}
template <int E, class X, class V>
__device__ __forceinline__ void write_gradient(V* gradient, const X (&e)[E], X scale) {
  V out[E];
#pragma unroll
  for (int i = 0; i < E; i++) out[i] = convert<V>(scale * e[i]);
  store_vector(gradient, out);
}
template <int E, class X, class V>
__device__ __forceinline__ void refuse_row(V* gradient, int64_t begin, int64_t end) {
  const X none[E] = {};
  for (int64_t w = begin + threadIdx.x; w < end; w += blockDim.x) write_gradient(gradient + w * E, none, X(NAN));
}

// Part blockIdx.y of the rows: sums of squares and, where it is wanted, the gradient. With `known` losses of the
// samples it is that of pseudo-Huber, and the sums are there.
template <class X, class V, int E>
__global__ void __launch_bounds__(kRowBlock) straighten_loss_kernel(Job<X, V> g, int64_t part, bool known) {
  FK_SHARED(X, scratch, [32]);
  constexpr int many = E > 1 ? 2 : 4;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, stride = blockDim.x;
  const int64_t begin = blockIdx.y * part, end = begin + part < g.words ? begin + part : g.words;
  const Place<X> at = place(g, row);
  V* gradient = g.gradient ? g.gradient + row * g.words * E : nullptr;
  Sum<X> sum;
  if (at.inside()) {
    const X scale = !gradient ? 0
                    : known   ? huber_scale(g, row, g.per_sample[row])
                              : 2 * (g.weight ? g.weight[row] : X(1)) / g.elements;
    auto add = [&](auto count, int64_t w) {
      constexpr int U = decltype(count)::value;
      X e[U][E], squares = 0;
      errors(e, g, row, at, w, stride, end);
#pragma unroll
      for (int n = 0; n < U; n++) {
#pragma unroll
        for (int i = 0; i < E; i++) squares += e[n][i] * e[n][i];
        if (gradient) write_gradient(gradient + (w + n * stride) * E, e[n], scale);
      }
      sum.add(squares);
    };
    int64_t w = begin + threadIdx.x;
    for (; w + (many - 1) * stride < end; w += many * stride) add(std::integral_constant<int, many>{}, w);
    for (; w < end; w += stride) add(std::integral_constant<int, 1>{}, w);
  } else if (row < g.B && gradient) {
    refuse_row<E, X>(gradient, begin, end);
  }
  if (known) return;
  const X total = row_sum(sum.value(), scratch);
  if (threadIdx.x || row >= g.B) return;
  const X result = at.inside() ? total : X(NAN);
  if (gridDim.y > 1)
    g.sums[row * gridDim.y + blockIdx.y] = result;
  else
    g.per_sample[row] = sample_loss(g, result);
}

// Pseudo-Huber with its gradient in one pass, for rows of at most kHeld words a thread.
template <class X, class V, int E>
__global__ void __launch_bounds__(kRowBlock) straighten_loss_held_kernel(Job<X, V> g) {
  FK_SHARED(X, scratch, [32]);
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int words = static_cast<int>(g.words), stride = blockDim.x, w = threadIdx.x;
  const Place<X> at = place(g, row);
  X e[kHeld][E], squares = 0;
  errors(e, g, row, at, w, stride, at.inside() ? words : 0);
#pragma unroll
  for (int n = 0; n < kHeld; n++)
#pragma unroll
    for (int i = 0; i < E; i++) squares += e[n][i] * e[n][i];
  const X total = row_sum(squares, scratch);
  if (row >= g.B) return;
  const X loss = sample_loss(g, at.inside() ? total : X(NAN));
  const X scale = huber_scale(g, row, loss);  // NaN makes NaN of zeros
  V* gradient = g.gradient + (row * g.words + w) * E;
#pragma unroll
  for (int n = 0; n < kHeld; n++)
    if (w + n * stride < words) write_gradient(gradient + n * stride * E, e[n], scale);
  if (w == 0) g.per_sample[row] = loss;
}

// Rows that were summed in parts; a warp each.
template <class X, class V>
__global__ void __launch_bounds__(kRowBlock) straighten_loss_join_kernel(Job<X, V> g, int64_t parts) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  X sum = 0;
  for (int64_t i = threadIdx.x; row < g.B && i < parts; i += blockDim.x) sum += g.sums[row * parts + i];
  sum = row_sum<X>(sum, nullptr);
  if (row < g.B && threadIdx.x == 0) g.per_sample[row] = sample_loss(g, sum);
}

// ---- the means: of all samples, weighted, and of those of each interval ----
constexpr int kChunk = 1024, kIntervals = 32;  // samples and intervals of a block

template <class X>
__device__ __forceinline__ X warp_sum(X value) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) value += __shfl_xor_sync(kAll, value, d);
  return value;
}
// `own`: an interval, or after the last one all of them. 0 / 0 is the NaN of an interval that was not drawn.
template <class X, class V>
__device__ __forceinline__ void write_mean(const Job<X, V>& g, int64_t own, X sum, X count) {
  (own == g.knots - 1 ? *g.loss : g.per_interval[own]) = sum / count;
}

// A chunk of samples and some intervals, for each of which a warp looks at the samples in shared memory. Of several
// chunks there are sums and counts.
template <class X, class V>
__global__ void __launch_bounds__(kChunk) straighten_loss_mean_kernel(Job<X, V> g) {
  FK_SHARED(X, scratch, [32]);
  FK_SHARED(X, losses, [kChunk]);
  FK_SHARED(int, intervals, [kChunk]);
  const int thread = threadIdx.x, samples = blockDim.x;
  const int64_t r = int64_t(blockIdx.x) * kChunk + thread, all = g.knots - 1, first = int64_t(blockIdx.y) * kIntervals;
  auto write = [&](int64_t own, X sum, X count) {
    if (gridDim.x == 1) return write_mean(g, own, sum, count);
    X* to = g.sums + 2 * (blockIdx.x * g.knots + own);
    to[0] = sum, to[1] = count;
  };
  const X loss = r < g.B ? g.per_sample[r] : X(0);
  const int64_t interval = r < g.B ? g.interval[r] - first : -1;
  losses[thread] = loss;
  intervals[thread] = uint64_t(interval) < kIntervals ? int(interval) : -1;
  __syncthreads();
  for (int own = thread / 32; own < kIntervals && first + own < all; own += samples / 32) {
    Sum<X> sum;
    X count = 0;
    for (int i = thread % 32; i < samples; i += 32) {
      if (intervals[i] != own) continue;
      sum.add(losses[i]);
      count += 1;
    }
    const X total = warp_sum(sum.value()), found = warp_sum(count);
    if (thread % 32 == 0) write(first + own, total, found);
  }
  if (blockIdx.y) return;
  const X total = row_sum(r < g.B && g.weight ? g.weight[r] * loss : loss, scratch);
  const int64_t left = g.B - int64_t(blockIdx.x) * kChunk;
  if (thread == 0) write(all, total, X(left < kChunk ? left : kChunk));
}

// Of the sums of all chunks, a warp each.
template <class X, class V>
__global__ void __launch_bounds__(kRowBlock) straighten_loss_join_means_kernel(Job<X, V> g, int64_t chunks) {
  const int64_t own = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  Sum<X> sum;
  X count = 0;
  for (int64_t i = threadIdx.x; own < g.knots && i < chunks; i += blockDim.x) {
    const X* from = g.sums + 2 * (i * g.knots + own);
    sum.add(from[0]);
    count += from[1];
  }
  const X total = warp_sum(sum.value()), samples = warp_sum(count);
  if (own < g.knots && threadIdx.x == 0) write_mean(g, own, total, samples);
}

// ---- the gradient times what comes from behind the loss: nothing is moved where that is 1 ----
template <class X, class V, int E>
__global__ void __launch_bounds__(kRowBlock) straighten_loss_scale_kernel(V* gradient, const X* factor, int64_t words) {
  const X scale = *factor;
  if (scale == 1) return;
  for (int64_t w = int64_t(blockIdx.x) * kRowBlock + threadIdx.x; w < words; w += int64_t(gridDim.x) * kRowBlock) {
    V values[E];
    X scaled[E];
    load_vector(values, gradient + w * E);
#pragma unroll
    for (int i = 0; i < E; i++) scaled[i] = convert<X>(values[i]);
    write_gradient(gradient + w * E, scaled, scale);
  }
}

// 2,048 elements or more in each, and blocks enough for the largest devices.
static int64_t parts_of(int64_t B, int64_t D) {
  const int64_t most = B > 0 ? 1024 / B : 1, full = D / 2048, parts = most < full ? most : full;
  return parts > 1 ? parts : 1;
}
static int64_t chunks_of(int64_t B) {
  return B > kChunk ? (B + kChunk - 1) / kChunk : 1;
}
// The parts of rows are added up before there are sums of chunks.
int64_t straighten_loss_partials(int64_t B, int64_t D, int64_t knots) {
  const int64_t parts = parts_of(B, D), chunks = chunks_of(B);
  const int64_t rows = parts > 1 ? B * parts : 0, means = chunks > 1 ? 2 * chunks * knots : 0;
  return rows > means ? rows : means;
}

template <class X, class V>
int run(const StraightenLossArgs& g, void* stream) {
  Job<X, V> job = {static_cast<const V*>(g.v),
                   static_cast<const X*>(g.bank),
                   static_cast<const X*>(g.step_sizes),
                   static_cast<const X*>(g.weight),
                   g.interval,
                   g.sample,
                   static_cast<X*>(g.partial),
                   static_cast<X*>(g.loss),
                   static_cast<X*>(g.per_sample),
                   static_cast<X*>(g.per_interval),
                   static_cast<V*>(g.gradient),
                   g.knots,
                   g.samples,
                   g.B,
                   0,
                   X(g.huber_c),
                   X(g.D),
                   X(double(g.B) * double(g.D))};
  const int64_t parts = parts_of(g.B, g.D);
  auto rows = [&](auto neighbours) {
    constexpr int E = decltype(neighbours)::value;
    job.words = g.D / E;
    const dim3 block = row_block(job.words), grid(row_blocks(g.B, block), static_cast<unsigned>(parts));
    const bool huber_gradient = g.huber_c > 0 && g.gradient;
    if (huber_gradient && parts == 1 && job.words <= kHeld * int64_t(block.x)) {
      FK_LAUNCH((straighten_loss_held_kernel<X, V, E>), grid, block, 0, stream, job);
      return launched();
    }
    const int64_t share = (job.words + parts - 1) / parts, part = (share + kRowBlock - 1) / kRowBlock * kRowBlock;
    Job<X, V> first = job;
    if (huber_gradient) first.gradient = nullptr;
    FK_LAUNCH((straighten_loss_kernel<X, V, E>), grid, block, 0, stream, first, part, false);
    const dim3 warps(32, kRowBlock / 32);
    if (parts > 1)
      FK_LAUNCH((straighten_loss_join_kernel<X, V>), dim3(row_blocks(g.B, warps)), warps, 0, stream, job, parts);
    if (huber_gradient) FK_LAUNCH((straighten_loss_kernel<X, V, E>), grid, block, 0, stream, job, part, true);
    return launched();
  };
  if (g.B > 0) {
    const int status = with_words<16 / sizeof(X)>(g.D, rows, job.v, job.bank, static_cast<const V*>(job.gradient));
    if (status) return status;
  }
  const int64_t chunks = chunks_of(g.B), threads = g.B < kChunk ? (g.B + 31) / 32 * 32 : kChunk;
  const dim3 grid(unsigned(chunks), unsigned((g.knots + kIntervals - 2) / kIntervals)), warps(32, kRowBlock / 32);
  FK_LAUNCH((straighten_loss_mean_kernel<X, V>), grid, dim3(unsigned(threads > 32 ? threads : 32)), 0, stream, job);
  if (chunks > 1)
    FK_LAUNCH((straighten_loss_join_means_kernel<X, V>), dim3(row_blocks(g.knots, warps)), warps, 0, stream, job,
              chunks);
  return launched();
}

template <class X, class V>
int scale(const StraightenLossScaleArgs& g, void* stream) {
  auto* gradient = static_cast<V*>(g.gradient);
  return with_words<16 / sizeof(V)>(
      g.n,
      [&](auto neighbours) {
        constexpr int E = decltype(neighbours)::value;
        const int64_t words = g.n / E, blocks = (words + kRowBlock - 1) / kRowBlock, most = 8 * multiprocessors();
        FK_LAUNCH((straighten_loss_scale_kernel<X, V, E>), dim3(unsigned(blocks < most ? blocks : most)),
                  dim3(kRowBlock), 0, stream, gradient, static_cast<const X*>(g.factor), words);
        return launched();
      },
      gradient);
}
int straighten_loss_scale(const StraightenLossScaleArgs& g, void* stream) {
  if (g.n == 0) return launched();
  if (g.bank_type == Dtype::f64) return scale<double, double>(g, stream);
  if (g.v_type == Dtype::f32) return scale<float, float>(g, stream);
  return with_low_type(g.v_type, [&](auto v) { return scale<float, typename decltype(v)::type>(g, stream); });
}

int straighten_loss(const StraightenLossArgs& g, void* stream) {
  if (g.bank_type == Dtype::f64) return run<double, double>(g, stream);
  if (g.v_type == Dtype::f32) return run<float, float>(g, stream);
  return with_low_type(g.v_type, [&](auto v) { return run<float, typename decltype(v)::type>(g, stream); });
}

}  // namespace cuda
}  // namespace fk

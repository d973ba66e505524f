// Memory bound on z where a token has few outputs: z is read from device memory once.
//
// Many tokens of a sample: a block takes 64 of them and a slice of their features, which stream through shared memory,
// and a second kernel adds the slices up and takes the steps. As many slices as fill the multiprocessors; weights are
// read once for 64 tokens.
//
// Fewer: a block takes a tile of tokens, all of their features, into shared memory; with guidance the same tokens of
// both halves. LayerNorm's mean and squares of deviations are taken from there in turn. Its warps share the features:
// each multiplies its own, for all tokens of the tile and the outputs of the block, on tensor cores, and the sums of
// the warps are added in a fixed order. The velocities go from there into the state.
//
//   z [tile, d] --cp.async--> shared --f, parts--> A   W [outputs, d] --> B   A B -> [warp, tile, outputs] -> state
//
// Tensor cores multiply 16-bit numbers. f and float32 weights are cut into three bf16 numbers that add up to them
// exactly, float16 weights into two; products below 2^-22 of the first are left out. bf16 tokens that go into the
// Linear as they are, with bf16 weights, need no parts.
//
// A feature's place in the sum is free as long as A and B agree: a lane takes four neighbours of a row as one word,
// where ldmatrix would hand it two pairs. Float64, and rows of few tokens that do not fit in shared memory, go through
// a kernel without tensor cores.
#include "common/cuda.h"
#include "linear_euler/linear_euler.h"
#include "linear_update/linear_update.h"

namespace fk {
namespace cuda {

constexpr int kWarps = 8, kHeadThreads = 32 * kWarps;
constexpr int kColumns = 16;  // features that a warp takes at a time, 4 a lane
constexpr int kTerms = 16;  // of the history

// LinearEulerArgs with the scalars in X, as the kernels take them
template <class X>
struct Head {
  const X* x;
  Rows z, weight, bias, norm_weight, norm_bias, scale, shift;
  int64_t z_token;
  X* out;
  void *low, *velocity;
  const void* history[kTerms];
  X b[kTerms];
  int terms;
  Dtype history_type, low_type, velocity_type;
  int64_t n, T, H, W;
  int d, outputs, patch, C;
  bool channels_first, normed, guided;
  X eps, h, guidance, x_scale;
};

template <class X>
__device__ __forceinline__ X get(const void* p, Dtype type, int64_t i) {
  if constexpr (sizeof(X) == 8) {
    return static_cast<const double*>(p)[i];
  } else {
    if (type == Dtype::bf16) return convert<float>(static_cast<const bf16*>(p)[i]);
    if (type == Dtype::f16) return convert<float>(static_cast<const half*>(p)[i]);
    return static_cast<const float*>(p)[i];
  }
}
template <class X>
__device__ __forceinline__ void put(void* p, Dtype type, int64_t i, X v) {
  if (!p) return;
  if (type == Dtype::bf16)
    static_cast<bf16*>(p)[i] = convert<bf16>(v);
  else if (type == Dtype::f16)
    static_cast<half*>(p)[i] = convert<half>(v);
  else
    static_cast<X*>(p)[i] = v;
}

// ---- epilogue ----
// Element `at` of the state takes its step. The history is read first: the velocity may replace one of it.
template <class X>
__device__ __forceinline__ void take_step(const Head<X>& a, int64_t at, X v) {
  X sum = rounded_product(a.x_scale, a.x[at]) + a.h * v;
#pragma unroll 1
  for (int t = 0; t < a.terms; t++) sum += a.b[t] * get<X>(a.history[t], a.history_type, at);
  a.out[at] = sum;
  put(a.low, a.low_type, at, sum);
  put(a.velocity, a.velocity_type, at, v);
}
// Where a token's outputs lie in the state: those of patches from their upper left pixel of channel 0 on
template <class X>
__device__ __forceinline__ int64_t token_offset(const Head<X>& a, int64_t token) {
  if (!a.patch) return token * a.outputs;
  const int64_t wide = a.W / a.patch, sample = token / a.T, t = token % a.T;
  return (sample * a.C * a.H + t / wide * a.patch) * a.W + t % wide * a.patch;
}

// The steps of a tile's tokens. total: [output, row] their sums, the unconditional ones `half` rows after the others.
// Neighbours in the state to neighbouring threads: with patches the pixels of a row of patches.
__device__ __forceinline__ void step_tokens(const Head<float>& a, const float* total, int row, int half, int count,
                                            int begin, int N, const int64_t* offsets) {
  const int P = a.patch, width = a.outputs - begin < N ? a.outputs - begin : N, channels = P ? a.outputs / (P * P) : 0;
#pragma unroll 1
  for (int e = threadIdx.x; e < count * (P ? a.C * P * P : width); e += blockDim.x) {
    int r, o;
    int64_t at;
    if (P) {
      r = e / P % count;
      const int q = e % P, p = e / (P * count) % P, channel = e / (P * count * P);
      o = (a.channels_first ? (channel * P + p) * P + q : (p * P + q) * channels + channel) - begin;
      at = offsets[r] + (channel * a.H + p) * a.W + q;
    } else {
      r = e / width;
      o = e % width;
      at = offsets[r] + begin + o;
    }
    if (o < 0 || o >= width) continue;
    const float bias = a.bias.p ? get<float>(a.bias.p, a.bias.type, begin + o) : 0;
    float v = total[o * row + r] + bias;
    if (a.guided) {
      const float base = total[o * row + half + r] + bias;
      v = base + a.guidance * (v - base);
    }
    take_step(a, at, v);
  }
}

// ---- the parts of f and W that tensor cores multiply ----
// part[i]: the upper halves of four numbers, neighbours in one register; then of what remains of them
template <int P>
__device__ __forceinline__ void cut(uint32_t (&part)[P][2], float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < P; i++)
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t first = __float_as_uint(v[j]) & 0xffff0000u, second = __float_as_uint(v[j + 1]) & 0xffff0000u;
      part[i][j / 2] = first >> 16 | second;
      v[j] -= __uint_as_float(first);
      v[j + 1] -= __uint_as_float(second);
    }
}

template <int P, class W>
__device__ __forceinline__ void cut_weights(uint32_t (&part)[P][2], const W (&w)[4]) {
  if constexpr (P == 1) {
    memcpy(part, w, sizeof(part));
  } else {
    float four[4];
#pragma unroll
    for (int k = 0; k < 4; k++) four[k] = convert<float>(w[k]);
    cut(part, four);
  }
}
// sums += A B. Tensor cores round their sums toward zero: those of these 16 features, the small parts first, are added
// to the others by an addition that rounds to nearest.
template <class Part, int AP, int BP>
__device__ __forceinline__ void add_parts(float (&sums)[4], const uint32_t (&A)[AP][4], const uint32_t (&B)[BP][2]) {
  float sum[4] = {};
#pragma unroll
  for (int order = AP + BP - 2 < 2 ? AP + BP - 2 : 2; order >= 0; order--)
#pragma unroll
    for (int p = 0; p < AP; p++) {
      const int q = order - p;
      if (q >= 0 && q < BP) mma_m16n8k16<Part>(sum, A[p], B[q]);
    }
#pragma unroll
  for (int k = 0; k < 4; k++) sums[k] += sum[k];
}

// Four features from `column` on, of a row that ends at d: zeros past it. d is a multiple of 4, or the row goes on with
// zeros up to one.
template <class T>
__device__ __forceinline__ void load_four(T (&to)[4], const T* row, int column, int d) {
#pragma unroll
  for (int j = 0; j < 4; j++) to[j] = convert<T>(0.f);
  if (column < d) load_vector(to, row + column);
}
template <class T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int64_t row) {
  return rows.p ? static_cast<const T*>(rows.p) + row * rows.stride : nullptr;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(~0u, v, i);
  return v;
}

// ---- the tensor-core kernel ----
// Bytes from one row of tokens in shared memory to the next. What lanes read at once, 32 bytes of each of four rows of
// 16-bit tokens or 64 of two of float32, lies in different banks.
inline int64_t row_bytes(int64_t d, int64_t element) {
  return (d * element + 127) / 128 * 128 + kColumns * element;
}

constexpr int kRows = 16;  // of a tile

template <int N>
struct Shape {
  static constexpr int sum_row = N + 8;  // so that eight rows of four float2 are in different banks
  static constexpr int partial = kWarps * kRows * sum_row, sums = N * (kRows + 1);
};

// kRows rows of tokens, NT times 8 outputs. plain: f(z) = z, and W has z's type.
template <class Z, class W, bool plain, int NT>
__global__ void __launch_bounds__(kHeadThreads, 2)
    linear_euler_kernel(const Head<float> a, int tile, int row_bytes, bool aligned) {
  constexpr int M = kRows, N = 8 * NT;
  constexpr int AP = plain ? 1 : 3, BP = plain || std::is_same_v<W, bf16> ? 1 : std::is_same_v<W, half> ? 2 : 3;
  using Part = std::conditional_t<plain, Z, bf16>;
  using S = Shape<N>;
  FK_DYNAMIC_SHARED(unsigned char, rows);
  FK_SHARED(float, means, [M]);
  FK_SHARED(float, inverses, [M]);
  FK_SHARED(int64_t, offsets, [M]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, d = a.d;
  const int T = static_cast<int>(a.T), first = blockIdx.x * tile, begin = blockIdx.y * N;  // fewer than 2^31 tokens
  const int rest = static_cast<int>(a.n * a.T - first), count = rest < tile ? rest : tile;
  const int slots = a.guided ? 2 * tile : tile, padded = (d + kColumns - 1) / kColumns * kColumns;

  // rows of tokens, with zeros up to whole columns, each by one warp
  for (int s = warp; s < slots; s += kWarps) {
    const int in_half = s < tile ? s : s - tile, token = first + in_half;
    if (in_half >= count) continue;
    const int64_t sample = token / T + (s < tile ? 0 : a.n);
    const Z* from = static_cast<const Z*>(a.z.p) + sample * a.z.stride + token % T * a.z_token;
    Z* to = reinterpret_cast<Z*>(rows + s * row_bytes);
    constexpr int E = 16 / sizeof(Z);
    if (aligned) {
      for (int i = lane * E; i < padded; i += 32 * E) {
        const int exist = d - i < E ? d - i : E;
        cp_async16(to + i, exist > 0 ? from + i : from, exist > 0 ? exist * int(sizeof(Z)) : 0);
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < padded; i += 32) to[i] = i < d ? from[i] : convert<Z>(0.f);
    }
  }
  cp_async_commit();
  if (threadIdx.x < count) offsets[threadIdx.x] = token_offset(a, first + threadIdx.x);
  cp_async_wait<0>();
  __syncwarp();
  if (!plain) {
    for (int s = warp; s < slots; s += kWarps) {
      if ((s < tile ? s : s - tile) >= count) continue;
      const Z* row = reinterpret_cast<const Z*>(rows + s * row_bytes);
      constexpr int E = 16 / sizeof(Z);
      float mean = 0, inverse = 1;
      if (a.normed) {  // squares of deviations: those of z would cancel where the mean is large
        float sum = 0, square = 0;
#pragma unroll 2
        for (int i = lane * E; i < padded; i += 32 * E) {
          Z z[E];
          load_vector(z, row + i);
#pragma unroll
          for (int j = 0; j < E; j++) sum += convert<float>(z[j]);
        }
        mean = warp_sum(sum) / static_cast<float>(d);
#pragma unroll 2
        for (int i = lane * E; i < padded; i += 32 * E) {
          Z z[E];
          load_vector(z, row + i);
#pragma unroll
          for (int j = 0; j < E; j++) {
            const float e = i + j < d ? convert<float>(z[j]) - mean : 0;
            square += e * e;
          }
        }
        inverse = 1 / sqrtf(warp_sum(square) / static_cast<float>(d) + a.eps);
      }
      if (lane == 0) means[s] = mean, inverses[s] = inverse;
    }
  }
  __syncthreads();

  // rows g and g + 8 are this lane's; past the last token: it once more
  const Z* z[2];
  float mean[2], inverse[2];
  const W *scale[2], *shift[2];
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int r = 8 * k + g, half_rows = a.guided ? M / 2 : M, in_half = r % half_rows;
    const int token = in_half < count ? in_half : count - 1, slot = token + (r < half_rows ? 0 : tile);
    z[k] = reinterpret_cast<const Z*>(rows + slot * row_bytes);
    if constexpr (!plain) {
      mean[k] = means[slot];
      inverse[k] = inverses[slot];
      const int64_t sample = (first + token) / T + (r < half_rows ? 0 : a.n);
      scale[k] = row_of<W>(a.scale, sample);
      shift[k] = row_of<W>(a.shift, sample);
    }
  }

  float sums[NT][4] = {};
  const W* weight = static_cast<const W*>(a.weight.p) + (begin + g) * a.weight.stride;
  for (int column = warp * kColumns + 4 * t; column < padded; column += kWarps * kColumns) {
    W w[NT][4], gain[2][4], offset[2][4];
    if constexpr (!plain) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        load_four(gain[k], scale[k], column, scale[k] ? d : 0);
        load_four(offset[k], shift[k], column, shift[k] ? d : 0);
      }
    }
    const W* row = weight;
#pragma unroll
    for (int j = 0; j < NT; j++, row += 8 * a.weight.stride)
      load_four(w[j], row, column, begin + 8 * j + g < a.outputs ? d : 0);

    uint32_t A[AP][4];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      Z low[4];
      load_vector(low, z[k] + column);
      uint32_t part[AP][2];
      if constexpr (plain) {
        memcpy(part, low, sizeof(part));
      } else {
        float f[4];
        W p[4];
#pragma unroll
        for (int j = 0; j < 4; j++) f[j] = (convert<float>(low[j]) - mean[k]) * inverse[k];
        if (a.norm_weight.p) {
          load_four(p, static_cast<const W*>(a.norm_weight.p), column, d);
#pragma unroll
          for (int j = 0; j < 4; j++) f[j] *= convert<float>(p[j]);
        }
        if (a.norm_bias.p) {
          load_four(p, static_cast<const W*>(a.norm_bias.p), column, d);
#pragma unroll
          for (int j = 0; j < 4; j++) f[j] += convert<float>(p[j]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
          f[j] += f[j] * convert<float>(gain[k][j]);
          f[j] += convert<float>(offset[k][j]);
        }
        cut(part, f);
      }
#pragma unroll
      for (int p = 0; p < AP; p++) A[p][k] = part[p][0], A[p][k + 2] = part[p][1];
    }
#pragma unroll
    for (int j = 0; j < NT; j++) {
      uint32_t B[BP][2];
      cut_weights(B, w[j]);
      add_parts<Part>(sums[j], A, B);
    }
  }

  // [warp, row, output], in place of the tokens, added up into [output, row]
  __syncthreads();
  float* partial = reinterpret_cast<float*>(rows);
  float* total = partial + S::partial;
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int k = 0; k < 2; k++) {
      float* to = partial + (warp * M + 8 * k + g) * S::sum_row + 8 * j + 2 * t;
      *reinterpret_cast<float2*>(to) = make_float2(sums[j][2 * k], sums[j][2 * k + 1]);
    }
  __syncthreads();
  for (int e = threadIdx.x; e < M * N; e += kHeadThreads) {
    const int r = e / N, o = e % N;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; i++) sum += partial[(i * M + r) * S::sum_row + o];
    total[o * (M + 1) + r] = sum;
  }
  __syncthreads();

  step_tokens(a, total, M + 1, M / 2, count, begin, N, offsets);
}

template <class Z, class W, bool plain, int NT>
int launch_tiles(const Head<float>& a, int tile, void* stream) {
  using S = Shape<8 * NT>;
  const auto kernel = linear_euler_kernel<Z, W, plain, NT>;
  const int64_t row = row_bytes(a.d, sizeof(Z)), element = sizeof(Z), tokens = a.n * a.T;
  const bool aligned =
      reinterpret_cast<uintptr_t>(a.z.p) % 16 == 0 && a.z.stride * element % 16 == 0 && a.z_token * element % 16 == 0;
  const int64_t tiles = (a.guided ? 2 : 1) * tile * row, sums = (S::partial + S::sums) * int64_t(sizeof(float));
  const int bytes = static_cast<int>(tiles > sums ? tiles : sums);
  const dim3 grid(static_cast<unsigned>((tokens + tile - 1) / tile), (a.outputs + 8 * NT - 1) / (8 * NT));
  allow_shared(kernel, bytes);
  FK_LAUNCH(kernel, grid, dim3(kHeadThreads), bytes, stream, a, tile, static_cast<int>(row), aligned);
  return launched();
}

// ---- many tokens of a sample: features in slices, a block each, and a second kernel that adds the slices up ----
// LayerNorm is folded, so that products go on while tokens arrive. With g = norm_weight (1 + scale) and a center c near
// a row's mean, so that nothing cancels where that is large,
//   sum_i (z_i - mean) g_i W_i = sum_i (z_i - c) g_i W_i + (c - mean) sum_i g_i W_i
// slice by slice. The last sum is of a sample, not of its tokens; the second kernel knows the mean.
constexpr int kStreamRows = 64, kParts = 2;  // warps share a tile's rows, 16 each, and each kParts of them a chunk
constexpr int kMoments = 3;  // of a row in a slice: center, and the sums of z - center and of their squares
constexpr int kMaxSlices = 32;

struct Slices {
  int count, length, tiles, samples, columns;  // length: features of one; tiles: of a sample; columns: of sums
  float* partial;  // [count, samples T, columns]
  float* gains;  // [count, samples, columns]: sum_i g_i W_i
  float* shifts;  // [count, samples, columns]: the same of what is added after LayerNorm
  float* moments;  // [kMoments, count, samples T]
};

// Times 16 features of a chunk that a warp takes: a chunk's rows of weights are 128 bytes
constexpr int steps_of(int weight_size) {
  return 4 / weight_size;
}

template <class Z, class W, int NT>
struct Stream {
  static constexpr int M = kStreamRows, N = 8 * NT, steps = steps_of(sizeof(W)), own = kColumns * steps,
                       K = kParts * own;
  static constexpr int z_row = (K + kColumns) * sizeof(Z), w_row = (K + kColumns) * sizeof(W);  // as row_bytes
  static constexpr int stage = M * z_row + N * w_row + K * int(sizeof(float));
  static constexpr int stages = 3, memory = stages * stage;
  static constexpr int sum_row = N + 8, sums = kParts * M * sum_row * int(sizeof(float));
};

template <class W>
__device__ __forceinline__ float gain_at(const Head<float>& a, int64_t sample, int i) {
  float g = a.norm_weight.p ? convert<float>(static_cast<const W*>(a.norm_weight.p)[i]) : 1;
  if (a.scale.p) g += g * convert<float>(row_of<W>(a.scale, sample)[i]);
  return g;
}

// Of the features of a slice, sum_i g_i W_i and the same of shifts, for a sample: each warp NT outputs
template <class W, int NT>
__device__ __forceinline__ void sample_sums(const Head<float>& a, const Slices& to, int sample, int slice, int begin) {
  const int lane = threadIdx.x % 32, first = slice * to.length, o = begin + threadIdx.x / 32 * NT;
  const int end = first + to.length < a.d ? first + to.length : a.d;
  const W *norm_weight = static_cast<const W*>(a.norm_weight.p), *norm_bias = static_cast<const W*>(a.norm_bias.p);
  const W *scale = row_of<W>(a.scale, sample), *shift = row_of<W>(a.shift, sample);
  float gains[NT] = {}, shifts[NT] = {};
#pragma unroll 1
  for (int i = first + 4 * lane; i < end; i += 4 * 32) {
    W four[4], w[NT][4];
#pragma unroll
    for (int j = 0; j < NT; j++)
      load_four(w[j], static_cast<const W*>(a.weight.p) + (o + j) * a.weight.stride, i, o + j < a.outputs ? a.d : 0);
    float g[4], s[4];
#pragma unroll
    for (int k = 0; k < 4; k++) g[k] = 1, s[k] = 0;
    auto each = [&](const W* from, auto f) {
      if (!from) return;
      load_four(four, from, i, a.d);
#pragma unroll
      for (int k = 0; k < 4; k++) f(k, convert<float>(four[k]));
    };
    each(norm_weight, [&](int k, float v) { g[k] = v; });
    each(norm_bias, [&](int k, float v) { s[k] = v; });
    each(scale, [&](int k, float v) { g[k] += g[k] * v, s[k] += s[k] * v; });
    each(shift, [&](int k, float v) { s[k] += v; });
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        gains[j] += g[k] * convert<float>(w[j][k]);
        shifts[j] += s[k] * convert<float>(w[j][k]);
      }
  }
#pragma unroll
  for (int j = 0; j < NT; j++) {
    const float g = warp_sum(gains[j]), s = warp_sum(shifts[j]);
    const int64_t at = (int64_t(slice) * to.samples + sample) * to.columns + o + j;
    if (lane == 0) to.gains[at] = g, to.shifts[at] = s;
  }
}

// Blocks are tiles of all samples and then samples; slices; and N outputs.
template <class Z, class W, int NT>
__global__ void __launch_bounds__(kHeadThreads, 2) linear_euler_slices_kernel(const Head<float> a, const Slices to) {
  using S = Stream<Z, W, NT>;
  constexpr int M = S::M, N = S::N, K = S::K, AP = 3;
  constexpr int BP = std::is_same_v<W, bf16> ? 1 : std::is_same_v<W, half> ? 2 : 3;
  FK_DYNAMIC_SHARED(unsigned char, memory);
  FK_SHARED(float, centers, [M]);
  FK_SHARED(float, moments, [2][kParts][M]);
  const int slice = blockIdx.y, begin = blockIdx.z * N, tiles = to.samples * to.tiles;
  if (static_cast<int>(blockIdx.x) >= tiles) {
    sample_sums<W, NT>(a, to, blockIdx.x - tiles, slice, begin);
    return;
  }
  const int sample = blockIdx.x / to.tiles, T = static_cast<int>(a.T), token = blockIdx.x % to.tiles * M;
  const int count = T - token < M ? T - token : M;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int own = warp % kParts, row = warp / kParts * 16 + g;  // its rows are row and row + 8
  const int first = slice * to.length, end = first + to.length < a.d ? first + to.length : a.d;
  const int chunks = (end - first + K - 1) / K;

  const Z* tokens = static_cast<const Z*>(a.z.p) + sample * a.z.stride + token * a.z_token + first;
  const W* weights = static_cast<const W*>(a.weight.p) + begin * a.weight.stride + first;
  auto gain_of = [&](int chunk) {
    const int i = first + chunk * K + static_cast<int>(threadIdx.x);
    return static_cast<int>(threadIdx.x) < K && i < end ? gain_at<W>(a, sample, i) : 0.f;
  };
  float gain_next = gain_of(0);
  // A thread brings 16 bytes of every ZR-th row of tokens and of every WR-th of weights: zeros where there is no such
  // token, output or feature.
  auto load_chunk = [&](int chunk, unsigned char* to_z) {
    constexpr int EZ = 16 / sizeof(Z), ZR = kHeadThreads / (K / EZ), EW = 16 / sizeof(W), WR = kHeadThreads / (K / EW);
    if (chunk < chunks) {
      const int thread = thread_again(), z_row = thread / (K / EZ), w_row = thread / (K / EW);
      const int z_column = thread % (K / EZ) * EZ, w_column = thread % (K / EW) * EW, left = end - first - chunk * K;
      const int z_left = (left - z_column) * int(sizeof(Z)), w_left = (left - w_column) * int(sizeof(W));
      unsigned char* to_w = to_z + M * S::z_row;
#pragma unroll
      for (int r = 0; r < M; r += ZR) {
        const bool exist = z_left > 0 && z_row + r < count;
        const Z* from = tokens + (z_row + r) * a.z_token + chunk * K + z_column;
        cp_async16(to_z + (z_row + r) * S::z_row + z_column * int(sizeof(Z)), exist ? from : a.z.p,
                   exist ? z_left < 16 ? z_left : 16 : 0);
      }
#pragma unroll
      for (int r = 0; r < N; r += WR) {
        const bool exist = w_left > 0 && begin + w_row + r < a.outputs;
        const W* from = weights + (w_row + r) * a.weight.stride + chunk * K + w_column;
        if (WR <= N || w_row < N)
          cp_async16(to_w + (w_row + r) * S::w_row + w_column * int(sizeof(W)), exist ? from : a.weight.p,
                     exist ? w_left < 16 ? w_left : 16 : 0);
      }
      if (thread < K) reinterpret_cast<float*>(to_w + N * S::w_row)[thread] = gain_next;
      gain_next = gain_of(chunk + 1);
    }
    cp_async_commit();
  };
  auto wait = [] {
    cp_async_wait<S::stages - 2>();
    __syncthreads();
  };
#pragma unroll
  for (int i = 0; i < S::stages - 1; i++) load_chunk(i, memory + i * S::stage);
  wait();
  {  // the mean of a row's features in the first chunk, by neighbouring lanes
    constexpr int sharers = kHeadThreads / M, each = K / sharers;
    const int r = threadIdx.x / sharers;
    const Z* z = reinterpret_cast<const Z*>(memory + r * S::z_row) + threadIdx.x % sharers * 4;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < each; j += 4) {
      Z four[4];
      load_vector(four, z + j * sharers);
#pragma unroll
      for (int k = 0; k < 4; k++) sum += convert<float>(four[k]);
    }
#pragma unroll
    for (int i = sharers / 2; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    const int features = end - first < K ? end - first : K;
    if (threadIdx.x % sharers == 0) centers[r] = a.normed ? sum / static_cast<float>(features) : 0;
  }
  __syncthreads();
  float center[2], sum[2] = {}, square[2] = {};
#pragma unroll
  for (int k = 0; k < 2; k++) center[k] = centers[row + 8 * k];

  float sums[NT][4] = {};
  int at = 0;  // of this chunk in memory
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk++) {
    if (chunk) wait();
    load_chunk(chunk + S::stages - 1, memory + (at ? at : S::memory) - S::stage);
    const unsigned char* zs = memory + at;
    const unsigned char* ws = zs + M * S::z_row;
#pragma unroll 1
    for (int n = 0; n < S::steps; n++) {
      const int column = own * S::own + n * kColumns + 4 * t;
      const bool exist = first + chunk * K + column < end;
      float gain[4];
      load_vector(gain, reinterpret_cast<const float*>(ws + N * S::w_row) + column);
      uint32_t A[AP][4];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        Z low[4];
        load_vector(low, reinterpret_cast<const Z*>(zs + (row + 8 * k) * S::z_row) + column);
        const float c = exist ? center[k] : 0;  // past the end zeros stay zeros
        float f[4];
        uint32_t part[AP][2];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float e = convert<float>(low[j]) - c;
          sum[k] += e;
          square[k] += e * e;
          f[j] = e * gain[j];
        }
        cut(part, f);
#pragma unroll
        for (int p = 0; p < AP; p++) A[p][k] = part[p][0], A[p][k + 2] = part[p][1];
      }
#pragma unroll
      for (int j = 0; j < NT; j++) {
        W w[4];
        load_vector(w, reinterpret_cast<const W*>(ws + (8 * j + g) * S::w_row) + column);
        uint32_t B[BP][2];
        cut_weights(B, w);
        add_parts<bf16>(sums[j], A, B);
      }
    }
    at = at + S::stage == S::memory ? 0 : at + S::stage;
  }
  cp_async_wait<0>();
  __syncthreads();

  float* partial = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int r = row + 8 * k;
#pragma unroll
    for (int j = 0; j < NT; j++)
      *reinterpret_cast<float2*>(partial + (own * M + r) * S::sum_row + 8 * j + 2 * t) =
          make_float2(sums[j][2 * k], sums[j][2 * k + 1]);
#pragma unroll
    for (int i = 1; i < 4; i *= 2) {
      sum[k] += __shfl_xor_sync(~0u, sum[k], i);
      square[k] += __shfl_xor_sync(~0u, square[k], i);
    }
    if (t == 0) moments[0][own][r] = sum[k], moments[1][own][r] = square[k];
  }
  __syncthreads();
  const int tile = block_again(), tokens_before = tile / to.tiles * T + tile % to.tiles * M;
  const int64_t rows = int64_t(to.samples) * T, at_row = slice * rows + tokens_before;
  for (int e = threadIdx.x; e < count * (N / 4); e += kHeadThreads) {
    const int r = e / (N / 4), o = e % (N / 4) * 4;
    float total[4] = {};
#pragma unroll
    for (int i = 0; i < kParts; i++) {
      float four[4];
      load_vector(four, partial + (i * M + r) * S::sum_row + o);
#pragma unroll
      for (int j = 0; j < 4; j++) total[j] += four[j];
    }
    store_vector(to.partial + (at_row + r) * to.columns + begin + o, total);
  }
  if (threadIdx.x < count && blockIdx.z == 0) {
    const int r = threadIdx.x;
    const float of_row[kMoments] = {centers[r], moments[0][0][r] + moments[0][1][r],
                                    moments[1][0][r] + moments[1][1][r]};
#pragma unroll
    for (int k = 0; k < kMoments; k++) to.moments[k * to.count * rows + at_row + r] = of_row[k];
  }
}

// A block adds up the slices of kFinishRows tokens, or of half as many of both halves, and takes their steps.
constexpr int kFinishRows = 16;
template <int N>
__global__ void __launch_bounds__(kHeadThreads, 2) linear_euler_finish_kernel(const Head<float> a, const Slices from) {
  constexpr int M = kFinishRows;
  FK_SHARED(float, total, [N * (M + 1)]);
  FK_SHARED(float, shares, [kMaxSlices][M]);
  FK_SHARED(float, inverses, [M]);
  FK_SHARED(int64_t, offsets, [M]);
  const int tile = a.guided ? M / 2 : M, begin = blockIdx.y * N;
  const int tokens = static_cast<int>(a.n * a.T), rows = a.guided ? 2 * tokens : tokens, first = blockIdx.x * tile;
  const int count = tokens - first < tile ? tokens - first : tile;
  auto row_of_tile = [&](int r) {  // past the last token: it once more
    const int in_half = r < tile ? r : r - tile;
    return first + (in_half < count ? in_half : count - 1) + (r < tile ? 0 : tokens);
  };
  if (threadIdx.x < M) {
    const int r = threadIdx.x, row = row_of_tile(r);
    if (r < count) offsets[r] = token_offset(a, first + r);
    auto moment = [&](int k, int s) { return from.moments[(int64_t(k) * from.count + s) * rows + row]; };
    auto features = [&](int s) {
      return static_cast<float>(a.d - s * from.length < from.length ? a.d - s * from.length : from.length);
    };
    const float origin = moment(0, 0);
    float mean = 0, square = 0;  // of z - origin, and of deviations
    for (int s = 0; s < from.count; s++) mean += features(s) * (moment(0, s) - origin) + moment(1, s);
    mean = a.normed ? mean / static_cast<float>(a.d) : 0;
    for (int s = 0; s < from.count; s++) {
      const float c = moment(0, s) - origin, part = moment(1, s) / features(s), off = c + part - mean;
      square += moment(2, s) - part * moment(1, s) + features(s) * off * off;
      shares[s][r] = c - mean;
    }
    inverses[r] = a.normed ? 1 / sqrtf((square > 0 ? square : 0) / static_cast<float>(a.d) + a.eps) : 1;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < M * (N / 4); e += kHeadThreads) {
    const int r = e % M, o = e / M * 4, row = row_of_tile(r), sample = row / static_cast<int>(a.T);
    float sum[4] = {}, shift[4] = {};
    for (int s = 0; s < from.count; s++) {
      float products[4], gains[4], shifts[4];
      const int64_t of_sample = (int64_t(s) * from.samples + sample) * from.columns + begin + o;
      load_vector(products, from.partial + (int64_t(s) * rows + row) * from.columns + begin + o);
      load_vector(gains, from.gains + of_sample);
      load_vector(shifts, from.shifts + of_sample);
#pragma unroll
      for (int j = 0; j < 4; j++) sum[j] += products[j] + shares[s][r] * gains[j], shift[j] += shifts[j];
    }
#pragma unroll
    for (int j = 0; j < 4; j++) total[(o + j) * (M + 1) + r] = sum[j] * inverses[r] + shift[j];
  }
  __syncthreads();
  step_tokens(a, total, M + 1, tile, count, begin, N, offsets);
}

// How the features are cut, and where the sums go in a workspace; no slices where a call is not for these kernels
inline Slices slices_of(const LinearEulerArgs& a) {
  Slices to{};
  const int64_t samples = a.guided ? 2 * a.n : a.n;
  const bool plain = a.z.type == Dtype::bf16 && a.weight.type == Dtype::bf16 && !a.normed && !a.scale.p && !a.shift.p;
  if (a.z.type == Dtype::f64 || plain || a.T < kStreamRows || samples * a.T > (1 << 30)) return to;
  const int N = a.outputs <= 16 ? 16 : a.outputs <= 32 ? 32 : 64, size = a.z.type == Dtype::f32 ? 4 : 2;
  to.samples = static_cast<int>(samples);
  to.tiles = static_cast<int>((a.T + kStreamRows - 1) / kStreamRows);
  to.columns = static_cast<int>((a.outputs + N - 1) / N * N);
  // Whole waves of blocks, two on a multiprocessor with the memory for it. What a block does beside its chunks and what
  // a slice costs later is worth some chunks. Sums are to be few beside the tokens.
  const int64_t slots = multiprocessors() * int64_t(shared_limit() > (150 << 10) ? 2 : 1);
  const int K = steps_of(a.weight.type == Dtype::f32 ? 4 : 2) * kColumns * kParts,
            chunks = static_cast<int>((a.d + K - 1) / K), beside = 512 / K;
  int64_t least = 0;
  for (int count = 1; count <= kMaxSlices && count <= chunks && 8 * count * to.columns <= a.d * size; count++) {
    const int each = (chunks + count - 1) / count;
    const int64_t blocks = samples * (to.tiles + 1) * (to.columns / N) * count;
    const int64_t cost = (blocks + slots - 1) / slots * (each + beside);
    if (least && cost >= least) continue;
    least = cost;
    to.length = each * K;
    to.count = (chunks + each - 1) / each;
  }
  const int64_t rows = to.count * samples * a.T * to.columns, of_samples = to.count * samples * to.columns;
  to.partial = static_cast<float*>(a.workspace);
  to.gains = to.partial + rows;
  to.shifts = to.gains + of_samples;
  to.moments = to.shifts + of_samples;
  return to;
}

// Whether rows can be read 16 bytes at once, and what lies `apart` elements from each other in them
inline bool words(const Rows& rows, int64_t apart) {
  const int64_t element = rows.type == Dtype::f32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(rows.p) % 16 == 0 && rows.stride * element % 16 == 0 && apart * element % 16 == 0;
}

template <class Z, class W, int NT>
int launch_slices(const Head<float>& a, const Slices& to, void* stream) {
  using S = Stream<Z, W, NT>;
  const auto kernel = linear_euler_slices_kernel<Z, W, NT>;
  constexpr int bytes = S::memory > S::sums ? S::memory : S::sums;
  const unsigned columns = to.columns / S::N, tile = kFinishRows / (a.guided ? 2 : 1);
  allow_shared(kernel, bytes);
  FK_LAUNCH(kernel, dim3(to.samples * (to.tiles + 1), to.count, columns), dim3(kHeadThreads), bytes, stream, a, to);
  const int status = launched();
  if (status) return status;
  FK_LAUNCH(linear_euler_finish_kernel<S::N>, dim3(static_cast<unsigned>((a.n * a.T + tile - 1) / tile), columns),
            dim3(kHeadThreads), 0, stream, a, to);
  return launched();
}

// ---- the kernel without tensor cores: a block takes a token, a warp four outputs at a time ----
constexpr int kOutputs = 4;

template <class X>
__device__ __forceinline__ X warp_total(X v) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(~0u, v, i);
  return v;
}
template <class X>
__global__ void __launch_bounds__(kHeadThreads, 1) linear_euler_rows_kernel(const Head<X> a) {
  FK_SHARED(X, means, [2]);
  FK_SHARED(X, inverses, [2]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = a.d, halves = a.guided ? 2 : 1;
  const int64_t token = blockIdx.x, offset = token_offset(a, token);
  auto z_at = [&](int half, int i) {
    const int64_t sample = token / a.T + half * a.n;
    return get<X>(a.z.p, a.z.type, sample * a.z.stride + token % a.T * a.z_token + i);
  };
  if (warp < halves) {
    X mean = 0, inverse = 1;
    if (a.normed) {
      X sum = 0, square = 0;
      for (int i = lane; i < d; i += 32) sum += z_at(warp, i);
      mean = warp_total(sum) / X(d);
      for (int i = lane; i < d; i += 32) {
        const X e = z_at(warp, i) - mean;
        square += e * e;
      }
      inverse = 1 / sqrt(warp_total(square) / X(d) + a.eps);
    }
    if (lane == 0) means[warp] = mean, inverses[warp] = inverse;
  }
  __syncthreads();
  const int P = a.patch, channels = P ? a.outputs / (P * P) : 0;
  for (int begin = warp * kOutputs; begin < a.outputs; begin += kWarps * kOutputs) {
    X v[2][kOutputs] = {};
    for (int half = 0; half < halves; half++) {
      const int64_t sample = token / a.T + half * a.n;
      X sum[kOutputs] = {};
      for (int i = lane; i < d; i += 32) {
        X f = (z_at(half, i) - means[half]) * inverses[half];
        if (a.norm_weight.p) f *= get<X>(a.norm_weight.p, a.norm_weight.type, i);
        if (a.norm_bias.p) f += get<X>(a.norm_bias.p, a.norm_bias.type, i);
        if (a.scale.p) f += f * get<X>(a.scale.p, a.scale.type, sample * a.scale.stride + i);
        if (a.shift.p) f += get<X>(a.shift.p, a.shift.type, sample * a.shift.stride + i);
#pragma unroll
        for (int j = 0; j < kOutputs; j++)
          if (begin + j < a.outputs) sum[j] += f * get<X>(a.weight.p, a.weight.type, (begin + j) * a.weight.stride + i);
      }
#pragma unroll
      for (int j = 0; j < kOutputs; j++) {
        const X total = warp_total(sum[j]);
        v[0][j] = half == 0 ? total : v[0][j];
        v[1][j] = total;
      }
    }
#pragma unroll
    for (int j = 0; j < kOutputs; j++) {
      const int o = begin + j;
      if (o >= a.outputs || lane != j) continue;
      const X bias = a.bias.p ? get<X>(a.bias.p, a.bias.type, o) : X(0), base = v[1][j] + bias;
      X velocity = v[0][j] + bias;
      if (a.guided) velocity = base + a.guidance * (velocity - base);
      if (!P) {
        take_step(a, offset + o, velocity);
        continue;
      }
      const int channel = a.channels_first ? o / (P * P) : o % channels;
      const int pq = a.channels_first ? o % (P * P) : o / channels;
      if (channel < a.C) take_step(a, offset + (channel * a.H + pq / P) * a.W + pq % P, velocity);
    }
  }
}
template <class X>
int launch_rows(const Head<X>& a, void* stream) {
  FK_LAUNCH(linear_euler_rows_kernel<X>, dim3(static_cast<unsigned>(a.n * a.T)), dim3(kHeadThreads), 0, stream, a);
  return launched();
}

// ---- choices ----
template <class Z, class W, bool plain>
int by_shape(const Head<float>& a, const Slices& slices, void* stream) {
  if constexpr (!plain)
    if (slices.count) {
      if (a.outputs <= 16) return launch_slices<Z, W, 2>(a, slices, stream);
      if (a.outputs <= 32) return launch_slices<Z, W, 4>(a, slices, stream);
      return launch_slices<Z, W, 8>(a, slices, stream);
    }
  const int64_t halves = a.guided ? 2 : 1, fit = (shared_limit() - 1024) / row_bytes(a.d, sizeof(Z)) / halves;
  if (fit < 1 || a.n * a.T > (int64_t(1) << 31) - 64) return launch_rows(a, stream);
  const int tile = static_cast<int>(fit < kRows / halves ? fit : kRows / halves);
  if (a.outputs <= 16) return launch_tiles<Z, W, plain, 2>(a, tile, stream);
  // blocks of fewer outputs read z once more, from the second cache, and pay where there are multiprocessors left
  const int64_t blocks = (a.n * a.T + tile - 1) / tile * ((a.outputs + 31) / 32);
  if constexpr (sizeof(W) == 2)
    if (a.outputs > 32 && blocks > multiprocessors()) return launch_tiles<Z, W, plain, 8>(a, tile, stream);
  return launch_tiles<Z, W, plain, 4>(a, tile, stream);
}

template <class Z>
int by_weight(const Head<float>& a, const Slices& slices, void* stream) {
  if (a.weight.type == Dtype::f32) return by_shape<Z, float, false>(a, slices, stream);
  if constexpr (std::is_same_v<Z, bf16>)
    if (!a.normed && !a.scale.p && !a.shift.p) return by_shape<Z, Z, true>(a, slices, stream);
  return by_shape<Z, Z, false>(a, slices, stream);
}

template <class X>
Head<X> head_of(const LinearEulerArgs& a) {
  Head<X> head{};
  head.x = static_cast<const X*>(a.x);
  head.z = a.z, head.weight = a.weight, head.bias = a.bias, head.norm_weight = a.norm_weight;
  head.norm_bias = a.norm_bias, head.scale = a.scale, head.shift = a.shift;
  head.z_token = a.z_token;
  head.out = static_cast<X*>(a.out), head.low = a.low, head.velocity = a.velocity;
  head.terms = static_cast<int>(a.terms < kTerms ? a.terms : kTerms);
  for (int t = 0; t < head.terms; t++) head.history[t] = a.history[t], head.b[t] = X(a.b[t]);
  head.history_type = a.history_type, head.low_type = a.low_type, head.velocity_type = a.velocity_type;
  head.n = a.n, head.T = a.T, head.H = a.H, head.W = a.W;
  head.d = static_cast<int>(a.d), head.outputs = static_cast<int>(a.outputs);
  head.patch = static_cast<int>(a.patch), head.C = static_cast<int>(a.C);
  head.channels_first = a.channels_first, head.normed = a.normed, head.guided = a.guided;
  head.eps = X(a.eps), head.h = X(a.h), head.guidance = X(a.guidance), head.x_scale = X(a.x_scale);
  return head;
}

int linear_euler(const LinearEulerArgs& given, void* stream) {
  LinearEulerArgs a = given;
  if (a.n * a.T == 0) return launched();
  if (a.terms > kTerms) {  // the other terms first, since the velocity may replace one of them
    const int64_t elements = a.patch ? a.n * a.C * a.H * a.W : a.n * a.T * a.outputs;
    const int status = linear_update({a.x, a.history + kTerms, a.b + kTerms, a.terms - kTerms, a.x_scale, a.out,
                                      nullptr, a.x_type, a.history_type, a.low_type, elements, 0},
                                     stream);
    if (status) return status;
    a.x = a.out, a.x_scale = 1;
  }
  if (a.x_type == Dtype::f64) return launch_rows(head_of<double>(a), stream);
  const Head<float> head = head_of<float>(a);
  const Slices slices = a.workspace && words(a.z, a.z_token) && words(a.weight, 0) ? slices_of(a) : Slices{};
  if (a.z.type == Dtype::f32) return by_shape<float, float, false>(head, slices, stream);
  return with_low_type(a.z.type, [&](auto z) { return by_weight<typename decltype(z)::type>(head, slices, stream); });
}

int64_t linear_euler_workspace(const LinearEulerArgs& a) {
  const Slices to = slices_of(a);
  const int64_t rows = to.samples * a.T;
  return int64_t(sizeof(float)) * to.count * (rows * (to.columns + kMoments) + 2 * to.samples * to.columns);
}

}  // namespace cuda
}  // namespace fk

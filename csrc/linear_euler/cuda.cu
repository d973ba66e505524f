// Memory bound on z where a token has few outputs: z is read from device memory once. A block takes a tile of tokens,
// all of their features, into shared memory; with guidance the same tokens of both halves. LayerNorm's mean and squares
// of deviations are taken from there in turn. Its warps share the features: each multiplies its own, for all tokens of
// the tile and the outputs of the block, on tensor cores, and the sums of the warps are added in a fixed order. The
// velocities go from there into the state.
//
//   z [tile, d] --cp.async--> shared --f, parts--> A   W [outputs, d] --> B   A B -> [warp, tile, outputs] -> state
//
// Tensor cores multiply 16-bit numbers. f and float32 weights are cut into three bf16 numbers that add up to them
// exactly, float16 weights into two; products below 2^-22 of the first are left out. bf16 tokens that go into the
// Linear as they are, with bf16 weights, need no parts.
//
// A feature's place in the sum is free as long as A and B agree: a lane takes four neighbours of a row as one word,
// where ldmatrix would hand it two pairs. Float64, and rows of tokens that do not fit in shared memory, go through a
// kernel without tensor cores.
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
  X eps, h, guidance;
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
  X sum = a.x[at] + a.h * v;
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

// Of tiles of M rows and N outputs
template <int M, int N>
struct Shape {
  static constexpr int sum_row = N + 8;  // so that eight rows of four float2 are in different banks
  static constexpr int partial = kWarps * M * sum_row, sums = N * (M + 1);
};

// MT times 16 rows of tokens, NT times 8 outputs. plain: f(z) = z, and W has z's type.
template <class Z, class W, bool plain, int MT, int NT>
__global__ void __launch_bounds__(kHeadThreads, 2)
    linear_euler_kernel(const Head<float> a, int tile, int row_bytes, bool aligned) {
  constexpr int M = 16 * MT, N = 8 * NT;
  constexpr int AP = plain ? 1 : 3, BP = plain || std::is_same_v<W, bf16> ? 1 : std::is_same_v<W, half> ? 2 : 3;
  using Part = std::conditional_t<plain, Z, bf16>;
  using S = Shape<M, N>;
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

  // rows g and g + 8 of each 16 are this lane's; past the last token: it once more
  const Z* z[MT][2];
  float mean[MT][2], inverse[MT][2];
  const W *scale[MT][2], *shift[MT][2];
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int r = 16 * i + 8 * k + g, half_rows = a.guided ? M / 2 : M, in_half = r % half_rows;
      const int token = in_half < count ? in_half : count - 1, slot = token + (r < half_rows ? 0 : tile);
      z[i][k] = reinterpret_cast<const Z*>(rows + slot * row_bytes);
      if constexpr (!plain) {
        mean[i][k] = means[slot];
        inverse[i][k] = inverses[slot];
        const int64_t sample = (first + token) / T + (r < half_rows ? 0 : a.n);
        scale[i][k] = row_of<W>(a.scale, sample);
        shift[i][k] = row_of<W>(a.shift, sample);
      }
    }

  float sums[MT][NT][4] = {};
  const W* weight = static_cast<const W*>(a.weight.p) + (begin + g) * a.weight.stride;
  for (int column = warp * kColumns + 4 * t; column < padded; column += kWarps * kColumns) {
    W w[NT][4], gain[MT][2][4], offset[MT][2][4];
    if constexpr (!plain) {
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
          load_four(gain[i][k], scale[i][k], column, scale[i][k] ? d : 0);
          load_four(offset[i][k], shift[i][k], column, shift[i][k] ? d : 0);
        }
    }
    const W* row = weight;
#pragma unroll
    for (int j = 0; j < NT; j++, row += 8 * a.weight.stride)
      load_four(w[j], row, column, begin + 8 * j + g < a.outputs ? d : 0);

    uint32_t A[MT][AP][4];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        Z low[4];
        load_vector(low, z[i][k] + column);
        uint32_t part[AP][2];
        if constexpr (plain) {
          memcpy(part, low, sizeof(part));
        } else {
          float f[4];
          W p[4];
#pragma unroll
          for (int j = 0; j < 4; j++) f[j] = (convert<float>(low[j]) - mean[i][k]) * inverse[i][k];
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
            f[j] += f[j] * convert<float>(gain[i][k][j]);
            f[j] += convert<float>(offset[i][k][j]);
          }
          cut(part, f);
        }
#pragma unroll
        for (int p = 0; p < AP; p++) A[i][p][k] = part[p][0], A[i][p][k + 2] = part[p][1];
      }
#pragma unroll
    for (int j = 0; j < NT; j++) {
      uint32_t B[BP][2];
      if constexpr (BP == 1) {
        memcpy(B, w[j], sizeof(B));
      } else {
        float four[4];
#pragma unroll
        for (int k = 0; k < 4; k++) four[k] = convert<float>(w[j][k]);
        cut(B, four);
      }
      // Tensor cores round their sums toward zero: those of these features, the small parts first, are added to the
      // others by an addition that rounds to nearest.
      float sum[MT][4] = {};
#pragma unroll
      for (int order = AP + BP - 2 < 2 ? AP + BP - 2 : 2; order >= 0; order--)
#pragma unroll
        for (int p = 0; p < AP; p++) {
          const int q = order - p;
          if (q < 0 || q >= BP) continue;
#pragma unroll
          for (int i = 0; i < MT; i++) mma_m16n8k16<Part>(sum[i], A[i][p], B[q]);
        }
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) sums[i][j][k] += sum[i][k];
    }
  }

  // [warp, row, output], in place of the tokens, added up into [output, row]
  __syncthreads();
  float* partial = reinterpret_cast<float*>(rows);
  float* total = partial + S::partial;
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        float* to = partial + (warp * M + 16 * i + 8 * k + g) * S::sum_row + 8 * j + 2 * t;
        *reinterpret_cast<float2*>(to) = make_float2(sums[i][j][2 * k], sums[i][j][2 * k + 1]);
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

  // neighbours in the state to neighbouring threads: with patches the pixels of a row of patches
  const int P = a.patch, width = a.outputs - begin < N ? a.outputs - begin : N, channels = P ? a.outputs / (P * P) : 0;
#pragma unroll 1
  for (int e = threadIdx.x; e < count * (P ? a.C * P * P : width); e += kHeadThreads) {
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
    float v = total[o * (M + 1) + r] + bias;
    if (a.guided) {
      const float base = total[o * (M + 1) + M / 2 + r] + bias;
      v = base + a.guidance * (v - base);
    }
    take_step(a, at, v);
  }
}

template <class Z, class W, bool plain, int MT, int NT>
int launch_tiles(const Head<float>& a, int tile, void* stream) {
  using S = Shape<16 * MT, 8 * NT>;
  const auto kernel = linear_euler_kernel<Z, W, plain, MT, NT>;
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
int by_shape(const Head<float>& a, void* stream) {
  const int64_t halves = a.guided ? 2 : 1, fit = (shared_limit() - 1024) / row_bytes(a.d, sizeof(Z)) / halves;
  if (fit < 1 || a.n * a.T > (int64_t(1) << 31) - 64) return launch_rows(a, stream);
  const int tile = static_cast<int>(fit < 16 / halves ? fit : 16 / halves);
  // blocks of fewer outputs read z once more, from the second cache, and pay where there are multiprocessors left
  const int64_t blocks = (a.n * a.T + tile - 1) / tile * ((a.outputs + 31) / 32);
  if constexpr (sizeof(W) == 2)
    if (a.outputs > 32 && blocks > multiprocessors()) return launch_tiles<Z, W, plain, 1, 8>(a, tile, stream);
  return launch_tiles<Z, W, plain, 1, 4>(a, tile, stream);
}

template <class Z>
int by_weight(const Head<float>& a, void* stream) {
  if (a.weight.type == Dtype::f32) return by_shape<Z, float, false>(a, stream);
  if constexpr (std::is_same_v<Z, bf16>)
    if (!a.normed && !a.scale.p && !a.shift.p) return by_shape<Z, Z, true>(a, stream);
  return by_shape<Z, Z, false>(a, stream);
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
  head.eps = X(a.eps), head.h = X(a.h), head.guidance = X(a.guidance);
  return head;
}

int linear_euler(const LinearEulerArgs& given, void* stream) {
  LinearEulerArgs a = given;
  if (a.n * a.T == 0) return launched();
  if (a.terms > kTerms) {  // the other terms first, since the velocity may replace one of them
    const int64_t elements = a.patch ? a.n * a.C * a.H * a.W : a.n * a.T * a.outputs;
    const int status = linear_update({a.x, a.history + kTerms, a.b + kTerms, a.terms - kTerms, a.out, nullptr, a.x_type,
                                      a.history_type, a.low_type, elements, 0},
                                     stream);
    if (status) return status;
    a.x = a.out;
  }
  if (a.x_type == Dtype::f64) return launch_rows(head_of<double>(a), stream);
  const Head<float> head = head_of<float>(a);
  if (a.z.type == Dtype::f32) return by_shape<float, float, false>(head, stream);
  return with_low_type(a.z.type, [&](auto z) { return by_weight<typename decltype(z)::type>(head, stream); });
}

}  // namespace cuda
}  // namespace fk

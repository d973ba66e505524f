// A whole sampler in one launch. A block takes a tile of samples through every layer and every step; the values of the
// tile's samples lie in rows in shared memory, sums of products in registers.
//
// Weights come in panels of up to 16 KiB: the weights of up to 256 outputs for some inputs, in the order in which they
// are used. If the panels of all layers fit beside the rows, a block loads them once. Else they stream from the second
// level cache through a ring of slots, always kStages - 1 panels ahead, across layers and steps.
//
// Every sum of products runs over the inputs in one order whatever the tile, by multiply-adds that are spelled out, so
// that a sample does not depend on the others.
//
// One sample is one block on one multiprocessor: the layers follow on one another, and to share one out over several
// would take a barrier of the whole grid a layer. Such a block reads every weight once a step for few products, so what
// it waits for is weights, whether it has one sample or eight. Few samples are therefore given a block each, as long as
// there are multiprocessors; beyond that tiles grow to 32 samples.
//
// Velocities that later updates of a solver add lie in device memory, one part a block, and so in the second-level
// cache: each is written and read a few times a sampler, where rows are at every layer.
#include "common/cuda.h"
#include "mlp_sample/mlp_sample.h"

namespace fk {
namespace cuda {
namespace {

constexpr int kThreads = 256, kLanes = 32, kWarps = kThreads / kLanes;
constexpr int kWide = 256;  // outputs of a panel
constexpr int kPanel = 16 << 10;  // bytes of a panel
constexpr int kStages = 4;  // slots of the ring
constexpr int kMost = 32;  // samples of a tile
constexpr int kStatic = 1 << 10;  // bytes of shared memory that are not asked for at the launch, and more

// ---- the program: what mlp_program writes ----
// How a block's threads share out rows of so many elements, without a division in the kernel: thread / width is
// thread * inverse >> 16, which is exact for 256 threads.
static_assert(kThreads <= 256);
struct alignas(16) Split {
  int width, inverse, rows, columns;  // rows and columns of kThreads elements
};
struct Table {
  const float* data;  // null: there is none
  int64_t step, sample;
};
struct alignas(16) Layer {
  MlpMap map;
  Activation activation;
  MlpCombine combine;
  int in, in_width, out, out_width, other;
  float eps, alpha, gain;
  Table scale, shift, shift_each;
  Split outputs, inputs;  // inputs: as `copy_inputs` takes them
};
struct alignas(16) Panel {
  const char* data;
  int64_t bytes;
};
struct alignas(16) Update {  // an MlpUpdate, and its scale
  int from_start, terms, kept;
  float scale;
};
struct Term {
  int place;  // of an earlier velocity, or -1: this evaluation's
  float factor;
};
struct Program {
  Layer* layers;  // of the unconditional velocity if there is one, then of the other
  Panel* panels;
  float* h;  // of Euler steps
  Update* updates;  // of others, and all their terms
  Term* terms;
  int panel_count;
};

// Widths of both sides of a panel are multiples of this.
template <class W>
constexpr int kUnit = sizeof(W) == 4 ? 4 : 16;
template <class W>
__host__ __device__ __forceinline__ int padded(int n) {
  return (n + kUnit<W> - 1) / kUnit<W> * kUnit<W>;
}
// Whether a linear layer's inputs cannot be read where they lie.
template <class W>
__host__ __device__ __forceinline__ bool needs_copy(int in, int in_width) {
  return sizeof(W) == 2 || (in | in_width) & 3;
}
// Inputs of a panel of so many outputs
template <class W>
constexpr int kDeep = kPanel / int(sizeof(W)) / kWide;  // of kWide
template <class W>
__host__ __device__ __forceinline__ int panel_depth(int outputs) {
  return outputs == kWide ? kDeep<W> : kPanel / int(sizeof(W)) / outputs / kUnit<W> * kUnit<W>;
}
// f(weights, bytes) for every panel, in order
template <class W, class F>
void for_panels_of(const MlpPrepared& p, F f) {
  for (int64_t i = 0; i < p.layer_count; i++) {
    const MlpLayer& l = p.layers[i];
    if (l.map != MlpMap::linear) continue;
    const char* weights = static_cast<const char*>(l.weight);
    const int in = padded<W>(int(l.in_width));
    for (int64_t c = 0; c < l.out_width; c += kWide) {
      const int outputs = padded<W>(int(l.out_width - c < kWide ? l.out_width - c : kWide));
      const int deep = panel_depth<W>(outputs);
      for (int k = 0; k < in; k += deep) {
        const int bytes = (in - k < deep ? in - k : deep) * outputs * int(sizeof(W));
        f(weights, bytes);
        weights += bytes;
      }
    }
  }
}
template <class F>
void for_panels(const MlpPrepared& p, F f) {
  p.low ? for_panels_of<bf16>(p, f) : for_panels_of<float>(p, f);
}

struct Run {
  Program program;
  Split state;  // of rows of D
  int D, steps, layers, velocity, uncond;  // uncond: place of the unconditional velocity
  bool guided, resident, wide, multistep;
  float guidance;
  int64_t n, tiles;
  int per;  // samples of a tile; there is room for as many or more
  int pitch, input_pitch;  // floats of a row, elements of a row of inputs
  int weight_bytes;
  int64_t row_bytes, input_bytes;
  int64_t past;  // floats of a block's velocities that are kept: [place][sample of the tile][D]
  const float* x;
  float *out, *states, *velocities, *kept;
  char* scratch;
};

// ---- weights on their way ----
class Ring {
 public:
  __device__ __forceinline__ Ring(const Run& a, char* memory, int64_t passes)
      : panels_(a.program.panels), memory_(memory), count_(a.program.panel_count), resident_(a.resident) {
    if (resident_) {
      for (int i = 0, place = 0; i < count_; i++) {
        copy(panels_[i], memory_ + place);
        place += int(panels_[i].bytes);
      }
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      return;
    }
    left_ = passes * count_;
    for (int i = 0; i < kStages - 1; i++) issue(left_ > 0 ? panels_[panel_] : Panel{});
  }
  // The next panel, which has so many bytes. A barrier, unless all are there.
  __device__ __forceinline__ const char* next(int bytes) {
    if (resident_) {
      const char* panel = memory_ + at_;
      at_ += bytes;
      return panel;
    }
    const Panel ahead = panels_[panel_];  // on its way while the others are waited for
    cp_async_wait<kStages - 2>();
    __syncthreads();  // for the panel, and for the slot of the one before, which everyone has left
    issue(ahead);
    const char* panel = memory_ + at_ * kPanel;
    at_ = at_ + 1 == kStages ? 0 : at_ + 1;
    return panel;
  }
  __device__ __forceinline__ void rewind() {
    if (resident_) at_ = 0;
  }

 private:
  // Whole panels, which most are, in a few instructions that wait for nothing: warps come here between products.
  __device__ __forceinline__ void copy(const Panel& p, char* to) {
    const int first = int(threadIdx.x) * 16, bytes = int(p.bytes);
    if (bytes == kPanel) {
      const char* from = p.data + first;
      to += first;
#pragma unroll
      for (int i = 0; i < kPanel; i += kThreads * 16) cp_async16(to + i, from + i);
    } else {
#pragma unroll 1
      for (int i = first; i < bytes; i += kThreads * 16) cp_async16(to + i, p.data + i);
    }
  }
  __device__ __forceinline__ void issue(const Panel& p) {
    if (left_ > 0) {
      copy(p, memory_ + slot_ * kPanel);
      panel_ = panel_ + 1 == count_ ? 0 : panel_ + 1;
      left_--;
    }
    cp_async_commit();
    slot_ = slot_ + 1 == kStages ? 0 : slot_ + 1;
  }

  const Panel* panels_;
  char* memory_;
  int count_, panel_ = 0, slot_ = 0, at_ = 0;
  int64_t left_ = 0;
  bool resident_;
};

// ---- products: rows[s][l.out + o] = sum_k x[s][k] w[o][k] ----
// A thread has the sums of RT samples and OT neighbouring outputs, a warp 32 OT outputs. Panels are [inputs][outputs].
template <int RT, int OT>
struct Fma {
  using W = float;
  static constexpr int kSamples = RT * OT, kTogether = RT > 1 ? 2 : 1;

  // the products with four inputs
  static __device__ __forceinline__ void add(float (&sum)[RT][OT], const float* row, int x_pitch, const float* w,
                                             int outputs) {
    float input[RT][4];
#pragma unroll
    for (int r = 0; r < RT; r++) load_vector(input[r], row + r * x_pitch);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float weight[OT];
      load_vector(weight, w + j * outputs);
#pragma unroll
      for (int r = 0; r < RT; r++)
#pragma unroll
        for (int i = 0; i < OT; i++) sum[r][i] = __fmaf_rn(input[r][j], weight[i], sum[r][i]);
    }
  }
  template <bool wide>
  static __device__ __forceinline__ void multiply(const Layer& l, Ring& ring, const float* x, int x_pitch, float* rows,
                                                  int pitch, int samples) {
    constexpr int kOut = kLanes * OT, kGroups = kWide / kOut;
    const int warp = int(threadIdx.x) / kLanes, o = warp % kGroups * kOut + int(threadIdx.x) % kLanes * OT;
    const int first = warp / kGroups * RT, in = padded<W>(l.in_width);
    for (int c = 0; c < l.out_width; c += kWide) {
      const int rest = min(l.out_width - c, kWide), outputs = padded<W>(rest), deep = panel_depth<W>(outputs);
      const bool mine = o < outputs && first < samples;
      float sum[RT][OT] = {};
      const auto take_panels = [&](auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        for (int k = 0; k < in; k += kWhole ? kDeep<W> : deep) {
          const int inputs = kWhole ? kDeep<W> : min(deep, in - k), across = kWhole ? kWide : outputs;
          const float* w = reinterpret_cast<const float*>(ring.next(inputs * across * int(sizeof(W)))) + o;
          if (!mine) continue;
          const float* row = x + first * x_pitch + k;
#pragma unroll(RT > 4 ? 1 : 4)
          for (int q = 0; q < inputs; q += 4) add(sum, row + q, x_pitch, w + q * across, across);
        }
      };
      outputs == kWide&& in % kDeep<W> == 0 ? take_panels(std::true_type{}) : take_panels(std::false_type{});
      if (mine)
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
          for (int i = 0; i < OT; i++)
            if (o + i < rest) rows[(first + r) * pitch + l.out + c + o + i] = sum[r][i];
    }
  }
};

// On tensor cores, 16 outputs x 8 samples: a warp has tiles of outputs w and w + 8, and all NT tiles of samples. Panels
// are [16 inputs][16 outputs] as the lanes take them, 16 bytes each.
template <int NT>
struct Mma {
  using W = bf16;
  static constexpr int kSamples = 8 * NT, kTogether = 2;

  template <bool wide>
  static __device__ __forceinline__ void multiply(const Layer& l, Ring& ring, const bf16* x, int x_pitch, float* rows,
                                                  int pitch, int) {
    constexpr int MT = kWide / 16 / kWarps;
    const int warp = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes, in = padded<W>(l.in_width);
    for (int c = 0; c < l.out_width; c += kWide) {
      const int rest = min(l.out_width - c, kWide), outputs = padded<W>(rest), deep = panel_depth<W>(outputs);
      float sum[MT][NT][4] = {};
      const auto take_panels = [&](auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        for (int k = 0; k < in; k += kWhole ? kDeep<W> : deep) {
          const int inputs = kWhole ? kDeep<W> : min(deep, in - k), across = kWhole ? kWide : outputs;
          const auto* w = reinterpret_cast<const uint32_t*>(ring.next(inputs * across * int(sizeof(W))));
          if (warp * 16 >= across) continue;
          for (int q = 0; q < inputs; q += 16) {
            uint32_t input[NT][2];
            const bf16* row = x + k + q;
            if constexpr (wide) {  // not in shared memory
              const auto* p = reinterpret_cast<const uint32_t*>(row + lane / 4 * x_pitch + lane % 4 * 2);
              input[0][0] = p[0], input[0][1] = p[4];
            } else if constexpr (NT == 1) {
              ldmatrix_x2(input[0], row + lane % 8 * x_pitch + lane / 8 % 2 * 8);
            } else {
#pragma unroll
              for (int j = 0; j < NT; j += 2) {
                uint32_t two[4];
                ldmatrix_x4(two, row + ((j + lane / 16) * 8 + lane % 8) * x_pitch + lane / 8 % 2 * 8);
                input[j][0] = two[0], input[j][1] = two[1], input[j + 1][0] = two[2], input[j + 1][1] = two[3];
              }
            }
#pragma unroll
            for (int i = 0; i < MT; i++) {
              const int tile = warp + i * kWarps;
              if (tile * 16 >= across) continue;
              uint32_t weight[4];
              load_vector(weight, w + ((q / 16 * (across / 16) + tile) * kLanes + lane) * 4);
#pragma unroll
              for (int j = 0; j < NT; j++) mma_m16n8k16<bf16>(sum[i][j], weight, input[j]);
            }
          }
        }
      };
      outputs == kWide&& in % kDeep<W> == 0 ? take_panels(std::true_type{}) : take_panels(std::false_type{});
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int o = (warp + i * kWarps) * 16 + lane / 4 + e / 2 * 8, s = j * 8 + lane % 4 * 2 + e % 2;
            if (o < rest) rows[s * pitch + l.out + c + o] = sum[i][j][e];
          }
    }
  }
};

// ---- what follows a layer's map ----
__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + expf(-x));
}
__device__ __forceinline__ float activate(float x, Activation a, float alpha) {
  switch (a) {
    case Activation::relu: return x < 0.0f ? 0.0f : x;
    case Activation::leaky_relu: return x < 0.0f ? alpha * x : x;
    case Activation::silu: return x * sigmoid(x);
    case Activation::gelu: return 0.5f * x * erfcf(-0.707106781f * x);
    case Activation::gelu_tanh: return x * sigmoid(x * __fmaf_rn(0.07135481283f, x * x, 1.5957691216f));
    case Activation::elu: return x > 0.0f ? x : alpha * expm1f(x);
    case Activation::tanh: return tanhf(x);
    case Activation::sigmoid: return sigmoid(x);
    case Activation::mish: {  // x tanh(log(1 + e)) = x w / (w + 2), w = e (e + 2)
      const float e = expf(fminf(x, 40.0f)), w = e * (e + 2.0f);
      return x * __fdividef(w, w + 2.0f);
    }
    case Activation::softplus: {  // log(1 + e) = 2 artanh(e / (e + 2)), whose argument is 1 / 3 at most
      const float e = expf(-fabsf(x)), s = __fdividef(e, e + 2.0f), z = s * s;
      float p = __fmaf_rn(z, 0.133333333f, 0.153846154f);
      p = __fmaf_rn(p, z, 0.181818182f);
      p = __fmaf_rn(p, z, 0.222222222f);
      p = __fmaf_rn(p, z, 0.285714286f);
      p = __fmaf_rn(p, z, 0.4f);
      p = __fmaf_rn(p, z, 0.666666667f);
      p = __fmaf_rn(p, z, 2.0f);
      return __fmaf_rn(s, p, x < 0.0f ? 0.0f : x);
    }
    case Activation::at_least: return x < alpha ? alpha : x;
    case Activation::at_most: return x > alpha ? alpha : x;
    default: return x;
  }
}

// The greater or the lesser one; NaN if either is NaN
__device__ __forceinline__ float outer(float a, float b, MlpCombine which) {
  const bool first = which == MlpCombine::maximum ? a > b : a < b;
  return first || a != a ? a : b;
}

// A thread's elements of [samples][width]: number threadIdx.x and every kThreads-th from there.
struct Walk {
  int r, c, width, dr, dc;
  Walk() = default;
  explicit __device__ __forceinline__ Walk(const Split& s)
      : r(int(threadIdx.x) * s.inverse >> 16),
        c(int(threadIdx.x) - r * s.width),
        width(s.width),
        dr(s.rows),
        dc(s.columns) {}
  __device__ __forceinline__ void next() {
    r += dr;
    c += dc;
    if (c >= width) {
      c -= width;
      r++;
    }
  }
};

// What a layer's tables have for E of a thread's elements
template <int E>
struct Entries {
  float scale[E], shift[E];
  static __device__ __forceinline__ const float* row(const Table& t, int step, int64_t sample) {
    return t.data ? t.data + step * t.step + sample * t.sample : nullptr;
  }
  __device__ __forceinline__ void load(const Layer& l, int step, int64_t sample, Walk& at, int samples) {
    const float* p = row(l.scale, step, sample);
    const float* q = row(l.shift, step, sample);
    const float* each = row(l.shift_each, step, sample);
#pragma unroll
    for (int e = 0; e < E; e++, at.next()) {
      const bool in = at.r < samples;
      scale[e] = in && p ? p[at.r * l.scale.sample + at.c] : 1.0f;
      shift[e] = in && q ? q[at.r * l.shift.sample + at.c] : 0.0f;
      if (in && each) shift[e] += each[at.r * l.shift_each.sample + at.c];
    }
  }
};

// Mean and 1 / deviation of each row, or 0 and 1 / root of the mean square, by a warp.
__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}
__device__ __forceinline__ void moments(const Layer& l, const float* rows, int pitch, int samples, float2* to) {
  const int lane = int(threadIdx.x) % kLanes;
  for (int s = int(threadIdx.x) / kLanes; s < samples; s += kWarps) {
    const float* x = rows + s * pitch + l.in;
    float sum = 0, squares = 0;
    if (l.map == MlpMap::layer_norm)
      for (int i = lane; i < l.in_width; i += kLanes) sum += x[i];
    const float mean = sum_of_warp(sum) / float(l.in_width);
    for (int i = lane; i < l.in_width; i += kLanes) squares = __fmaf_rn(x[i] - mean, x[i] - mean, squares);
    squares = sum_of_warp(squares);
    if (lane == 0) to[s] = {mean, 1.0f / sqrtf(squares / float(l.in_width) + l.eps)};
  }
}

// The inputs of a linear layer as the products take them: rounded, at a multiple of 16 bytes, zero past the last one.
__device__ __forceinline__ void copy_inputs(const Layer& l, const float* rows, int pitch, int samples, float* to,
                                            int to_pitch) {
  for (Walk at(l.inputs); at.r < samples; at.next())
    to[at.r * to_pitch + at.c] = at.c < l.in_width ? rows[at.r * pitch + l.in + at.c] : 0.0f;
}
__device__ __forceinline__ void copy_inputs(const Layer& l, const float* rows, int pitch, int samples, bf16* to,
                                            int to_pitch) {
  for (Walk at(l.inputs); at.r < samples; at.next()) {
    const float* x = rows + at.r * pitch + l.in + at.c * 2;  // what lies past the last one is in the row, too
    float from[2];
    if (l.in % 2 == 0) {
      load_vector(from, x);
    } else {
      from[0] = x[0], from[1] = x[1];
    }
    const bf16 two[2] = {convert<bf16>(at.c * 2 < l.in_width ? from[0] : 0.0f),
                         convert<bf16>(at.c * 2 + 1 < l.in_width ? from[1] : 0.0f)};
    uint32_t word;
    memcpy(&word, two, 4);
    *reinterpret_cast<uint32_t*>(to + at.r * to_pitch + at.c * 2) = word;
  }
}

// ---- an update of x, a state, that adds v and earlier velocities, which this thread itself has kept ----
__device__ __forceinline__ float updated(float x, float v, const Update& update, const Term* terms, float* kept,
                                         int64_t stride) {
  x = rounded_product(update.scale, x);
  for (int i = 0; i < update.terms; i++) {
    const Term t = terms[i];
    x = __fmaf_rn(t.factor, t.place < 0 ? v : kept[t.place * stride], x);
  }
  if (update.kept >= 0) kept[update.kept * stride] = v;
  return x;
}

// ---- one layer on one tile ----
template <class Linear, bool wide>
__device__ __forceinline__ void run_layer(const Layer& l, const Run& a, Ring& ring, float* rows,
                                          typename Linear::W* inputs, float2* moment, int step, int64_t sample,
                                          int samples) {
  using W = typename Linear::W;
  constexpr int E = Linear::kTogether;
  Walk at, ahead;
  Entries<E> entry;
  auto look_ahead = [&] {
    at = ahead = Walk(l.outputs);
    entry.load(l, step, sample, ahead, samples);
  };
  constexpr bool early = Linear::kSamples <= 8;  // on their way while the products are done, where registers are left
  if constexpr (early) look_ahead();
  int in = l.in;
  if (l.map == MlpMap::linear) {
    in = l.out;
    const W* x = inputs;
    int x_pitch = a.input_pitch;
    if (needs_copy<W>(l.in, l.in_width)) {
      copy_inputs(l, rows, a.pitch, samples, inputs, a.input_pitch);
      __syncthreads();
    } else if constexpr (sizeof(W) == 4) {
      x = rows + l.in;
      x_pitch = a.pitch;
    }
    Linear::template multiply<wide>(l, ring, x, x_pitch, rows, a.pitch, samples);
    __syncthreads();
  } else if (l.map >= MlpMap::layer_norm) {
    moments(l, rows, a.pitch, samples, moment);
    __syncthreads();
  }
  if constexpr (!early) look_ahead();
  const Layer k = l;
  while (at.r < samples) {
    float v[E];
    Walk to = at;
#pragma unroll
    for (int e = 0; e < E; e++, at.next()) {
      v[e] = at.r < samples ? rows[at.r * a.pitch + in + at.c] : 0.0f;
      if (k.map >= MlpMap::layer_norm && at.r < samples) v[e] = (v[e] - moment[at.r].x) * moment[at.r].y;
      v[e] = __fmaf_rn(v[e], entry.scale[e], entry.shift[e]);
    }
    if (at.r < samples) entry.load(k, step, sample, ahead, samples);
#pragma unroll
    for (int e = 0; e < E; e++) v[e] = activate(v[e], k.activation, k.alpha) * k.gain;
#pragma unroll
    for (int e = 0; e < E; e++, to.next()) {
      if (to.r >= samples) break;
      float* row = rows + to.r * a.pitch;
      if (k.combine == MlpCombine::add) v[e] += row[k.other + to.c];
      if (k.combine == MlpCombine::multiply) v[e] *= row[k.other + to.c];
      if (k.combine >= MlpCombine::maximum) v[e] = outer(row[k.other + to.c], v[e], k.combine);
      row[k.out + to.c] = v[e];
    }
  }
  __syncthreads();
}

template <class Linear, bool wide>
__global__ void __launch_bounds__(kThreads, wide ? 1 : 2) mlp_sample_kernel(Run a) {
  using W = typename Linear::W;
  FK_DYNAMIC_SHARED(char, memory);
  FK_SHARED(float2, moment, [Linear::kSamples]);
  char* own = wide ? a.scratch + blockIdx.x * (a.row_bytes + a.input_bytes) : memory + a.weight_bytes;
  float* rows = reinterpret_cast<float*>(own);
  W* inputs = reinterpret_cast<W*>(own + a.row_bytes);
  // the products take samples that a tile does not have as well
  for (int64_t i = threadIdx.x; i < (a.row_bytes + a.input_bytes) / 4; i += kThreads) rows[i] = 0.0f;
  const int64_t mine = (a.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
  Ring ring(a, memory, mine * a.steps * (a.guided ? 2 : 1));
  __syncthreads();

  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int64_t sample = tile * a.per, place = sample * a.D;
    const int samples = int(a.n - sample < a.per ? a.n - sample : a.per);
    for (Walk at(a.state); at.r < samples; at.next()) {
      const int64_t i = int64_t(at.r) * a.D + at.c;
      const float x = a.x[place + i];
      rows[at.r * a.pitch + at.c] = x;
      if (a.states) a.states[place + i] = x;
    }
    __syncthreads();
    const Term* terms = a.program.terms;
    for (int s = 0; s < a.steps; s++) {
      const float h = a.multistep ? 0.0f : a.program.h[s];
      for (int pass = 0; pass <= a.guided; pass++) {
        if (pass) {  // what the layers have found is the unconditional velocity
          for (Walk at(a.state); at.r < samples; at.next()) {
            float* row = rows + at.r * a.pitch + at.c;
            row[a.uncond] = row[a.velocity];
          }
          __syncthreads();
        }
        ring.rewind();
        for (int i = 0; i < a.layers; i++) {
          const Layer& l = a.program.layers[pass * a.layers + i];
          run_layer<Linear, wide>(l, a, ring, rows, inputs, moment, s, sample, samples);
        }
      }
      for (Walk at(a.state); at.r < samples; at.next()) {
        float* row = rows + at.r * a.pitch + at.c;
        float v = row[a.velocity];
        if (a.guided) v = __fmaf_rn(a.guidance, v - row[a.uncond], row[a.uncond]);
        const int64_t i = place + int64_t(at.r) * a.D + at.c;
        float x;
        if (a.multistep) {
          const Update update = a.program.updates[s];
          float* kept = a.kept + blockIdx.x * a.past + at.r * a.D + at.c;
          x = updated(update.from_start ? a.x[i] : row[0], v, update, terms, kept, int64_t(a.per) * a.D);
        } else {
          x = __fmaf_rn(h, v, row[0]);
        }
        row[0] = x;
        if (a.velocities) a.velocities[s * a.n * a.D + i] = v;
        if (a.states) a.states[(s + 1) * a.n * a.D + i] = x;
      }
      if (a.multistep) terms += a.program.updates[s].terms;
      __syncthreads();
    }
    for (Walk at(a.state); at.r < samples; at.next())  // what this thread itself has written
      a.out[place + int64_t(at.r) * a.D + at.c] = rows[at.r * a.pitch + at.c];
  }
}

// ---- launches ----
Split split(int width) {
  return {width, (1 << 16) / width + 1, kThreads / width, kThreads % width};
}
int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// What follows from the network, the number of samples and the device: tiles, and what lies where. `room`: samples that
// the instance is to have room for.
template <class W>
Run arrange(const MlpSampleArgs& a, int& room) {
  Run r = {};
  r.D = int(a.D), r.steps = int(a.steps), r.layers = int(a.layer_count), r.velocity = int(a.velocity);
  r.guided = a.tables_uncond != nullptr, r.multistep = a.updates != nullptr;
  r.guidance = float(a.guidance);
  r.state = split(r.D);
  r.n = a.n;
  int64_t weights = 0, widest = 0;
  for_panels(a, [&](const char*, int bytes) { weights += bytes; });
  for (int64_t i = 0; i < a.layer_count; i++) {
    const MlpLayer& l = a.layers[i];
    if (l.map == MlpMap::linear && needs_copy<W>(int(l.in), int(l.in_width)) && l.in_width > widest)
      widest = l.in_width;
  }
  // Rows begin 4 or 20 banks after one another, and rows of inputs 4, 12, 20 or 28: no two lanes of a product meet.
  r.uncond = int(round_up(a.row, 16));
  r.pitch = r.uncond + (r.guided ? int(round_up(a.D, 16)) : 0) + 4;
  r.input_pitch = widest ? padded<W>(int(widest)) + (sizeof(W) == 2 ? 8 : 0) : 0;

  const int64_t limit = shared_limit() - kStatic, ring = weights < kStages * kPanel ? weights : kStages * kPanel;
  auto make_room = [&](int samples) {
    room = samples;
    r.row_bytes = round_up(int64_t(samples) * r.pitch * 4, 16);
    r.input_bytes = round_up(int64_t(samples) * r.input_pitch * int64_t(sizeof(W)), 16);
    return ring + r.row_bytes + r.input_bytes <= limit;
  };
  const int64_t share = (a.n + multiprocessors() - 1) / multiprocessors();
  const int most = int(share < kMost ? share : kMost);  // samples of a tile, if there is room
  r.wide = !make_room(sizeof(W) == 4 ? 1 : 8);
  if (r.wide) make_room(8);
  while (!r.wide && room < most) {
    const int before = room;
    if (make_room(room == 1 ? 4 : 2 * room)) continue;
    make_room(before);
    break;
  }
  r.tiles = (a.n + room - 1) / room;
  if (most < room) r.tiles = (a.n + most - 1) / most;
  r.per = int((a.n + r.tiles - 1) / r.tiles);
  r.tiles = (a.n + r.per - 1) / r.per;
  const int64_t own = r.wide ? 0 : r.row_bytes + r.input_bytes;
  r.resident = weights + own <= limit;
  r.weight_bytes = int(r.resident ? weights : kStages * kPanel);
  r.past = r.multistep ? a.places * r.per * a.D : 0;
  return r;
}

Run arrange(const MlpSampleArgs& a, int& room) {
  return a.low ? arrange<bf16>(a, room) : arrange<float>(a, room);
}

// At most, where a block has scratch memory: the wide ones have a multiprocessor to themselves.
int64_t blocks_with_scratch(const Run& r) {
  const int64_t most = (r.wide ? 1 : 2) * multiprocessors();
  return r.tiles < most ? r.tiles : most;
}
// Bytes of scratch memory in which all blocks have rows
int64_t scratch_of_rows(const Run& r) {
  return r.wide ? blocks_with_scratch(r) * (r.row_bytes + r.input_bytes) : 0;
}

template <class Linear, bool wide = false>
int launch(const Run& r, void* stream) {
  auto kernel = mlp_sample_kernel<Linear, wide>;
  const int shared = r.weight_bytes + (wide ? 0 : int(r.row_bytes + r.input_bytes));
  allow_shared(kernel, shared);
  int64_t blocks = blocks_with_scratch(r);
  if (!wide) {
    const int64_t most = int64_t(multiprocessors()) * resident_blocks(kernel, kThreads, shared);
    if (!r.multistep || most < blocks) blocks = r.tiles < most ? r.tiles : most;
  }
  FK_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(kThreads), shared, stream, r);
  return launched();
}

// Bytes that come as parameters of a launch: the memory of the host is read before the call returns.
struct Piece {
  uint4 words[240];
};
__global__ void mlp_upload_kernel(Piece piece, uint4* to, int count) {
  const int i = int(threadIdx.x);
  if (i < count) to[i] = piece.words[i];
}

Layer layer_of(const MlpLayer& l, const MlpTable* tables, bool low) {
  auto table = [&](int64_t i) {
    return i < 0 ? Table{} : Table{tables[i].data, tables[i].step_stride, tables[i].sample_stride};
  };
  return {l.map,
          l.activation,
          l.combine,
          int(l.in),
          int(l.in_width),
          int(l.out),
          int(l.out_width),
          int(l.other),
          float(l.eps),
          float(l.alpha),
          float(l.gain),
          table(l.scale),
          table(l.shift),
          table(l.shift_each),
          split(int(l.out_width)),
          split(low ? padded<bf16>(int(l.in_width)) / 2 : padded<float>(int(l.in_width)))};
}

int64_t terms_of(const MlpPrepared& p) {
  int64_t count = 0;
  for (int64_t s = 0; s < p.steps; s++) count += p.updates[s].terms;
  return count;
}

// Where its parts lie from `base` on, and their bytes.
Program program_at(const MlpPrepared& p, char* base, int64_t& bytes) {
  Program r = {};
  for_panels(p, [&](const char*, int) { r.panel_count++; });
  const int64_t layers = p.layer_count * (p.tables_uncond ? 2 : 1) * int64_t(sizeof(Layer));
  const int64_t panels = r.panel_count * int64_t(sizeof(Panel));
  r.layers = reinterpret_cast<Layer*>(base);
  r.panels = reinterpret_cast<Panel*>(base + layers);
  char* steps = base + layers + panels;
  if (!p.updates) {
    r.h = reinterpret_cast<float*>(steps);
    bytes = layers + panels + round_up(p.steps * int64_t(sizeof(float)), 16);
    return r;
  }
  r.updates = reinterpret_cast<Update*>(steps);
  r.terms = reinterpret_cast<Term*>(r.updates + p.steps);
  const int64_t terms = terms_of(p) * int64_t(sizeof(Term));
  bytes = layers + panels + round_up(p.steps * int64_t(sizeof(Update)) + terms, 16);
  return r;
}

}  // namespace

int64_t mlp_program(const MlpPrepared& p, void* to) {
  int64_t bytes;
  Program r = program_at(p, static_cast<char*>(to), bytes);
  if (!to) return bytes;
  for (bool uncond : {true, false})
    for (int64_t i = 0; (!uncond || p.tables_uncond) && i < p.layer_count; i++)
      *r.layers++ = layer_of(p.layers[i], uncond ? p.tables_uncond : p.tables, p.low);
  for_panels(p, [&](const char* weights, int bytes) { *r.panels++ = {weights, bytes}; });
  for (int64_t s = 0; s < p.steps; s++) {
    if (p.updates) {
      const MlpUpdate& u = p.updates[s];
      r.updates[s] = {int(u.from_start), int(u.terms), int(u.kept), p.scales ? float(p.scales[s]) : 1.0f};
    } else {
      r.h[s] = float(p.h[s]);
    }
  }
  for (int64_t i = 0; p.updates && i < terms_of(p); i++) r.terms[i] = {int(p.terms[i].place), float(p.terms[i].factor)};
  return bytes;
}

int mlp_upload(const MlpUploadArgs& a, void* stream) {
  constexpr int kMostWords = sizeof(Piece) / sizeof(uint4);
  const uint4 *from = static_cast<const uint4*>(a.from), *end = from + a.bytes / int64_t(sizeof(uint4));
  for (uint4* to = static_cast<uint4*>(a.to); from < end; from += kMostWords, to += kMostWords) {
    const int count = end - from < kMostWords ? int(end - from) : kMostWords;
    Piece piece = {};
    memcpy(&piece, from, size_t(count) * sizeof(uint4));
    FK_LAUNCH(mlp_upload_kernel, dim3(1), dim3(kThreads), 0, stream, piece, to, count);
  }
  return launched();
}

int64_t mlp_scratch(const MlpSampleArgs& a) {
  if (a.n == 0) return 0;
  int room;
  const Run r = arrange(a, room);
  return scratch_of_rows(r) + blocks_with_scratch(r) * r.past * int64_t(sizeof(float));
}

int mlp_sample(const MlpLaunchArgs& a, void* stream) {
  if (a.n == 0) return launched();
  int room;
  int64_t bytes;
  Run r = arrange(a, room);
  r.program = program_at(a, static_cast<char*>(const_cast<void*>(a.program)), bytes);
  r.x = a.x, r.out = a.out, r.states = a.states, r.velocities = a.velocities;
  r.scratch = static_cast<char*>(a.scratch);
  r.kept = reinterpret_cast<float*>(r.scratch + scratch_of_rows(r));
  if (a.low) {
    if (r.wide) return launch<Mma<1>, true>(r, stream);
    if (room == 8) return launch<Mma<1>>(r, stream);
    return room == 16 ? launch<Mma<2>>(r, stream) : launch<Mma<4>>(r, stream);
  }
  switch (room) {
    case 1: return launch<Fma<1, 1>>(r, stream);
    case 4: return launch<Fma<4, 1>>(r, stream);
    case 8: return r.wide ? launch<Fma<8, 1>, true>(r, stream) : launch<Fma<8, 1>>(r, stream);
    case 16: return launch<Fma<8, 2>>(r, stream);
    default: return launch<Fma<8, 4>>(r, stream);
  }
}

}  // namespace cuda
}  // namespace fk

// Products of linear layers by multiply-adds in float32. Weights lie in panels of four vectors of outputs,
// [in][outputs]: an input, broadcast, meets four vectors of weights, and a weight meets the inputs of up to kMost
// samples.
#include "mlp_sample/run.h"

namespace fk {
namespace FK_ISA {
namespace {

constexpr int kWide = 4;  // vectors of a panel; the last one of a layer may have fewer
#if defined(__AVX512F__)
constexpr int kMost = 6;  // 24 accumulators + 6 inputs + 1 weight of 32 registers
#else
constexpr int kMost = 3;  // 12 + 3 + 1 of 16
#endif

// y[r] = sum_k x[r][k] w[k], for R samples and V vectors of outputs
template <class W, int R, int V>
void product(const W* w, const float* x, int64_t x_pitch, int64_t in, float* y, int64_t y_pitch) {
  vf sum[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int q = 0; q < V; q++) sum[r][q] = vf{};
  for (int64_t k = 0; k < in; k++, w += V * kFloats, x++) {
    vf input[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) input[r] = splat(x[r * x_pitch]);
#pragma GCC unroll 4
    for (int q = 0; q < V; q++) {
      vf weight = load(w + q * kFloats);
      if (R > 1) hold(weight);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) sum[r][q] += input[r] * weight;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int q = 0; q < V; q++) store(y + r * y_pitch + q * kFloats, sum[r][q]);
}

template <class W>
using Product = void(const W*, const float*, int64_t, int64_t, float*, int64_t);

template <class W, int V>
Product<W>* product_of(int64_t rows) {
  switch (rows) {
    case 1: return product<W, 1, V>;
    case 2: return product<W, 2, V>;
#if defined(__AVX512F__)
    case 3: return product<W, 3, V>;
    case 4: return product<W, 4, V>;
    case 5: return product<W, 5, V>;
#endif
    default: return product<W, kMost, V>;
  }
}

template <class W>
Product<W>* product_of(int64_t rows, int64_t vectors) {
  switch (vectors) {
    case 1: return product_of<W, 1>(rows);
    case 2: return product_of<W, 2>(rows);
    case 3: return product_of<W, 3>(rows);
    default: return product_of<W, kWide>(rows);
  }
}

template <class W>
struct Panels {
  static constexpr int64_t kRows = kMost, kFew = kMost, kTile = 48, kPanel = kWide * kFloats;
  static constexpr bool kRounded = sizeof(W) < sizeof(float);

  static int64_t input_bytes(int64_t samples, int64_t in) {
    return kRounded ? samples * round_up(in, kPlace) * int64_t(sizeof(float)) : 0;
  }

  // Inputs rounded as the weights are, but kept as floats: products of two bfloat16 are exact in float32
  static void prepare(const MlpLayer& l, const Tile& t) {
    if (!kRounded) return;
    const int64_t pitch = round_up(l.in_width, kPlace);
    for (int64_t i = 0; i < t.n; i++)
      for (int64_t k = 0; k < l.in_width; k += kFloats) {
        bf16 rounded[kFloats];
        store(rounded, load(t.rows + i * t.pitch + l.in + k));
        store(static_cast<float*>(t.input) + i * pitch + k, load(rounded));
      }
  }

  static void multiply(const MlpLayer& l, const Tile& t, int64_t first, int64_t last) {
    const int64_t pitch = kRounded ? round_up(l.in_width, kPlace) : t.pitch;
    const float* x = kRounded ? static_cast<const float*>(t.input) : t.rows + l.in;
    for (int64_t p = first; p < last; p++) {
      const W* w = static_cast<const W*>(l.weight) + p * l.in_width * kPanel;
      const int64_t vectors = smaller((l.out_width - p * kPanel + kFloats - 1) / kFloats, kWide);
      for (int64_t r = 0; r < t.n; r += kMost) {
        float* y = t.rows + r * t.pitch + l.out + p * kPanel;
        product_of<W>(smaller(t.n - r, kMost), vectors)(w, x + r * pitch, pitch, l.in_width, y, t.pitch);
      }
    }
  }
};

FK_INLINE void put(float* to, float v) {
  *to = v;
}
FK_INLINE void put(bf16* to, float v) {
  bf16 rounded[kFloats];
  store(rounded, splat(v));
  *to = rounded[0];
}

template <class W>
int64_t pack(const MlpPackArgs& a) {
  constexpr int64_t kPanel = Panels<W>::kPanel;
  const int64_t columns = round_up(a.out, kFloats);
  if (!a.packed) return columns * a.in * int64_t(sizeof(W));
  W* to = static_cast<W*>(a.packed);
  for (int64_t o = 0; o < columns; o += kPanel) {
    const int64_t wide = smaller(kPanel, columns - o);
    for (int64_t k = 0; k < a.in; k++)
      for (int64_t c = 0; c < wide; c++) put(to++, o + c < a.out ? a.weight[(o + c) * a.in + k] : 0.0f);
  }
  return columns * a.in * int64_t(sizeof(W));
}

}  // namespace

int64_t mlp_sample(const MlpSampleArgs& a) {
  return a.low ? run_sampler<Panels<bf16>>(a) : run_sampler<Panels<float>>(a);
}

int64_t mlp_pack(const MlpPackArgs& a) {
  return a.type == Dtype::bf16 ? pack<bf16>(a) : pack<float>(a);
}

}  // namespace FK_ISA
}  // namespace fk

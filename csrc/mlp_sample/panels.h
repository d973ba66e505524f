// Products of linear layers by multiply-adds. Weights lie in panels of kWide vectors of outputs, [step][outputs], where
// a step is an input or a pair of them. A weight meets the inputs of up to kMost samples.
//
// What is multiplied is a struct D of
//
//   Weight, Input  elements of what is packed, and of what `prepare` makes of a layer's input
//   kDepth         inputs of a step, whose weights lie together
//   kParts         multiply-adds of a step
//   weight, input  a vector of weights, and an input in all lanes, of one part
//   add            sum + input * weight
//   prepare        a sample's inputs
//   Wide           where kParts > 1: the same products, of weights taken apart before
#pragma once

#include "mlp_sample/run.h"

namespace fk {
namespace FK_ISA {
namespace {

#if defined(__AVX512F__) || defined(FK_EMULATED_BF16)
constexpr int kWide = 4, kMost = 6;  // 24 accumulators + 4 weights + 1 input of 32 registers
constexpr int kSums = 16;  // that hide how long one takes
#else
constexpr int kWide = 2, kMost = 6;  // 12 + 2 + 1 of 16
constexpr int kSums = 12;
#endif

FK_INLINE void put(float* to, float v) {
  *to = v;
}
FK_INLINE void put(bf16* to, float v) {
  bf16 rounded[kFloats];
  store(rounded, splat(v));
  *to = rounded[0];
}

// y[r] = sum_k x[r][k] w[k], for R samples and V vectors of outputs of each of J panels
template <class D, int R, int V, int J>
void product(const typename D::Weight* w, int64_t w_pitch, const typename D::Input* x, int64_t x_pitch, int64_t steps,
             float* y, int64_t y_pitch) {
  vf sum[R][J * V];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int q = 0; q < J * V; q++) sum[r][q] = vf{};
  for (int64_t k = 0; k < steps; k++, w += V * kFloats, x += D::kParts) {
#pragma GCC unroll 2
    for (int part = 0; part < D::kParts; part++) {
      if constexpr (R <= J * V) {  // the fewer of both wait in registers
        typename D::Held input[R];
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) input[r] = D::input(x + r * x_pitch + part);
#pragma GCC unroll 8
        for (int q = 0; q < J * V; q++) {
          auto weight = D::weight(w + q / V * w_pitch + q % V * kFloats, part);
          if (R > 1) hold(weight);
#pragma GCC unroll 6
          for (int r = 0; r < R; r++) sum[r][q] = D::add(sum[r][q], input[r], weight);
        }
      } else {
        decltype(D::weight(w, part)) weight[J * V];
#pragma GCC unroll 8
        for (int q = 0; q < J * V; q++) {
          weight[q] = D::weight(w + q / V * w_pitch + q % V * kFloats, part);
          hold(weight[q]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          const auto input = D::input(x + r * x_pitch + part);
#pragma GCC unroll 8
          for (int q = 0; q < J * V; q++) sum[r][q] = D::add(sum[r][q], input, weight[q]);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int q = 0; q < J * V; q++) store(y + r * y_pitch + q * kFloats, sum[r][q]);
}

template <class D>
using Product = void(const typename D::Weight*, int64_t, const typename D::Input*, int64_t, int64_t, float*, int64_t);

template <class D, int V>
Product<D>* product_of(int64_t rows) {
  switch (rows) {
    case 1: return product<D, 1, V, 1>;
    case 2: return product<D, 2, V, 1>;
    case 3: return product<D, 3, V, 1>;
    case 4: return product<D, 4, V, 1>;
    case 5: return product<D, 5, V, 1>;
    default: return product<D, kMost, V, 1>;
  }
}

template <class D>
Product<D>* product_of(int64_t rows, int64_t vectors) {
  switch (vectors) {
    case 1: return product_of<D, 1>(rows);
#if defined(__AVX512F__) || defined(FK_EMULATED_BF16)
    case 2: return product_of<D, 2>(rows);
    case 3: return product_of<D, 3>(rows);
#endif
    default: return product_of<D, kWide>(rows);
  }
}

// The same on J panels at once, for the few samples whose sums alone would wait for one another.
template <class D, int R>
int64_t joined(Product<D>** run, int64_t panels) {
  constexpr int kMostJoined = kSums / (R * kWide);
  if (kMostJoined >= 4 && panels >= 4) return *run = product < D, R, kWide, kMostJoined >= 4 ? 4 : 1 >, 4;
  if (kMostJoined >= 2 && panels >= 2) return *run = product < D, R, kWide, kMostJoined >= 2 ? 2 : 1 >, 2;
  return 1;
}

template <class D>
struct Panels {
  typedef typename D::Weight Weight;
  typedef typename D::Input Input;
  static constexpr int64_t kRows = kMost, kFew = kMost, kTile = 48, kPanel = kWide * kFloats;
  static constexpr int64_t kApart = 2;  // groups of samples that take a panel's weights as they are

  static int64_t steps_of(int64_t in) { return (in + D::kDepth - 1) / D::kDepth; }
  static int64_t input_bytes(int64_t samples, int64_t in) {
    return samples * D::input_pitch(in) * int64_t(sizeof(Input));
  }
  static int64_t panel_bytes(int64_t in) {
    return D::kParts > 1 ? steps_of(in) * D::kParts * kPanel * int64_t(sizeof(float)) : 0;
  }
  // The parts of a panel's weights one after another, for many groups of samples
  static void take_apart(const Weight* w, int64_t steps, int64_t width, float* to) {
    for (int64_t k = 0; k < steps; k++)
      for (int part = 0; part < D::kParts; part++, to += width)
        for (int64_t c = 0; c < width; c += kFloats) store(to + c, D::weight(w + k * width + c, part));
  }
  static void prepare(const MlpLayer& l, const Tile& t) {
    const int64_t pitch = D::input_pitch(l.in_width);
    for (int64_t i = 0; pitch && i < t.n; i++)
      D::prepare(t.rows + i * t.pitch + l.in, l.in_width, static_cast<Input*>(t.input) + i * pitch);
  }

  static void multiply(const MlpLayer& l, const Tile& t, int64_t first, int64_t last) {
    const int64_t own = D::input_pitch(l.in_width), pitch = own ? own : t.pitch, steps = steps_of(l.in_width);
    const Input* x = own ? static_cast<const Input*>(t.input) : reinterpret_cast<const Input*>(t.rows + l.in);
    const int64_t groups = (t.n + kMost - 1) / kMost, whole = smaller(last, l.out_width / kPanel);
    for (int64_t p = first, taken; p < last; p += taken) {
      const Weight* w = static_cast<const Weight*>(l.weight) + p * steps * kPanel;
      const int64_t vectors = smaller((l.out_width - p * kPanel + kFloats - 1) / kFloats, kWide);
      float* y = t.rows + l.out + p * kPanel;
      taken = 1;
      if constexpr (D::kParts > 1)
        if (groups > kApart) {
          take_apart(w, steps, vectors * kFloats, t.panel);
          for (int64_t g = 0; g < groups; g++) {
            const int64_t r = t.n * g / groups, rows = t.n * (g + 1) / groups - r;
            Product<typename D::Wide>* run = product_of<typename D::Wide>(rows, vectors);
            run(t.panel, 0, x + r * pitch, pitch, steps * D::kParts, y + r * t.pitch, t.pitch);
          }
          continue;
        }
      for (int64_t g = 0; g < groups; g++) {
        const int64_t r = t.n * g / groups, rows = t.n * (g + 1) / groups - r;
        Product<D>* run = product_of<D>(rows, vectors);
        if (t.n == 1) taken = joined<D, 1>(&run, whole - p);
        if (t.n == 2) taken = joined<D, 2>(&run, whole - p);
        if (t.n == 3) taken = joined<D, 3>(&run, whole - p);
        run(w, steps * kPanel, x + r * pitch, pitch, steps, y + r * t.pitch, t.pitch);
      }
    }
  }

  static int64_t pack(const MlpPackArgs& a) {
    const int64_t columns = round_up(a.out, kFloats), steps = steps_of(a.in);
    const int64_t bytes = columns * steps * int64_t(sizeof(Weight));
    if (!a.packed) return bytes;
    auto* to = static_cast<typename D::Packed*>(a.packed);
    for (int64_t o = 0; o < columns; o += kPanel)
      for (int64_t k = 0; k < steps * D::kDepth; k += D::kDepth)
        for (int64_t c = o; c < smaller(o + kPanel, columns); c++)
          for (int64_t i = k; i < k + D::kDepth; i++) put(to++, c < a.out && i < a.in ? a.weight[c * a.in + i] : 0.0f);
    return bytes;
  }
};

}  // namespace
}  // namespace FK_ISA
}  // namespace fk

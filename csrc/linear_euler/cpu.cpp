// Multiply-adds in the state's type, of features in it: normalised and modulated where wanted.
#include "linear_euler/run.h"

namespace fk {
namespace FK_ISA {
namespace {

template <class X>
struct MultiplyAdds {
  typedef X State, Element;
  typedef typename Vector<X>::type Held;
  static constexpr Dtype kType = sizeof(X) == 8 ? Dtype::f64 : Dtype::f32;
  static constexpr int kLanes = Vector<X>::n;

  FK_INLINE Held held(const X* p) { return load(p); }
  FK_INLINE Held add(Held sum, Held a, Held b) { return sum + a * b; }
};

template <class X, class Given, class M>  // M: elements of the modulation
struct Head {
  typedef Given Z;
  typedef MultiplyAdds<X> Product;

  static void prepare(const LinearEulerArgs& a, const Shared<Product>& s, const Token<Z>* token, X* tile, int64_t ld) {
    using V = typename Vector<X>::type;
    constexpr int L = Vector<X>::n;
    const int64_t d = a.d, whole = d / L * L;
    V sum[kRows] = {};
    for (int64_t i = 0; i < d; i += L)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const V v = load_some(token[r].z + i, d - i);
        store(tile + r * ld + i, v);
        sum[r] += v;
      }
    if (is_plain(a)) return;

    X mean[kRows] = {}, inverse[kRows] = {1, 1, 1, 1};
    if (a.normed) {  // squares of deviations: those of z would cancel where the mean is large
      double total[kRows] = {}, square[kRows] = {};
      add_lane_sums(total, sum[0], sum[1], sum[2], sum[3]);
      for (int r = 0; r < kRows; r++) mean[r] = X(total[r] / double(d)), sum[r] = V{};
      for (int64_t i = 0; i < whole; i += L)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
          const V e = load(tile + r * ld + i) - mean[r];
          sum[r] += e * e;
        }
      add_lane_sums(square, sum[0], sum[1], sum[2], sum[3]);
      for (int r = 0; r < kRows; r++) {
        for (int64_t i = whole; i < d; i++) {
          const double e = double(tile[r * ld + i] - mean[r]);
          square[r] += e * e;
        }
        inverse[r] = X(1 / __builtin_sqrt(square[r] / double(d) + a.eps));
      }
    }
    const M *scale[kRows], *shift[kRows];
    for (int r = 0; r < kRows; r++) {
      scale[r] = a.scale.p ? static_cast<const M*>(a.scale.p) + token[r].sample * a.scale.stride : nullptr;
      shift[r] = a.shift.p ? static_cast<const M*>(a.shift.p) + token[r].sample * a.shift.stride : nullptr;
    }
    const bool shared = token[0].sample == token[kRows - 1].sample;  // they are neighbours
    for (int64_t i = 0; i < d; i += L) {
      V by{}, to{};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        X* row = tile + r * ld + i;
        V f = (load(row) - mean[r]) * inverse[r];
        if (s.norm_weight) f *= load(s.norm_weight + i);
        if (s.norm_bias) f += load(s.norm_bias + i);
        if (scale[r]) {
          if (r == 0 || !shared) by = load_some(scale[r] + i, d - i);
          f += f * by;
        }
        if (shift[r]) {
          if (r == 0 || !shared) to = load_some(shift[r] + i, d - i);
          f += to;
        }
        store(row, f);
      }
    }
    for (int r = 0; r < kRows && whole < d; r++)
      for (int64_t i = d; i < whole + L; i++) tile[r * ld + i] = 0;
  }
};

template <class Z>
void by_modulation(const LinearEulerArgs& a) {
  const Rows& given = a.scale.p ? a.scale : a.shift;
  given.p&& given.type == Dtype::f32 ? run<Head<float, Z, float>>(a) : run<Head<float, Z, Z>>(a);
}

}  // namespace

void linear_euler(const LinearEulerArgs& a) {
  if (a.x_type == Dtype::f64) return run<Head<double, double, double>>(a);
  switch (a.z.type) {
    case Dtype::bf16: return by_modulation<bf16>(a);
    case Dtype::f16: return by_modulation<f16>(a);
    default: return run<Head<float, float, float>>(a);
  }
}

}  // namespace FK_ISA
}  // namespace fk

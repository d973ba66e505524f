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
  using V = typename Vector<X>::type;
  static constexpr int L = Vector<X>::n;

  // The norm's weight and bias and a sample's scale and shift, in one factor and one term of its normalised tokens
  struct Factors {
    const LinearEulerArgs& a;
    const Shared<Product>& s;
    const M *scale, *shift;  // null where there is none

    Factors(const LinearEulerArgs& a, const Shared<Product>& s, int64_t sample)
        : a(a), s(s), scale(static_cast<const M*>(a.scale.p)), shift(static_cast<const M*>(a.shift.p)) {
      if (scale) scale += sample * a.scale.stride;
      if (shift) shift += sample * a.shift.stride;
    }
    void at(int64_t i, V* by, V* to) const {
      V factor = X(1) - V{};
      if (scale) factor += load_some(scale + i, a.d - i);
      *by = s.norm_weight ? factor * load(s.norm_weight + i) : factor;
      *to = s.norm_bias ? factor * load(s.norm_bias + i) : V{};
      if (shift) *to += load_some(shift + i, a.d - i);
      *to = rounded(*to);  // the same whether it is kept or used at once
    }
  };

  // Four rows of z - mean, of which squares do not cancel where the mean is large, and what remains to multiply with
  static void centre(const LinearEulerArgs& a, const Token<Z>* token, X* tile, int64_t ld, X* inverse) {
    const int64_t whole = a.d / L * L, rest = a.d - whole, next = kRows * a.z_token;
    V mean[kRows], sum[kRows] = {};
    double total[kRows] = {}, square[kRows] = {};
    for (int64_t i = 0; i < whole; i += L)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) sum[r] += load(token[r].z + i);
    for (int r = 0; r < kRows && rest; r++) sum[r] += load_some(token[r].z + whole, rest);
    add_lane_sums(total, sum[0], sum[1], sum[2], sum[3]);
    for (int r = 0; r < kRows; r++) mean[r] = X(total[r] / double(a.d)) - V{}, sum[r] = V{};
    for (int64_t i = 0; i < whole; i += L) {
      if (i % (64 / int64_t(sizeof(Z))) == 0)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) __builtin_prefetch(token[r].z + next + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const V e = load(token[r].z + i) - mean[r];
        store(tile + r * ld + i, e);
        sum[r] += e * e;
      }
    }
    for (int r = 0; r < kRows && rest; r++) {
      X* last = tile + r * ld + whole;
      store(last, load_some(token[r].z + whole, rest) - mean[r]);
      for (int64_t i = rest; i < L; i++) last[i] = 0;
      sum[r] += load(last) * load(last);
    }
    add_lane_sums(square, sum[0], sum[1], sum[2], sum[3]);
    for (int r = 0; r < kRows; r++) inverse[r] = X(1 / __builtin_sqrt(square[r] / double(a.d) + a.eps));
  }

  static void prepare(const LinearEulerArgs& a, const Shared<Product>& s, const Token<Z>* token, X* tile, int64_t ld,
                      Modulation<X>& of) {
    X inverse[kRows] = {1, 1, 1, 1};
    if (a.normed)
      centre(a, token, tile, ld, inverse);
    else
      for (int r = 0; r < kRows; r++)
        for (int64_t i = 0; i < a.d; i += L) store(tile + r * ld + i, load_some(token[r].z + i, a.d - i));
    if (is_plain(a)) return;
    if (token[0].sample != token[kRows - 1].sample) {  // they are neighbours
      for (int r = 0; r < kRows; r++) {
        const Factors factors(a, s, token[r].sample);
        for (int64_t i = 0; i < a.d; i += L) {
          V by, to;
          factors.at(i, &by, &to);
          X* row = tile + r * ld + i;
          store(row, load(row) * inverse[r] * by + to);
        }
      }
      return;
    }
    if (of.sample != token[0].sample) {
      const Factors factors(a, s, of.sample = token[0].sample);
      for (int64_t i = 0; i < a.d; i += L) {
        V by, to;
        factors.at(i, &by, &to);
        store(of.by + i, by), store(of.to + i, to);
      }
    }
    V rows[kRows];
    for (int r = 0; r < kRows; r++) rows[r] = inverse[r] - V{};
    for (int64_t i = 0; i < a.d; i += L) {
      const V by = load(of.by + i), to = load(of.to + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        X* row = tile + r * ld + i;
        store(row, load(row) * rows[r] * by + to);
      }
    }
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

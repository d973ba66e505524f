#include "common/test.h"

#include <memory>

#include "linear_euler/linear_euler.h"

namespace {

struct HeadCase {
  int64_t n, T, d, outputs, patch, C, H, W;  // without patches n samples of T * outputs
  bool normed, affine, modulated, guided;
  int terms, layout;  // layout 1: misaligned, rows apart; 2: that, in place, the velocity over the last of the history
  Dtype low_type;
  bool subnormal = false;  // some tokens and weights
};

// x + h v + sum b v' by plain loops, with a bound on the error of each sum in the kernel's type
void linear_euler_case(Dtype x_type, Dtype z_type, Dtype weight_type, HeadCase k) {
  const int64_t m = k.guided ? 2 * k.n : k.n, P = k.patch, elements = P ? k.n * k.C * k.H * k.W : k.n * k.T * k.outputs;
  const int shift = k.layout > 0, gap = k.layout > 0 ? 3 : 0;
  const int64_t token = k.d + gap, sample = k.T * token + 2 * gap, row = k.d + gap;
  if (k.layout == 2 && k.terms == 0) k.layout = 1;
  k.affine &= k.normed;
  CASE(
      "linear_euler x %d z %d W %d n %ld T %ld d %ld outputs %ld patch %ld norm %d%d mod %d guided %d terms %d layout "
      "%d",
      int(x_type), int(z_type), int(weight_type), long(k.n), long(k.T), long(k.d), long(k.outputs), long(P), k.normed,
      k.affine, k.modulated, k.guided, k.terms, k.layout);
  Tensor x(x_type, elements, shift), out(x_type, elements, shift), low(k.low_type, k.low_type == f32 ? 0 : elements);
  Tensor z(z_type, m * sample, shift), weight(weight_type, k.outputs * row, shift), bias(weight_type, k.outputs, shift);
  Tensor norm_weight(weight_type, k.affine ? k.d : 0, shift), norm_bias(weight_type, k.affine ? k.d : 0);
  Tensor scale(weight_type, k.modulated ? m * row : 0, shift), move(weight_type, k.modulated ? k.d : 0, shift);
  Tensor velocity(z_type, k.layout ? elements : 0, shift), b(f64, k.terms);
  for (Tensor* t : {&x, &z, &weight, &bias, &norm_weight, &norm_bias, &scale, &move, &b}) t->random(-3, 0);
  for (Tensor* t : {&z, &weight})
    for (int64_t i = 0; k.subnormal && i < t->n; i++) {  // times large ones
      const int64_t column = (t == &z ? i % sample % token : i % row) % 3;
      if (column < 2) t->set(i, (*t)[i] * power_of_two((column == 0) == (t == &z) ? -128 : 120));
    }
  for (int64_t i = 0; i < z.n; i++)
    if (i % sample >= k.T * token || i % sample % token >= k.d) z.set(i, NAN);
  for (Tensor* t : {&weight, &scale})
    for (int64_t i = 0; i < t->n; i++)
      if (i % row >= k.d) t->set(i, NAN);
  std::vector<std::unique_ptr<Tensor>> history;
  std::vector<const void*> addresses;
  for (int t = 0; t < k.terms; t++) {
    history.push_back(std::make_unique<Tensor>(z_type, elements, shift));
    history[t]->random(-3, 1);
    addresses.push_back(history[t]->as());
  }
  if (k.layout == 2) addresses.back() = velocity.as();
  const double h = 0.37, w = 3.5, eps_norm = 1e-3, e = eps(x_type), x_scales[] = {1, -0.3, 0};
  const double x_scale = x_scales[k.terms];

  auto kernel = [&](int threads) {
    if (k.layout == 2) out.copy(x), velocity.copy(*history.back());
    FK_SELECT_BF16(linear_euler)
    ({k.layout == 2 ? out.as() : x.as(),
      {z.as(), z_type, sample},
      token,
      {weight.as(), weight_type, row},
      {bias.as(), weight_type, 0},
      {norm_weight.as(), weight_type, 0},
      {norm_bias.as(), weight_type, 0},
      {scale.as(), weight_type, row},
      {move.as(), weight_type, 0},  // one row for all
      addresses.data(),
      b.as<double>(),
      k.terms,
      out.as(),
      low.as(),
      velocity.as(),
      x_type,
      z_type,
      k.low_type,
      z_type,
      k.n,
      k.T,
      k.d,
      k.outputs,
      P,
      k.C,
      k.H,
      k.W,
      k.outputs % 2 == 1,
      k.normed,
      k.guided,
      eps_norm,
      h,
      w,
      x_scale,
      threads});
  };
  // products of pairs of bfloat16 take subnormal ones for zero
  const bool emulated = fk::isa() == fk::Isa::emulated_bf16, bf16_only = z_type == bf16 && weight_type == bf16;
  const bool pairs = (emulated || fk::isa() >= fk::Isa::avx512_bf16) && bf16_only && !k.normed && !k.modulated;
  auto flushed = [&](double v) { return pairs && std::fabs(v) < 0x1p-126 ? 0 : v; };
  // a lane sums d / lanes terms, then lanes add up
  const double adds = double(k.d) / (pairs ? 16 : lanes(x_type)) + 12, d = double(k.d);
  struct Sum {
    double v, error, size;
  };
  std::vector<double> f(k.d), f_error(k.d);
  auto features = [&](int64_t s, int64_t t) {  // of one token, and what they may be off by
    double mean = 0, size = 0, square = 0, worst = 0;
    for (int64_t i = 0; i < k.d; i++)
      f[i] = flushed(z[s * sample + t * token + i]), mean += f[i] / d, size += std::fabs(f[i]) / d;
    for (int64_t i = 0; i < k.d; i++) {
      f_error[i] = 0;
      if (k.normed) {
        f_error[i] = e * (adds * size + std::fabs(f[i]) + std::fabs(mean)), f[i] -= mean;
        square += f[i] * f[i] / d, worst = std::max(worst, f_error[i]);
      }
    }
    const double inverse = k.normed ? 1 / std::sqrt(square + eps_norm) : 1;
    for (int64_t i = 0; i < k.d; i++) {
      f[i] *= inverse;
      f_error[i] = inverse * f_error[i] + (k.normed ? std::fabs(f[i]) * (worst * inverse + (adds + 4) * e) : 0);
      const double factor = (k.affine ? norm_weight[i] : 1) * (k.modulated ? 1 + scale[s * row + i] : 1);
      const double add = (k.affine ? norm_bias[i] : 0) * (k.modulated ? 1 + scale[s * row + i] : 1);
      const double wide = k.modulated ? (1 + std::fabs(scale[s * row + i])) : 1;
      f_error[i] = wide * (std::fabs(k.affine ? norm_weight[i] : 1) * (f_error[i] + 4 * e * std::fabs(f[i])) +
                           4 * e * std::fabs(k.affine ? norm_bias[i] : 0)) +
                   2 * e * (k.modulated ? std::fabs(move[i]) : 0);
      f[i] = f[i] * factor + add + (k.modulated ? move[i] : 0);
    }
  };
  auto product = [&](int64_t o) {
    Sum s = {bias[o], 0, std::fabs(bias[o])};
    for (int64_t i = 0; i < k.d; i++) {
      const double W = flushed(weight[o * row + i]);
      s.v += f[i] * W, s.size += std::fabs(f[i] * W), s.error += f_error[i] * std::fabs(W);
    }
    s.error += adds * e * s.size;
    return s;
  };
  run({1, 2, 3}, {&out, &low, &velocity}, kernel, [&] {
    const int64_t channels = P ? k.outputs / (P * P) : 0, wide = P ? k.W / P : 0;
    std::vector<Sum> sums(k.outputs);
    int64_t seen = 0;
    for (int64_t s = 0; s < k.n; s++)
      for (int64_t t = 0; t < k.T; t++) {
        features(s, t);
        for (int64_t o = 0; o < k.outputs; o++) sums[o] = product(o);
        if (k.guided) features(k.n + s, t);
        for (int64_t o = 0; o < k.outputs; o++) {
          Sum v = sums[o];
          if (k.guided) {
            const Sum u = product(o);
            v = {u.v + w * (v.v - u.v), u.error + w * (v.error + u.error), u.size + w * (v.size + u.size)};
          }
          int64_t i = (s * k.T + t) * k.outputs + o;
          if (P) {
            const bool first = k.outputs % 2 == 1;  // channels first
            const int64_t c = first ? o / (P * P) : o % channels, pq = first ? o % (P * P) : o / channels;
            if (c >= k.C) continue;
            i = ((s * k.C + c) * k.H + t / wide * P + pq / P) * k.W + t % wide * P + pq % P;
          }
          double truth = x_scale * x[i] + h * v.v, size = std::fabs(x_scale * x[i]) + h * v.size;
          for (int j = 0; j < k.terms; j++) {
            const double term = b[j] * (*history[j])[i];
            truth += term, size += std::fabs(term);
          }
          near("out", i, out[i], truth, h * v.error + (k.terms + 4) * e * size);
          const double off = v.error + 2 * e * v.size;
          if (velocity.n) near("velocity", i, velocity[i], v.v, off + 2 * half_ulp(std::fabs(v.v) + off, z_type));
          seen++;
        }
      }
    if (seen != elements) fail("seen", 0, double(seen), double(elements));
    is_rounded(low, out);
  });
}

}  // namespace

TEST(linear_euler) {
  for (auto [x_type, z_type] : kStates)
    for (Dtype weight_type : {z_type, x_type}) {
      if (weight_type == x_type && z_type == x_type && x_type == f64) continue;
      int i = 0;
      for (int64_t d : {1, 2, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 130})
        for (int64_t outputs : {1, 2, 3, 5, 6, 7, 13, 24}) {
          const int64_t n = 1 + i % 3, T = i % 5 + 1;
          const Dtype low_type = i % 3 == 0 ? f32 : i % 3 == 1 ? bf16 : f16;
          linear_euler_case(x_type, z_type, weight_type,
                            {n, T, d, outputs, 0, 0, 0, 0, i % 2 == 0, i % 4 == 0, i % 3 == 0, i % 5 == 0, i % 3,
                             i % 7 % 3, low_type});
          i++;
        }
      for (int64_t P : {1, 2, 3})
        for (int64_t C : {1, 3})
          for (int64_t more : {0, 1, 2})
            for (int64_t d : {5, 48, 67}) {
              const int64_t H = 2 * P, W = (i % 4 * 20 + 3) * P;
              linear_euler_case(x_type, z_type, weight_type,
                                {2, H * W / P / P, d, (C + more) * P * P, P, C, H, W, i % 3 > 0, i % 2 == 0, i % 4 > 0,
                                 i % 3 == 0, i % 3, i % 5 % 3, i % 2 ? f32 : f16});
              i++;
            }
    }
  int i = 0;
  for (Dtype weight_type : {bf16, f32}) {  // plain heads, of products in pairs: edges of tiles and chunks, subnormals
    for (int64_t d : {1, 2, 31, 32, 33, 63, 64, 95, 130, 1537, 3104})
      for (int64_t outputs = 1; outputs <= 13; outputs++, i++) {
        const bool guided = i % 3 == 0, subnormal = i % 2 == 0;
        linear_euler_case(f32, bf16, weight_type,
                          {i % 4 ? 2 : 1, i % 8 ? i % 7 + 1 : 1, d, outputs, 0, 0, 0, 0, false, false, false, guided,
                           i % 3, i % 5 % 3, i % 2 ? bf16 : f32, subnormal});
      }
    for (int64_t P : {1, 2, 3})
      for (int64_t more : {0, 1})
        for (int64_t d : {32, 67}) {
          const int64_t H = 2 * P, W = (i % 2 * 40 + 3) * P;
          linear_euler_case(f32, bf16, weight_type,
                            {2, H * W / P / P, d, (3 + more) * P * P, P, 3, H, W, false, false, false, i++ % 3 == 0,
                             i % 3, i % 5 % 3, f16});
        }
  }
  for (auto [x_type, z_type] : kStates) {  // several tiles for each thread; a weight that threads convert together
    linear_euler_case(x_type, z_type, z_type, {4, 33, 700, 9, 0, 0, 0, 0, true, false, true, true, 1, 2, bf16});
    linear_euler_case(x_type, z_type, z_type, {7, 1, 900, 600, 0, 0, 0, 0, true, true, true, false, 0, 1, f16});
    linear_euler_case(x_type, z_type, z_type, {3, 70, 800, 30, 0, 0, 0, 0, false, false, false, true, 1, 1, bf16});
    linear_euler_case(x_type, z_type, z_type, {0, 5, 16, 8, 0, 0, 0, 0, true, false, false, true, 1, 0, bf16});
  }
}

#include "common/test.h"

#include <array>
#include <functional>
#include <memory>

#include "mlp_sample/mlp_sample.h"

namespace {

// Networks in memory that ends where the kernel was told that it ends
double activation(fk::Activation a, double x, double alpha) {
  using A = fk::Activation;
  switch (a) {
    case A::relu: return x > 0 ? x : 0;
    case A::leaky_relu: return x > 0 ? x : alpha * x;
    case A::silu: return x / (1 + std::exp(-x));
    case A::gelu: return x * std::erfc(-x * std::sqrt(0.5)) / 2;
    case A::gelu_tanh: return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case A::elu: return x > 0 ? x : alpha * std::expm1(x);
    case A::tanh: return std::tanh(x);
    case A::sigmoid: return 1 / (1 + std::exp(-x));
    case A::mish: return x * std::tanh(std::log1p(std::exp(x)));
    case A::softplus: return std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x)));
    case A::at_least: return std::fmax(x, alpha);
    case A::at_most: return std::fmin(x, alpha);
    default: return x;
  }
}
constexpr double kSlope = 1.13;  // of every activation, at most

struct Network {
  Network(int64_t n, int64_t D, int64_t steps, bool guided, bool low)
      : n(n), D(D), steps(steps), guided(guided), low(low), row(up(D)) {}
  static int64_t up(int64_t v) { return (v + 15) / 16 * 16; }

  // Room for a value of some columns, and what is read past them when a layer starts at any of them
  int64_t value(int64_t width) {
    const int64_t at = row;
    row += up(width + 15);
    return at;
  }
  // rows: 0 none, 1 one for all, 2 one for each step, 3 for each sample, 4 for each of both
  int64_t table(int64_t width, int rows, double around) {
    if (!rows) return -1;
    const int64_t S = rows == 2 || rows == 4 ? steps : 1, N = rows > 2 ? n : 1, pitch = up(width);
    for (int u = 0; u < 1 + guided; u++) {
      memory.push_back(std::make_unique<Tensor>(f32, S * N * pitch, width % 3 != 0));
      Tensor& t = *memory.back();
      for (int64_t i = 0; i < t.n; i++) t.set(i, i % pitch < width ? around + uniform() / 2 - 0.25 : NAN);
      tables[u].push_back({t.as<float>(), S > 1 ? N * pitch : 0, N > 1 ? pitch : 0});
    }
    return int64_t(tables[0].size()) - 1;
  }
  void add(fk::MlpMap map, int64_t in, int64_t in_width, int64_t out, int64_t width, fk::Activation a,
           std::array<int, 3> rows, fk::MlpCombine combine = fk::MlpCombine::none, int64_t other = 0) {
    std::vector<double> w;
    void* packed = nullptr;
    if (map == fk::MlpMap::linear) {
      Tensor weight(f32, width * in_width, 1);
      weight.random(-2, -1);
      for (int64_t i = 0; i < weight.n; i++) {
        weight.set(i, weight[i] / std::sqrt(double(in_width)));
        w.push_back(low ? decode(encode(float(weight[i]), bf16), bf16) : weight[i]);
      }
      const fk::MlpPackArgs args = {weight.as<float>(), width, in_width, low ? bf16 : f32, nullptr};
      const int64_t bytes = FK_SELECT_BF16_AMX(mlp_pack)(args);
      memory.push_back(std::make_unique<Tensor>(bf16, bytes / 2));
      packed = memory.back()->as();
      const int64_t again =
          FK_SELECT_BF16_AMX(mlp_pack)({weight.as<float>(), width, in_width, low ? bf16 : f32, packed});
      if (again != bytes) fail("bytes", 0, double(again), double(bytes));
    }
    const int64_t scale = table(width, rows[0], 1), shift = table(width, rows[1], 0), each = table(width, rows[2], 0);
    layers.push_back({map, in, in_width, out, width, packed, 1e-3, scale, shift, each, a, 0.4, 1.1, combine, other});
    weights.push_back(w);
  }

  // One layer on a row of doubles, and on the bounds of their errors: each sum errs by as many half-ulps of its terms'
  // sizes as it has terms, at most. The mean and the root of a layer norm are sums as well.
  void run(size_t l, const std::vector<fk::MlpTable>& given, int64_t s, int64_t i, std::vector<double>& x,
           std::vector<double>& e) const {
    const fk::MlpLayer& a = layers[l];
    const double u = eps(f32) / 2;
    std::vector<double> y(a.out_width), f(a.out_width);
    double mean = 0, square = 0, mean_off = 0, size = 0;
    if (a.map >= fk::MlpMap::layer_norm) {
      const double W = double(a.in_width);
      const bool centred = a.map == fk::MlpMap::layer_norm;
      for (int64_t k = 0; centred && k < a.in_width; k++) {
        mean += x[a.in + k] / W, size += std::fabs(x[a.in + k]) / W, mean_off += e[a.in + k] / W;
      }
      mean_off += W * u * size;
      for (int64_t k = 0; k < a.in_width; k++) square += (x[a.in + k] - mean) * (x[a.in + k] - mean) / W;
    }
    double off_norm = 0;
    for (int64_t k = 0; k < a.in_width; k++) off_norm = std::max(off_norm, e[a.in + k]);
    for (int64_t c = 0; c < a.out_width; c++) {
      double v = x[a.in + c % a.in_width], o = e[a.in + c % a.in_width];
      if (a.map == fk::MlpMap::linear) {
        v = o = 0;
        double terms = 0;
        for (int64_t k = 0; k < a.in_width; k++) {
          const double w = weights[l][c * a.in_width + k];
          double in = x[a.in + k], off = e[a.in + k];
          if (low) {  // nearest, whichever side of a tie; the matrix unit takes subnormal inputs for zero
            off += (std::fabs(in) + off) * eps(bf16) / 2 + 0x1p-126;
          }
          v += w * in, o += std::fabs(w) * off, terms += std::fabs(w * in);
        }
        o += double(a.in_width + 2) * u * terms + 0x1p-120;
      } else if (a.map >= fk::MlpMap::layer_norm) {
        const double root = std::sqrt(square + a.eps), d = v - mean;
        // the root's own relative error: that of the sum of squares, twice what the differences may be off by
        const double relative = double(a.in_width + 8) * u + (off_norm + mean_off) / root;
        o = (o + mean_off + 2 * u * std::fabs(d)) / root + std::fabs(d) / root * relative;
        v = d / root;
      }
      auto at = [&](int64_t t) {
        return t < 0 ? 0.0 : double(given[t].data[s * given[t].step_stride + i * given[t].sample_stride + c]);
      };
      if (a.scale >= 0) v *= at(a.scale), o = o * std::fabs(at(a.scale)) + u * std::fabs(v);
      v += at(a.shift) + at(a.shift_each);
      o += 2 * u * (std::fabs(v) + std::fabs(at(a.shift)) + std::fabs(at(a.shift_each)));
      const double z = activation(a.activation, v, a.alpha) * a.gain;
      o = a.gain * kSlope * o + 16 * u * (std::fabs(z) + 0.1 * std::fabs(v)) + 0x1p-120;
      const double other = x[a.other + c], other_off = e[a.other + c];
      if (a.combine == fk::MlpCombine::none) y[c] = z, f[c] = o;
      if (a.combine == fk::MlpCombine::add) y[c] = other + z, f[c] = other_off + o + u * std::fabs(y[c]);
      if (a.combine == fk::MlpCombine::multiply)
        y[c] = other * z, f[c] = other_off * std::fabs(z) + o * (std::fabs(other) + other_off) + u * std::fabs(y[c]);
      if (a.combine == fk::MlpCombine::maximum) y[c] = std::fmax(other, z), f[c] = std::fmax(other_off, o);
      if (a.combine == fk::MlpCombine::minimum) y[c] = std::fmin(other, z), f[c] = std::fmax(other_off, o);
    }
    for (int64_t c = 0; c < a.out_width; c++) x[a.out + c] = y[c], e[a.out + c] = f[c];
  }

  // Updates that add any of the velocities to either state, each kept in a place of its own while another wants it
  void solve(bool scaled) {
    multistep = true;
    const double kScales[] = {1, -0.7, 0, 0.6};
    for (int64_t s = 0; s < steps; s++) {
      updates.push_back({int64_t(uniform() < 0.5), 0, s + 1 < steps ? s : -1});
      if (scaled) scales.push_back(kScales[s % 4]);
      for (int64_t l = 0; l <= s; l++)
        if (l == s || uniform() < 0.7) terms.push_back({l == s ? -1 : l, 0.4 * uniform() - 0.2}), updates[s].terms++;
    }
  }

  void check(int shift, bool in_place, bool kept) {
    const int64_t velocity = layers.back().out;
    Tensor x(f32, n * D, shift), out(f32, n * D, shift), h(f64, steps, shift);
    Tensor states(f32, kept ? (steps + 1) * n * D : 0, shift), v(f32, kept ? steps * n * D : 0, shift);
    x.random(-2, 0);
    for (int64_t s = 0; s < steps; s++) h.set(s, 0.2 + 0.1 * uniform());
    const double w = guided ? 1.5 : 1;
    auto kernel = [&](int threads) {
      if (in_place) out.copy(x);
      const fk::MlpPrepared prepared = {D,
                                        steps,
                                        multistep ? nullptr : h.as<double>(),
                                        layers.data(),
                                        int64_t(layers.size()),
                                        row,
                                        velocity,
                                        tables[0].data(),
                                        guided ? tables[1].data() : nullptr,
                                        w,
                                        low,
                                        multistep ? updates.data() : nullptr,
                                        multistep ? terms.data() : nullptr,
                                        multistep ? steps - 1 : 0,
                                        scales.empty() ? nullptr : scales.data()};
      const int64_t bad =
          FK_SELECT_BF16_AMX(mlp_sample)({prepared, in_place ? out.as<float>() : x.as<float>(), out.as<float>(), n,
                                          states.as<float>(), v.as<float>(), threads});
      if (bad != -1) fail("returned", 0, double(bad), -1);
    };
    run_all({&out, &states, &v}, kernel, [&] {
      for (int64_t i = 0; i < n; i++) {
        std::vector<double> values(row + 16), off(row + 16);
        for (int64_t c = 0; c < D; c++) values[c] = x[i * D + c];
        auto same = [&](const char* what, const Tensor& t, int64_t step, const double* a, const double* e) {
          for (int64_t c = 0; t.n && c < D; c++)
            near(what, (step * n + i) * D + c, t[(step * n + i) * D + c], a[c], 2 * e[c] + 0x1p-140);
        };
        same("states", states, 0, values.data(), off.data());
        const std::vector<double> start(values.begin(), values.begin() + D);
        std::vector<std::vector<double>> all, all_off;
        const fk::MlpTerm* term = terms.data();
        for (int64_t s = 0; s < steps; s++) {
          std::vector<double> base(D), base_off(D);
          for (int pass = guided ? 1 : 0; pass >= 0; pass--) {
            for (size_t l = 0; l < layers.size(); l++) run(l, tables[pass], s, i, values, off);
            for (int64_t c = 0; pass && c < D; c++) base[c] = values[velocity + c], base_off[c] = off[velocity + c];
          }
          std::vector<double> vel(D), vel_off(D);
          for (int64_t c = 0; c < D; c++) {
            const double u = eps(f32) / 2, now = values[velocity + c];
            vel[c] = guided ? base[c] + w * (now - base[c]) : now, vel_off[c] = off[velocity + c];
            if (guided) {
              vel_off[c] = (w + 1) * base_off[c] + w * off[velocity + c];
              vel_off[c] += 3 * u * (std::fabs(base[c]) + w * std::fabs(now - base[c]));
            }
            if (multistep) continue;
            values[c] += h[s] * vel[c];
            off[c] += h[s] * vel_off[c] + 2 * u * (std::fabs(values[c]) + std::fabs(h[s] * vel[c]));
          }
          if (multistep) {
            all.push_back(vel), all_off.push_back(vel_off);
            for (int64_t c = 0; c < D; c++) {
              const double u = eps(f32) / 2, a = scales.empty() ? 1 : scales[s];
              if (updates[s].from_start) values[c] = start[c], off[c] = 0;
              values[c] *= a;
              off[c] = std::fabs(a) * off[c] + (a == 1 ? 0 : 2 * u * std::fabs(values[c]));
            }
            for (int64_t k = 0; k < updates[s].terms; k++, term++) {
              const int64_t l = term->place < 0 ? s : term->place;
              for (int64_t c = 0; c < D; c++) {
                const double u = eps(f32) / 2, b = term->factor;
                values[c] += b * all[l][c];
                off[c] += std::fabs(b) * all_off[l][c] + 2 * u * (std::fabs(values[c]) + std::fabs(b * all[l][c]));
              }
            }
          }
          same("velocities", v, s, vel.data(), vel_off.data());
          same("states", states, s + 1, values.data(), off.data());
        }
        same("out", out, 0, values.data(), off.data());
      }
    });
  }
  static void run_all(const Outputs& outputs, const std::function<void(int)>& kernel,
                      const std::function<void()>& check) {
    ::run({1, 2, 3}, outputs, kernel, check);
  }

  const int64_t n, D, steps;
  const bool guided, low;
  bool multistep = false;
  int64_t row;
  std::vector<fk::MlpUpdate> updates;
  std::vector<fk::MlpTerm> terms;
  std::vector<double> scales;
  std::vector<fk::MlpLayer> layers;
  std::vector<std::vector<double>> weights;
  std::vector<fk::MlpTable> tables[2];
  std::vector<std::unique_ptr<Tensor>> memory;
};

}  // namespace

TEST(mlp_sample) {
  using fk::Activation;
  using fk::MlpCombine;
  using fk::MlpMap;
  const auto plain = Activation::none;
  const int64_t kDims[] = {1, 2, 5, 16, 17, 33};
  int variant = 0;
  for (bool low : {false, true})
    for (int64_t n : {0, 1, 2, 3, 4, 6, 7, 13, 16, 17, 33, 49, 97})
      for (int64_t width : {1, 3, 15, 16, 17, 33, 64, 65, 100, 130}) {
        if (n > 13 && width != 3 && width != 17 && width != 65) continue;
        if (kRacesOnly && n < 7 && width % 16 < 2) continue;
        variant++;
        const int64_t D = kDims[variant % 6], steps = 1 + variant % 2;
        const bool guided = variant % 3 == 0;
        CASE("mlp_sample n %ld D %ld width %ld steps %ld guided %d low %d", long(n), long(D), long(width), long(steps),
             guided, low);
        Network net(n, D, steps, guided, low);
        const auto act = Activation(1 + variant % 12);
        const int64_t first = net.value(width), cat = net.value(width + 7), normed = net.value(width + 7);
        const int64_t gate = net.value(width), sum = net.value(width), v = net.value(D);
        net.add(MlpMap::linear, 0, D, first, width, act, {0, 2, variant % 2 ? 3 : 0});
        net.add(MlpMap::linear, first, width, cat, width, Activation::silu, {variant % 5, 1, 0});
        net.add(MlpMap::linear, first + width / 2, width - width / 2, cat + width, 7, plain, {0, 0, 0});
        const auto norm = variant % 4 < 2 ? MlpMap::layer_norm : MlpMap::rms_norm;
        const MlpCombine combines[] = {MlpCombine::add, MlpCombine::maximum, MlpCombine::add, MlpCombine::minimum};
        net.add(norm, cat, width + 7, normed, width + 7, plain, {2, variant % 5, 0});
        net.add(MlpMap::identity, normed + 5, width, gate, width, Activation::sigmoid, {0, 4, 0}, MlpCombine::multiply,
                first);
        net.add(MlpMap::linear, gate, width, sum, width, act, {0, 3, 1}, combines[variant % 4], cat + 1);
        net.add(MlpMap::linear, sum, width, v, D, plain, {0, 2, 0});
        net.check(variant % 2, variant % 5 == 0, variant % 4 == 1);
      }
  for (bool low : {false, true})
    for (int64_t n : {1, 7, 33, 97})
      for (int64_t D : {1, 16, 33}) {
        CASE("mlp_sample solver n %ld D %ld low %d", long(n), long(D), low);
        Network net(n, D, 5, n == 7 || D == 33, low);
        const int64_t first = net.value(40), v = net.value(D);
        net.add(MlpMap::linear, 0, D, first, 40, Activation::silu, {0, 2, 3});
        net.add(MlpMap::linear, first, 40, v, D, plain, {0, 2, 0});
        net.solve(n != 7);
        net.check(D != 16, n == 33, n != 97);
      }
  for (bool low : {false, true})  // enough work for threads to take tiles
    for (int64_t n : {20, 97, 131}) {
      CASE("mlp_sample tiles n %ld low %d", long(n), low);
      Network net(n, 33, 2, true, low);
      const int64_t first = net.value(260), second = net.value(130), v = net.value(33);
      net.add(MlpMap::linear, 0, 33, first, 260, Activation::silu, {0, 2, 3});
      net.add(MlpMap::linear, first, 260, second, 130, Activation::tanh, {4, 1, 0});
      net.add(MlpMap::linear, second, 130, v, 33, plain, {0, 0, 4});
      net.check(1, n == 97, n != 97);
    }
  for (bool low : {false, true})  // weights of more than 1 MiB, which three threads share for a few samples
    for (int64_t n : {1, 3, 5, 16}) {
      const int64_t steps = 1 + 24 / n;
      CASE("mlp_sample large weights n %ld low %d", long(n), low);
      Network net(n, 9, steps, false, low);
      const int64_t first = net.value(1005), second = net.value(517 + 11), v = net.value(9);
      net.add(MlpMap::linear, 0, 9, first, 1005, Activation::silu, {0, 2, 0});
      net.add(MlpMap::linear, 0, 9, second, 11, Activation::relu, {0, 2, 0});
      net.add(MlpMap::linear, first, 1005, second + 11, 517, Activation::silu, {0, 2, 0}, MlpCombine::add, first + 488);
      net.add(MlpMap::linear, second, 528, v, 9, plain, {0, 0, 0});
      net.check(1, false, true);
    }

  for (bool low : {false, true})  // columns that threads share: a last layer that reads the state, or adds to it
    for (int64_t n : {1, 6}) {
      CASE("mlp_sample last layer on the state n %ld low %d", long(n), low);
      Network alone(n, 290, 3, true, low);
      alone.add(MlpMap::linear, 0, 290, alone.value(290), 290, Activation::tanh, {0, 2, 0});
      alone.check(1, false, true);
      Network sum(n, 290, 3, n == 6, low);
      const int64_t first = sum.value(290), normed = sum.value(290), v = sum.value(290);
      sum.add(MlpMap::linear, 0, 290, first, 290, Activation::silu, {0, 2, 0});
      sum.add(MlpMap::layer_norm, first, 290, normed, 290, plain, {2, 0, 0});
      sum.add(MlpMap::linear, normed, 290, v, 290, plain, {0, 2, 0}, MlpCombine::add, 0);
      sum.check(1, n == 6, true);
    }

  CASE("mlp_sample not finite");
  Network net(97, 5, 2, false, false);
  const int64_t v = net.value(5);
  net.add(MlpMap::linear, 0, 5, v, 5, Activation::tanh, {0, 1, 0});
  Tensor x(f32, 97 * 5), h(f64, 2);
  x.fill(0), h.fill(0);
  for (int64_t bad = 96; bad >= 0; bad -= 8) {
    x.set(bad * 5 + bad % 5, bad % 16 ? NAN : kInf);
    Tensor out(f32, 97 * 5);
    const fk::MlpPrepared prepared = {
        5, 2, h.as<double>(), net.layers.data(), 1, net.row, v, net.tables[0].data(), nullptr,
        1, 0, nullptr,        nullptr,           0, nullptr};
    const int64_t got =
        FK_SELECT_BF16_AMX(mlp_sample)({prepared, x.as<float>(), out.as<float>(), 97, nullptr, nullptr, 3});
    if (got != bad) fail("returned", 0, double(got), double(bad));
  }
}

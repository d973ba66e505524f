// Every CPU kernel against a plain loop in double, for a build with sanitizers (CMakeLists.txt: FLOWKERNELS_SANITIZE).
// Sizes around vectors and blocks, all types, misaligned and absent tensors, 1 to 3 threads, stores past the caches.
// Allowed errors are bounds on the kernel's roundings, with eps = 2 half-ulps: the plain loop may err by as much.
#include <stdio.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "bellman/bellman.h"
#include "bellman_pairs/bellman_pairs.h"
#include "common/memory.h"
#include "common/threads.h"
#include "cost_from_gram/cost_from_gram.h"
#include "euler_step/euler_step.h"
#include "linear_euler/linear_euler.h"
#include "linear_update/linear_update.h"
#include "mlp_sample/mlp_sample.h"
#include "segment_points/segment_points.h"
#include "straighten_loss/straighten_loss.h"
#include "velocity_gram/velocity_gram.h"

// What the sanitizers ask of a program. Fresh memory is NaN, so that a sum that starts from it shows.
#define HOOK extern "C" __attribute__((visibility("default")))
HOOK const char* __asan_default_options() {
  return "malloc_fill_byte=255:max_malloc_fill_size=1000000000";
}
HOOK const char* __tsan_default_options() {
  return "halt_on_error=1";
}
HOOK void __ubsan_on_report();
extern "C" {  // null without the sanitizer
__attribute__((weak)) void __sanitizer_set_death_callback(void (*)());
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __tsan_init();
}

namespace {

using fk::Dtype;
constexpr Dtype f32 = Dtype::f32, f64 = Dtype::f64, bf16 = Dtype::bf16, f16 = Dtype::f16;
constexpr double kInf = INFINITY, kEps64 = 0x1p-52;
constexpr Dtype kStates[][2] = {{f32, f32}, {f32, bf16}, {f32, f16}, {f64, f64}};  // of a state and of a velocity
const std::vector<int64_t> kSizes = {0,  1,  2,  3,  4,  5,  7,  8,  9,   15,  16,
                                     17, 31, 32, 33, 63, 64, 65, 67, 127, 129, 2 * 16384 + 3};

char g_case[160];  // what runs now
int g_cases = 0;
double g_worst = 0;  // error / allowed
// ThreadSanitizer: one run, on 3 threads; no plain loops, and no stores that are not instrumented
const bool kRacesOnly = __tsan_init != nullptr;

#define CASE(...) (g_cases++, snprintf(g_case, sizeof g_case, __VA_ARGS__))

[[noreturn]] void fail(const char* what, int64_t i, double got, double expected, double allowed = 0) {
  printf("FAILED %s: %s[%ld] is %.17g, expected %.17g +- %.3g\n", g_case, what, long(i), got, expected, allowed);
  fflush(stdout);
  _Exit(1);
}
void near(const char* what, int64_t i, double got, double truth, double allowed) {
  if (got == truth || (std::isnan(got) && std::isnan(truth))) return;
  if (!(std::fabs(got - truth) <= allowed) || !std::isfinite(allowed)) fail(what, i, got, truth, allowed);
  g_worst = std::max(g_worst, std::fabs(got - truth) / allowed);
}

uint64_t random_bits() {
  static uint64_t s = 88172645463325252u;
  s ^= s << 13, s ^= s >> 7, s ^= s << 17;
  return s >> 8;
}
double uniform() {
  return double(random_bits() % 0x1000000) * 0x1p-24;
}

// ---- types ----
int size_of(Dtype t) {
  return t == f64 ? 8 : t == f32 ? 4 : 2;
}
double eps(Dtype t) {
  return t == f64 ? kEps64 : t == f32 ? 0x1p-23 : t == bf16 ? 0x1p-7 : 0x1p-10;
}
int lanes(Dtype t) {
  return (16 << std::min(int(fk::isa()), 2)) / size_of(t);
}
double half_ulp(double v, Dtype t) {
  return std::max(std::fabs(v) * eps(t) / 2, t == f16 ? 0x1p-25 : t == bf16 ? 0x1p-134 : 0x1p-150);
}
double power_of_two(int e) {
  const uint64_t bits = uint64_t(e + 1023) << 52;
  double v;
  std::memcpy(&v, &bits, 8);
  return v;
}
uint16_t encode(float v, Dtype t) {  // to nearest, ties to even
  const int digits = t == bf16 ? 7 : 10, least = t == bf16 ? -126 : -14, infinity = 0x8000 - (1 << digits);
  const int sign = std::signbit(v) ? 0x8000 : 0;
  if (!std::isfinite(v)) return uint16_t(std::isnan(v) ? 0x7fff : sign | infinity);
  uint32_t u;
  std::memcpy(&u, &v, 4);
  const int e = std::max(int(u >> 23 & 255) - 127, least);
  const int size = int(std::nearbyint(std::fabs(v) * power_of_two(digits - e))) + ((e - least) << digits);
  return uint16_t(sign | std::min(size, infinity));
}
double decode(uint16_t h, Dtype t) {
  const uint32_t u = t == bf16 ? uint32_t(h) << 16 : (h & 0x8000u) << 16 | (h & 0x7fffu) << 13;
  float v;
  std::memcpy(&v, &u, 4);
  if (t == f16 && (h & 0x7c00) == 0x7c00) return h & 0x3ff ? NAN : std::copysign(kInf, v);
  return t == bf16 ? v : v * 0x1p112;
}

// A tensor in memory of its own, `shift` elements past a multiple of 64 bytes. Around it 64 bytes that are poisoned to
// the sanitizer and hold a pattern: stores past the caches are not instrumented. Without elements its address is null.
class Tensor {
 public:
  Tensor(Dtype type, int64_t n, int shift = 0) : type(type), n(n), bytes_(n * size_of(type)) {
    const int64_t skip = kGuard + shift * size_of(type);
    raw_ = static_cast<unsigned char*>(std::aligned_alloc(64, size_t(skip + bytes_ + kGuard + 63) / 64 * 64));
    begin_ = raw_ + skip;
    std::memset(raw_, kPattern, size_t(skip)), std::memset(begin_ + bytes_, kPattern, kGuard);
    if (!__asan_poison_memory_region) return;
    __asan_poison_memory_region(raw_, kGuard);
    __asan_poison_memory_region(begin_ + bytes_, kGuard);
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(raw_, begin_ - raw_ + bytes_ + kGuard);
    for (const unsigned char* p = raw_; p < begin_ + bytes_ + kGuard; p == begin_ - 1 ? p += bytes_ + 1 : p++)
      if (*p != kPattern) fail("byte", p - begin_, *p, kPattern);
    std::free(raw_);
  }
  template <class T = void>
  T* as() const {
    return n ? reinterpret_cast<T*>(begin_) : nullptr;
  }
  double operator[](int64_t i) const {
    return type == f64 ? as<double>()[i] : type == f32 ? as<float>()[i] : decode(as<uint16_t>()[i], type);
  }
  void set(int64_t i, double v) {
    if (type == f64)
      as<double>()[i] = v;
    else if (type == f32)
      as<float>()[i] = float(v);
    else
      as<uint16_t>()[i] = encode(float(v), type);
  }
  void random(int low, int high) {  // +- [1, 2) * 2^[low, high]
    for (int64_t i = 0; i < n; i++) {
      const double v = (1 + uniform()) * power_of_two(low + int(random_bits() % uint64_t(high - low + 1)));
      set(i, random_bits() % 2 ? v : -v);
    }
  }
  void fill(int byte) { std::memset(begin_, byte, size_t(bytes_)); }
  void copy(const Tensor& t) { std::memcpy(begin_, t.begin_, size_t(bytes_)); }
  bool holds(const std::vector<unsigned char>& b) const { return std::equal(b.begin(), b.end(), begin_); }
  std::vector<unsigned char> content() const { return {begin_, begin_ + bytes_}; }

  const Dtype type;
  const int64_t n;

 private:
  static constexpr int kGuard = 64, kPattern = 0xa5;
  const int64_t bytes_;
  unsigned char *raw_, *begin_;
};
using Outputs = std::vector<Tensor*>;

// kernel(threads) into outputs full of 0xff (NaN) and again of 0x55: one check(), and the same bits every time
template <class Kernel, class Check>
void run(std::vector<int> threads, const Outputs& outputs, Kernel kernel, Check check) {
  std::vector<std::vector<unsigned char>> first;
  for (int t : threads)
    for (int byte : {0xff, 0x55}) {
      if (kRacesOnly && (t < 3 || byte == 0x55)) continue;
      for (Tensor* o : outputs) o->fill(byte);
      kernel(t);
      if (first.empty()) {
        if (!kRacesOnly) check();
        for (Tensor* o : outputs) first.push_back(o->content());
      }
      for (size_t i = 0; i < first.size(); i++)
        if (!outputs[i]->holds(first[i])) fail("another run, output", int64_t(i), t, threads[0]);
    }
}
// kernel() is to return `place` and leave the outputs alone
template <class Kernel>
void refused(const Outputs& outputs, int64_t place, Kernel kernel) {
  for (Tensor* o : outputs) o->fill(0x55);
  const int64_t got = kernel();
  if (got != place) fail("returned", 0, double(got), double(place));
  for (Tensor* o : outputs)
    if (!o->holds(std::vector<unsigned char>(o->content().size(), 0x55))) fail("written to", 0, 1, 0);
}
void is_rounded(const Tensor& low, const Tensor& out) {
  for (int64_t i = 0; i < low.n; i++) {
    const uint16_t got = low.as<uint16_t>()[i], expected = encode(float(out[i]), low.type);
    if (got != expected && !(std::isnan(low[i]) && std::isnan(out[i]))) fail("low", i, got, expected);
  }
}
// elements that three threads store past the caches
int64_t many(int size) {
  return 3 * (fk::level2_bytes() / 2 / size + 64) + 65;
}

// ---- euler_step and linear_update: layouts are aligned, misaligned, and misaligned in place ----
template <class Body>  // body(x, out, low, layout)
void updates(const char* name, Dtype x_type, Dtype v_type, Body body, std::vector<int64_t> sizes, bool past) {
  for (Dtype low_type : {f32, bf16, f16})  // f32: none
    for (int layout = 0; layout < 3; layout++) {
      if (past && !kRacesOnly && low_type == bf16 && layout == 0) sizes.push_back(many(size_of(x_type)));
      for (int64_t n : sizes) {
        CASE("%s x %d v %d low %d n %ld layout %d", name, int(x_type), int(v_type), int(low_type), long(n), layout);
        Tensor x(x_type, n, layout > 0), out(x_type, n, layout > 0), low(low_type, low_type == f32 ? 0 : n, layout > 0);
        x.random(-27, 17);  // subnormal in half precision, and beyond its range
        if (n > 2) x.set(1, NAN), x.set(n - 1, -kInf);
        body(x, out, low, layout);
      }
      if (sizes.back() == many(size_of(x_type))) sizes.pop_back();
    }
}

void euler_step() {
  for (auto [x_type, v_type] : kStates)
    for (bool guided : {false, true}) {
      auto body = [&, v_type = v_type](Tensor& x, Tensor& out, Tensor& low, int layout) {
        Tensor v(v_type, x.n, layout > 0), u(v_type, guided ? x.n : 0, layout > 0);
        v.random(-20, 5), u.random(-20, 5);
        const double h = 0.37, w = guided ? 3.5 : 1;
        auto kernel = [&](int threads) {
          if (layout == 2) out.copy(x);
          FK_SELECT(euler_step)
          ({layout == 2 ? out.as() : x.as(), v.as(), u.as(), out.as(), low.as(), x.type, v.type, low.type, x.n, h, w,
            threads});
        };
        run({1, 2, 3}, {&out, &low}, kernel, [&] {
          for (int64_t i = 0; i < x.n; i++) {
            const double base = guided ? u[i] : 0, truth = x[i] + h * (base + w * (v[i] - base));
            const double scale = std::fabs(x[i]) + h * (std::fabs(base) + w * (std::fabs(v[i]) + std::fabs(base)));
            near("out", i, out[i], truth, 5 * eps(x.type) * scale);
          }
          is_rounded(low, out);
        });
      };
      updates(guided ? "euler_step guided" : "euler_step", x_type, v_type, body, kSizes, guided);
    }
}

void linear_update() {
  for (auto [x_type, v_type] : kStates)
    for (int terms : {1, 3, 8, 600}) {  // 600: a part for each of a few lines
      auto body = [&, v_type = v_type](Tensor& x, Tensor& out, Tensor& low, int layout) {
        std::vector<std::unique_ptr<Tensor>> v;
        std::vector<const void*> addresses;
        Tensor b(f64, terms);
        b.random(-3, 0);
        for (int t = 0; t < terms; t++) {
          v.push_back(std::make_unique<Tensor>(v_type, x.n, layout > 0));
          v[t]->random(-20, 5);
          addresses.push_back(v[t]->as());
        }
        auto kernel = [&](int threads) {
          if (layout == 2) out.copy(x);
          FK_SELECT(linear_update)
          ({layout == 2 ? out.as() : x.as(), addresses.data(), b.as<double>(), terms, out.as(), low.as(), x.type,
            v_type, low.type, x.n, threads});
        };
        run({1, 2, 3}, {&out, &low}, kernel, [&] {
          for (int64_t i = 0; i < x.n; i++) {
            double truth = x[i], scale = std::fabs(x[i]);
            for (int t = 0; t < terms; t++) truth += b[t] * (*v[t])[i], scale += std::fabs(b[t] * (*v[t])[i]);
            near("out", i, out[i], truth, (terms + 2) * eps(x.type) * scale);
          }
          is_rounded(low, out);
        });
      };
      const std::vector<int64_t> few = {1, 65, 129};
      updates("linear_update", x_type, v_type, body, terms == 600 ? few : kSizes, terms == 3);
    }
}

// ---- linear_euler ----
struct HeadCase {
  int64_t n, T, d, outputs, patch, C, H, W;  // without patches n samples of T * outputs
  bool normed, affine, modulated, guided;
  int terms, layout;  // layout 1: misaligned, rows apart; 2: that, in place, the velocity over the last of the history
  Dtype low_type;
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
  const double h = 0.37, w = 3.5, eps_norm = 1e-3, e = eps(x_type);

  auto kernel = [&](int threads) {
    if (k.layout == 2) out.copy(x), velocity.copy(*history.back());
    FK_SELECT(linear_euler)
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
      threads});
  };
  // a lane sums d / lanes terms, then lanes add up
  const double adds = double(k.d) / lanes(x_type) + 12, d = double(k.d);
  struct Sum {
    double v, error, size;
  };
  std::vector<double> f(k.d), f_error(k.d);
  auto features = [&](int64_t s, int64_t t) {  // of one token, and what they may be off by
    double mean = 0, size = 0, square = 0, worst = 0;
    for (int64_t i = 0; i < k.d; i++)
      f[i] = z[s * sample + t * token + i], mean += f[i] / d, size += std::fabs(f[i]) / d;
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
      const double W = weight[o * row + i];
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
          double truth = x[i] + h * v.v, size = std::fabs(x[i]) + h * v.size;
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

void linear_euler() {
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
  for (auto [x_type, z_type] : kStates) {  // several tiles for each thread; a weight that threads convert together
    linear_euler_case(x_type, z_type, z_type, {4, 33, 700, 9, 0, 0, 0, 0, true, false, true, true, 1, 2, bf16});
    linear_euler_case(x_type, z_type, z_type, {7, 1, 900, 600, 0, 0, 0, 0, true, true, true, false, 0, 1, f16});
    linear_euler_case(x_type, z_type, z_type, {0, 5, 16, 8, 0, 0, 0, 0, true, false, false, true, 1, 0, bf16});
  }
}

// ---- segment_points and straighten_loss: [knots, samples, D] gathered by index ----
struct Places {
  Places(int64_t B, int shift) : interval(f64, B, shift), sample(f64, B, shift) {
    for (int64_t r = 0; r < B; r++) {
      i()[r] = r ? int64_t(random_bits()) % (knots - 1) : knots - 2;  // the bank's last row too
      s()[r] = r ? int64_t(random_bits()) % samples : samples - 1;
    }
  }
  int64_t* i() const { return interval.as<int64_t>(); }
  int64_t* s() const { return sample.as<int64_t>(); }
  int64_t row(int64_t r) const { return i()[r] * samples + s()[r]; }

  template <class Kernel>  // an index out of range at every place, and at all that follow
  void refuse(const Outputs& outputs, Kernel kernel) {
    const std::vector<int64_t> was[] = {{i(), i() + interval.n}, {s(), s() + sample.n}};
    const int64_t bad[][2] = {{0, -1}, {0, knots - 1}, {0, INT64_MIN}, {1, -1}, {1, samples}, {1, INT64_MAX}};
    for (const auto& [which, value] : bad) {
      int64_t* t = which ? s() : i();
      for (int64_t r = interval.n - 1; r >= 0; r--) t[r] = value, refused(outputs, r, kernel);
      std::copy(was[which].begin(), was[which].end(), t);
    }
  }
  static constexpr int64_t knots = 4, samples = 3;
  Tensor interval, sample;
};
struct Shape {
  int64_t B, D;
};
std::vector<Shape> shapes(int out_size, bool past, bool few_rows) {
  std::vector<Shape> all = {{0, 5}, {2, 16385}, {1, 33000}, {3, 16384}};
  for (int64_t D : kSizes)
    if (D < 200) all.push_back({1, D}), all.push_back({5, D});
  const Shape rows = {many(out_size) / (16384 + 64) + 1, 16384 + 64};
  if (past && !kRacesOnly) all.push_back(few_rows ? Shape{2, rows.B * rows.D / 64 * 32} : rows);
  return all;
}

void segment_points() {
  const Dtype types[][2] = {{f32, f32}, {f32, bf16}, {f32, f16}, {f64, f64}, {f64, bf16}, {f64, f16}};
  for (auto [x_type, out_type] : types)
    for (int shift : {0, 1})
      for (bool lerp : {false, true})
        for (auto [B, D] : shapes(size_of(out_type), !shift && lerp, false)) {
          CASE("segment_points bank %d out %d B %ld D %ld u %d shift %d", int(x_type), int(out_type), long(B), long(D),
               lerp, shift);
          Places at(B, shift);
          Tensor bank(x_type, at.knots * at.samples * D, shift), u(f64, lerp ? B : 0, shift),
              out(out_type, B * D, shift);
          bank.random(-26, 5);
          for (int64_t r = 0; r < u.n; r++) u.set(r, B == 1 || r > 1 ? uniform() : double(r));
          auto kernel = [&, B = B, D = D](int threads) {
            return FK_SELECT(segment_points)({bank.as(), at.i(), at.s(), u.as<double>(), out.as(), bank.type, out.type,
                                              at.knots, at.samples, B, D, threads});
          };
          run({1, 2, 3}, {&out}, kernel, [&, B = B, D = D] {
            for (int64_t r = 0; r < B; r++)
              for (int64_t d = 0; d < D; d++) {
                const int64_t i = at.row(r) * D + d;
                const double a = bank[i], b = bank[i + at.samples * D], p = lerp ? u[r] : 0, truth = a + p * (b - a);
                const double first = p ? 4 * eps(bank.type) * (std::fabs(a) + p * (std::fabs(a) + std::fabs(b))) : 0;
                const int64_t o = r * D + d;
                if (out.type == bank.type)
                  near("out", o, out[o], truth, first);
                else if (p == 0)
                  near("out", o, out[o], decode(encode(float(a), out.type), out.type), 0);
                else  // by way of float32
                  near("out", o, out[o], truth,
                       first + half_ulp(truth, f32) + half_ulp(std::fabs(truth) * 1.001 + first, out.type));
              }
          });
          if (B == 5 && D == 17) at.refuse({&out}, [&] { return kernel(2); });
        }
}

void straighten_loss() {
  for (auto [x_type, v_type] : kStates)
    for (int variant = 0; variant < 16; variant++) {
      const int shift = variant & 1, wanted = variant >> 1 & 1, weighted = variant >> 2 & 1, huber = variant >> 3;
      for (auto [B, D] : shapes(size_of(v_type), !shift && wanted && weighted, huber)) {
        CASE("straighten_loss bank %d v %d B %ld D %ld gradient %d weight %d huber %d shift %d", int(x_type),
             int(v_type), long(B), long(D), wanted, weighted, huber, shift);
        Places at(B, shift);
        const int64_t steps = at.knots - 1;
        Tensor bank(x_type, at.knots * at.samples * D, shift), v(v_type, B * D, shift), h(f64, steps, shift);
        Tensor weight(f64, weighted ? B : 0, shift), gradient(v_type, wanted ? B * D : 0, shift);
        Tensor loss(f64, 1, shift), per_sample(f64, B, shift), per_interval(f64, steps, shift);
        bank.random(-4, 0), v.random(-4, 3);
        for (int64_t i = 0; i < steps; i++) h.set(i, 0.1 + 0.2 * double(i));
        for (int64_t r = 0; r < weight.n; r++) weight.set(r, (0.5 + uniform()) * double(B * D));  // gradients near 1
        const double c = huber ? 0.7 : 0;
        const Outputs outputs = {&loss, &per_sample, &per_interval, &gradient};
        auto kernel = [&, B = B, D = D](int threads) {
          return FK_SELECT(straighten_loss)({v.as(), bank.as(), h.as<double>(), at.i(), at.s(), weight.as<double>(), c,
                                             v.type, bank.type, at.knots, at.samples, B, D, loss.as<double>(),
                                             per_sample.as<double>(), per_interval.as<double>(), gradient.as(),
                                             threads});
        };
        run({1, 2, 3}, outputs, kernel, [&, B = B, D = D] {
          const double e1 = eps(bank.type), adds = double(std::min<int64_t>(D, 1024)) / (4 * lanes(bank.type)) + 12;
          double total = 0, total_allowed = 0;
          std::vector<double> sum(steps), sum_allowed(steps), count(steps), e(D), off(D);
          for (int64_t r = 0; r < B; r++) {
            double square = 0, allowed = 0;
            for (int64_t d = 0; d < D; d++) {
              const int64_t i = at.row(r) * D + d;
              const double slope = (bank[i + at.samples * D] - bank[i]) / h[at.i()[r]], vd = v[r * D + d];
              e[d] = vd - slope, off[d] = 4 * e1 * (std::fabs(slope) + std::fabs(vd));
              square += e[d] * e[d], allowed += (2 * std::fabs(e[d]) + off[d]) * off[d];
            }
            allowed = (allowed + (adds * e1 + double(D + 8) * kEps64) * square) / double(D), square /= double(D);
            const double root = std::sqrt(square + c * c), each = huber ? root - c : square;
            if (huber) allowed = allowed / (2 * c) + 4 * kEps64 * (root + c);  // the root's slope is at most 1 / 2c
            near("per_sample", r, per_sample[r], each, allowed);
            const double w = weighted ? weight[r] : 1;
            total += w * each, total_allowed += w * (allowed + double(B + 4) * kEps64 * each);
            sum[at.i()[r]] += each, sum_allowed[at.i()[r]] += allowed + double(B + 4) * kEps64 * each;
            count[at.i()[r]]++;
            const double scale = w * (huber ? 1 / (each + c) : 2) / double(B) / double(D);
            for (int64_t d = 0; d < D && wanted; d++) {
              const double near_by = scale * (off[d] + std::fabs(e[d]) * (4 * e1 + (huber ? allowed / c : 0)));
              near("gradient", r * D + d, gradient[r * D + d], scale * e[d],
                   near_by + half_ulp(std::fabs(scale * e[d]) + near_by, v.type));
            }
          }
          near("loss", 0, loss[0], total / double(B), total_allowed / double(B));
          for (int64_t i = 0; i < steps; i++)  // 0 / 0 is NaN
            near("per_interval", i, per_interval[i], sum[i] / count[i], sum_allowed[i] / count[i]);
        });
        if (B == 5 && D == 17) at.refuse(outputs, [&] { return kernel(2); });
      }
    }
}

// ---- velocity_gram ----
void velocity_gram_case(Dtype x_type, Dtype v_type, int64_t K, int64_t M, bool states, int layout) {
  const int shift = layout > 0, gap = layout > 1 ? 3 : 0;  // elements between rows
  const int64_t R = states ? 2 * K - 1 : K - 1, v_stride = M + gap, x_stride = M + 2 * gap;
  if (states && M + gap == 0) return;  // no address would mean no states
  Tensor v(v_type, (K - 1) * v_stride + M, shift), x(x_type, states ? K * x_stride + M : 0, shift);
  Tensor times(f64, states ? K + 1 : 0, shift), gram(f64, R * R, shift);
  v.random(-3, 1), x.random(-3, 0);
  for (int64_t c = 0; c < v.n; c++)
    if (c % v_stride >= M) v.set(c, NAN);
  for (int64_t c = 0; c < x.n; c++)
    if (c % x_stride >= M) x.set(c, NAN);
  for (int64_t k = 0; k < times.n; k++) times.set(k, double(k + k * k) / 8);
  std::vector<double> rows(R * M);  // before the only rounding that they get, to the type that accumulates
  for (int64_t k = 0; k < K; k++)
    for (int64_t c = 0; c < M; c++) {
      auto secant = [&](int64_t i) {
        return (x[(i + 1) * x_stride + c] - x[i * x_stride + c]) / (times[i + 1] - times[i]);
      };
      auto row = [&](int64_t i) { return states ? secant(i) : v[i * v_stride + c]; };
      if (k) rows[(k - 1) * M + c] = row(k) - row(k - 1);
      if (states) rows[(K - 1 + k) * M + c] = secant(k) - v[k * v_stride + c];
    }
  // a lane adds min(M, 1024) / lanes products of two rounded rows, lanes add up in at most 8 steps, then doubles
  double adds = double(std::min<int64_t>(M, 1024)) / lanes(x_type) + 12;
  // the matrix unit: in one lane, three products each, of parts that lack the last 2^-16
  if (fk::isa() == fk::Isa::amx && K > 64 && M >= 4096) adds = 3 * 1024 + 2 * 0x1p-16 / eps(f32);
  for (int threads : {1, 2, 3}) {
    CASE("velocity_gram x %d v %d K %ld M %ld states %d layout %d threads %d", int(x_type), int(v_type), long(K),
         long(M), states, layout, threads);
    auto kernel = [&](int t) {
      FK_SELECT_AMX(velocity_gram)
      ({v.as(), v.type, K, M, v_stride, x.as(), x_stride, times.as<double>(), gram.as<double>(), t});
    };
    run({threads}, {&gram}, kernel, [&] {
      for (int64_t j = 0; j < R; j++)
        for (int64_t i = 0; i <= j; i++) {
          double truth = 0, scale = 0;
          const double *a = rows.data() + i * M, *b = rows.data() + j * M;
          for (int64_t c = 0; c < M; c++) truth += a[c] * b[c], scale += std::fabs(a[c] * b[c]);
          near("gram", j * R + i, gram[j * R + i], truth, (adds * eps(x_type) + double(M + 8) * kEps64) * scale);
          near("gram", i * R + j, gram[i * R + j], gram[j * R + i], 0);
        }
    });
  }
}

void velocity_gram() {
  for (auto [x_type, v_type] : kStates)
    for (bool states : {false, true}) {
      for (int64_t K : {1, 2, 3, 4, 5, 7, 8, 9, 14})
        for (int64_t M : kSizes)
          if (M < 200) velocity_gram_case(x_type, v_type, K, M, states, int((K + M) % 3));
      for (int64_t M : {1023, 1024, 1025, 2051, 8000})
        for (int layout : {0, 1, 2}) velocity_gram_case(x_type, v_type, 6, M, states, layout);
    }
  for (Dtype v_type : {f32, bf16, f16})  // one and two bands of 16 rows past a pair of them, for the matrix unit
    for (int64_t K : {66, 98}) velocity_gram_case(f32, v_type, K, 4099, false, 2);
  velocity_gram_case(f32, f32, 400, 1100, false, 0);  // chunks shorter than 1,024 columns, where L2 is 2 MiB or less
}

// ---- cost_from_gram: against the quadratic form, of a matrix that need not be one of increments ----
void cost_from_gram() {
  for (int64_t K : {1, 2, 3, 4, 8, 9, 10, 17, 33})
    for (bool states : {false, true}) {
      CASE("cost_from_gram K %ld states %d", long(K), states);
      const int64_t R = states ? 2 * K - 1 : K - 1, n = K + 1;
      Tensor gram(f64, R * R, 1), t(f64, n, 1), cost(f64, n * n, 1);
      gram.random(-3, 3);
      for (int64_t i = 0; i < R; i++) {
        for (int64_t j = 0; j < i; j++) gram.set(i * R + j, gram[j * R + i]);
        gram.set(i * R + i, 1e3 * double(K) + gram[i * R + i]);  // positive definite: no cost is cut off at zero
      }
      for (int64_t k = 0; k < n; k++) t.set(k, double(k + k * k) / 64);
      auto kernel = [&](int) {
        FK_SELECT(cost_from_gram)({gram.as<double>(), t.as<double>(), K, states, cost.as<double>()});
      };
      run({1}, {&cost}, kernel, [&] {
        for (int64_t j = 0; j < n; j++)
          for (int64_t k = 0; k < n; k++) {
            std::vector<double> w(R + 1);
            for (int64_t m = j + 1; m < k; m++) w[m - 1] = t[k] - t[m];
            if (states && j < K) w[K - 1 + j] = t[k] - t[j];
            double truth = 0, scale = 0;
            for (int64_t a = 0; a < R; a++)
              for (int64_t b = 0; b < R; b++) {
                const double term = w[a] * w[b] * gram[a * R + b];
                truth += term, scale += std::fabs(term);
              }
            near("cost", j * n + k, cost[j * n + k], k > j ? truth : kInf, 8 * double(n) * kEps64 * scale);
          }
      });
    }
}

// ---- bellman: the same sums and the same choice of a minimum, so no error is allowed ----
void bellman() {
  for (int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 18, 33, 65, 101})
    for (int64_t steps : {int64_t(0), int64_t(1), n / 2, n - 1})
      for (int kind = 0; kind < 6; kind++) {  // plain, ties, forbidden steps; each aligned and misaligned
        const double carry = kind < 2 ? 1 / 0.9 : 1;
        CASE("bellman n %ld steps %ld kind %d", long(n), long(steps), kind);
        const int shift = kind % 2;
        Tensor cost(f64, n * n, shift), value(f64, (steps + 1) * n, shift), parent(f64, (steps + 1) * n, shift);
        for (int64_t i = 0; i < n * n; i++) {
          const double c = uniform();
          cost.set(i, i % n <= i / n ? NAN : kind < 2 ? c : kind < 4 ? std::floor(4 * c) : c < 0.7 ? kInf : c);
        }
        auto kernel = [&](int = 0) {
          return FK_SELECT(bellman)({cost.as<double>(), n, steps, carry, value.as<double>(), parent.as<int64_t>()});
        };
        run({1}, {&value, &parent}, kernel, [&] {
          for (int64_t s = 0; s <= steps; s++)
            for (int64_t k = 0; k < n; k++) {
              double best = s + k == 0 ? 0 : kInf;
              int64_t from = -1;
              for (int64_t j = 0; s && j < k; j++) {
                const volatile double before = carry * value[(s - 1) * n + j];  // rounded
                const double sum = before + cost[j * n + k];
                if (sum < best) best = sum, from = j;
              }
              near("value", s * n + k, value[s * n + k], best, 0);
              near("parent", s * n + k, double(parent.as<int64_t>()[s * n + k]), double(from), 0);
            }
        });
        if (n > 18 || steps != 1) continue;
        for (int64_t i = n * n - 1; i > 0; i--)  // every place, and all after it
          if (i % n > i / n) cost.set(i, i % 2 ? NAN : -kInf), refused({&value, &parent}, i, kernel);
      }
}

void bellman_pairs() {
  for (int64_t n : {2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 18, 33})
    for (int64_t steps : {int64_t(1), n / 2, n - 1})
      for (int kind = 0; kind < 6; kind++) {  // as of bellman
        CASE("bellman_pairs n %ld steps %ld kind %d", long(n), long(steps), kind);
        const int shift = kind % 2;
        const int64_t plane = n * n, all = (steps + 1) * plane;
        Tensor first(f64, n, shift), cost(f64, n * plane, shift), value(f64, all, shift), parent(f64, all, shift);
        for (int64_t at = -n; at < n * plane; at++) {
          const int64_t i = at / plane, j = at / n % n, k = at % n;
          const double c = uniform(), of_kind = kind < 2 ? c : kind < 4 ? std::floor(4 * c) : c < 0.7 ? kInf : c;
          if (at < 0)
            first.set(at + n, at == -n ? NAN : of_kind);
          else
            cost.set(at, i < j && j < k ? of_kind : NAN);
        }
        auto kernel = [&](int = 0) {
          return FK_SELECT(bellman_pairs)(
              {first.as<double>(), cost.as<double>(), n, steps, value.as<double>(), parent.as<int64_t>()});
        };
        run({1}, {&value, &parent}, kernel, [&] {
          for (int64_t at = 0; at < all; at++) {
            const int64_t s = at / plane, j = at / n % n, k = at % n;
            double best = at == 0 ? 0 : s == 1 && j == 0 && k > 0 ? first[k] : kInf;
            int64_t from = -1;
            for (int64_t i = 0; s > 1 && j < k && i < j; i++) {
              const double sum = value[(s - 1) * plane + i * n + j] + cost[i * plane + j * n + k];
              if (sum < best) best = sum, from = i;
            }
            near("value", at, value[at], best, 0);
            near("parent", at, double(parent.as<int64_t>()[at]), double(from), 0);
          }
        });
        if (n > 10 || steps != n / 2) continue;
        for (int64_t at = n * plane - 1; at > -n; at--) {  // every place, and all after it
          const int64_t i = at / plane, j = at / n % n, k = at % n;
          if (at >= 0 && !(i < j && j < k)) continue;
          at < 0 ? first.set(at + n, NAN) : cost.set(at, at % 2 ? NAN : -kInf);
          if (kernel() != at + n) fail("returned", 0, double(kernel()), double(at + n));
        }
      }
}

// ---- mlp_sample: networks in memory that ends where the kernel was told that it ends ----
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
      const int64_t bytes = FK_SELECT_AMX(mlp_pack)(args);
      memory.push_back(std::make_unique<Tensor>(bf16, bytes / 2));
      packed = memory.back()->as();
      const int64_t again = FK_SELECT_AMX(mlp_pack)({weight.as<float>(), width, in_width, low ? bf16 : f32, packed});
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
    if (a.map == fk::MlpMap::layer_norm) {
      const double W = double(a.in_width);
      for (int64_t k = 0; k < a.in_width; k++) {
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
      } else if (a.map == fk::MlpMap::layer_norm) {
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
    }
    for (int64_t c = 0; c < a.out_width; c++) x[a.out + c] = y[c], e[a.out + c] = f[c];
  }

  // Updates that add any of the velocities to either state, each kept in a place of its own while another wants it
  void solve() {
    multistep = true;
    for (int64_t s = 0; s < steps; s++) {
      updates.push_back({int64_t(uniform() < 0.5), 0, s + 1 < steps ? s : -1});
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
                                        multistep ? steps - 1 : 0};
      const int64_t bad = FK_SELECT_AMX(mlp_sample)({prepared, in_place ? out.as<float>() : x.as<float>(),
                                                     out.as<float>(), n, states.as<float>(), v.as<float>(), threads});
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
            if (updates[s].from_start)
              for (int64_t c = 0; c < D; c++) values[c] = start[c], off[c] = 0;
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
  std::vector<fk::MlpLayer> layers;
  std::vector<std::vector<double>> weights;
  std::vector<fk::MlpTable> tables[2];
  std::vector<std::unique_ptr<Tensor>> memory;
};

void mlp_sample() {
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
        const auto act = Activation(1 + variant % 9);
        const int64_t first = net.value(width), cat = net.value(width + 7), normed = net.value(width + 7);
        const int64_t gate = net.value(width), sum = net.value(width), v = net.value(D);
        net.add(MlpMap::linear, 0, D, first, width, act, {0, 2, variant % 2 ? 3 : 0});
        net.add(MlpMap::linear, first, width, cat, width, Activation::silu, {variant % 5, 1, 0});
        net.add(MlpMap::linear, first + width / 2, width - width / 2, cat + width, 7, plain, {0, 0, 0});
        net.add(MlpMap::layer_norm, cat, width + 7, normed, width + 7, plain, {2, variant % 5, 0});
        net.add(MlpMap::identity, normed + 5, width, gate, width, Activation::sigmoid, {0, 4, 0}, MlpCombine::multiply,
                first);
        net.add(MlpMap::linear, gate, width, sum, width, act, {0, 3, 1}, MlpCombine::add, cat + 1);
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
        net.solve();
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
        1, 0, nullptr,        nullptr,           0};
    const int64_t got = FK_SELECT_AMX(mlp_sample)({prepared, x.as<float>(), out.as<float>(), 97, nullptr, nullptr, 3});
    if (got != bad) fail("returned", 0, double(got), double(bad));
  }
}

}  // namespace

void __ubsan_on_report() {
  fprintf(stderr, "FAILED %s\n", g_case);
}

int main(int argc, char** argv) {  // the names of ops: only these
  setenv("OMP_WAIT_POLICY", "passive", 0);
  try {
    fk::isa();
  } catch (const std::exception& e) {
    printf("skipped: %s\n", e.what());
    const char* name = std::getenv("FLOWKERNELS_ISA");
    return std::strcmp(name, "avx2") && std::strcmp(name, "avx512") && std::strcmp(name, "amx");
  }
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(__ubsan_on_report);
  printf("%s, threads of %s%s\n", fk::isa_name(fk::isa()), fk::thread_runtime(), kRacesOnly ? ", races only" : "");
  const std::pair<const char*, void (*)()> ops[] = {
      {"velocity_gram", velocity_gram}, {"cost_from_gram", cost_from_gram}, {"bellman", bellman},
      {"bellman_pairs", bellman_pairs}, {"euler_step", euler_step},         {"linear_euler", linear_euler},
      {"linear_update", linear_update}, {"segment_points", segment_points}, {"straighten_loss", straighten_loss},
      {"mlp_sample", mlp_sample}};
  for (auto [name, test] : ops) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; i++) wanted |= !std::strcmp(argv[i], name);
    if (!wanted) continue;
    test();
    printf("%-16s %6d cases", name, g_cases);
    kRacesOnly ? printf("\n") : printf(", largest error %.3f of the allowed\n", g_worst);
    fflush(stdout);
    g_cases = 0, g_worst = 0;
  }
}

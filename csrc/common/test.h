// What the tests of the CPU kernels share: csrc/<op>/test.cpp, each a TEST(op) { ... } against a plain loop in double.
// Sizes around vectors and blocks, all types, misaligned and absent tensors, 1 to 3 threads, stores past the caches.
// Allowed errors are bounds on the kernel's roundings, with eps = 2 half-ulps: the plain loop may err by as much.
#pragma once
#include <stdio.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/memory.h"

extern "C" {  // null without the sanitizer
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __tsan_init();
}

namespace kernels_test {

struct Test {
  const char* op;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
#define TEST(op)                                                                   \
  static void test_##op();                                                         \
  static const bool registered_##op = (tests().push_back({#op, test_##op}), true); \
  static void test_##op()

using fk::Dtype;
constexpr Dtype f32 = Dtype::f32, f64 = Dtype::f64, bf16 = Dtype::bf16, f16 = Dtype::f16;
constexpr double kInf = INFINITY, kEps64 = 0x1p-52;
constexpr Dtype kStates[][2] = {{f32, f32}, {f32, bf16}, {f32, f16}, {f64, f64}};  // of a state and of a velocity
inline const std::vector<int64_t> kSizes = {0,  1,  2,  3,  4,  5,  7,  8,  9,   15,  16,
                                            17, 31, 32, 33, 63, 64, 65, 67, 127, 129, 2 * 16384 + 3};

inline char g_case[160];  // what runs now
inline int g_cases = 0;
inline double g_worst = 0;  // error / allowed
// ThreadSanitizer: one run, on 3 threads; no plain loops, and no stores that are not instrumented
inline const bool kRacesOnly = __tsan_init != nullptr;

#define CASE(...) (g_cases++, snprintf(g_case, sizeof g_case, __VA_ARGS__))

[[noreturn]] inline void fail(const char* what, int64_t i, double got, double expected, double allowed = 0) {
  printf("FAILED %s: %s[%ld] is %.17g, expected %.17g +- %.3g\n", g_case, what, long(i), got, expected, allowed);
  fflush(stdout);
  _Exit(1);
}
inline void near(const char* what, int64_t i, double got, double truth, double allowed) {
  if (got == truth || (std::isnan(got) && std::isnan(truth))) return;
  if (!(std::fabs(got - truth) <= allowed) || !std::isfinite(allowed)) fail(what, i, got, truth, allowed);
  g_worst = std::max(g_worst, std::fabs(got - truth) / allowed);
}

inline uint64_t random_bits() {
  static uint64_t s = 88172645463325252u;
  s ^= s << 13, s ^= s >> 7, s ^= s << 17;
  return s >> 8;
}
inline double uniform() {
  return double(random_bits() % 0x1000000) * 0x1p-24;
}

// ---- types ----
inline int size_of(Dtype t) {
  return t == f64 ? 8 : t == f32 ? 4 : 2;
}
inline double eps(Dtype t) {
  return t == f64 ? kEps64 : t == f32 ? 0x1p-23 : t == bf16 ? 0x1p-7 : 0x1p-10;
}
inline int lanes(Dtype t) {
  return (16 << std::clamp(int(fk::isa()), 0, 2)) / size_of(t);
}
inline double half_ulp(double v, Dtype t) {
  return std::max(std::fabs(v) * eps(t) / 2, t == f16 ? 0x1p-25 : t == bf16 ? 0x1p-134 : 0x1p-150);
}
inline double power_of_two(int e) {
  const uint64_t bits = uint64_t(e + 1023) << 52;
  double v;
  std::memcpy(&v, &bits, 8);
  return v;
}
inline uint16_t encode(float v, Dtype t) {  // to nearest, ties to even
  const int digits = t == bf16 ? 7 : 10, least = t == bf16 ? -126 : -14, infinity = 0x8000 - (1 << digits);
  const int sign = std::signbit(v) ? 0x8000 : 0;
  if (!std::isfinite(v)) return uint16_t(std::isnan(v) ? 0x7fff : sign | infinity);
  uint32_t u;
  std::memcpy(&u, &v, 4);
  const int e = std::max(int(u >> 23 & 255) - 127, least);
  const int size = int(std::nearbyint(std::fabs(v) * power_of_two(digits - e))) + ((e - least) << digits);
  return uint16_t(sign | std::min(size, infinity));
}
inline double decode(uint16_t h, Dtype t) {
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
inline void run(std::vector<int> threads, const Outputs& outputs, Kernel kernel, Check check) {
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
inline void refused(const Outputs& outputs, int64_t place, Kernel kernel) {
  for (Tensor* o : outputs) o->fill(0x55);
  const int64_t got = kernel();
  if (got != place) fail("returned", 0, double(got), double(place));
  for (Tensor* o : outputs)
    if (!o->holds(std::vector<unsigned char>(o->content().size(), 0x55))) fail("written to", 0, 1, 0);
}
inline void is_rounded(const Tensor& low, const Tensor& out) {
  for (int64_t i = 0; i < low.n; i++) {
    const uint16_t got = low.as<uint16_t>()[i], expected = encode(float(out[i]), low.type);
    if (got != expected && !(std::isnan(low[i]) && std::isnan(out[i]))) fail("low", i, got, expected);
  }
}
// elements that three threads store past the caches
inline int64_t many(int size) {
  return 3 * (fk::level2_bytes() / 2 / size + 64) + 65;
}

// ---- euler_step and linear_update: layouts are aligned, misaligned, and misaligned in place ----
template <class Body>  // body(x, out, low, layout)
inline void updates(const char* name, Dtype x_type, Dtype v_type, Body body, std::vector<int64_t> sizes, bool past) {
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
inline std::vector<Shape> shapes(int out_size, bool past, bool few_rows) {
  std::vector<Shape> all = {{0, 5}, {2, 16385}, {1, 33000}, {3, 16384}};
  for (int64_t D : kSizes)
    if (D < 200) all.push_back({1, D}), all.push_back({5, D});
  const Shape rows = {many(out_size) / (16384 + 64) + 1, 16384 + 64};
  if (past && !kRacesOnly) all.push_back(few_rows ? Shape{2, rows.B * rows.D / 64 * 32} : rows);
  return all;
}

}  // namespace kernels_test
using namespace kernels_test;

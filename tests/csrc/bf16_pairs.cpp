// What csrc/common/bf16_pairs.h does for processors without avx512_bf16, beside one number after another.
#include "common/bf16_pairs.h"

#include "common/test.h"

namespace {

namespace kernels = fk::emulated_bf16;
using kernels::kFloats;

float from_bits(uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
uint32_t to_bits(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}
float flushed(float v) {
  return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v;
}
// A result is tiny or not after it is rounded as if there were no least exponent: 2^24 times as large, which changes no
// digit.
float multiply_add(float a, float b, float sum) {
  const float full = std::fma(flushed(a), flushed(b), flushed(sum));
  if (!(std::fabs(full) <= 0x1p-126f)) return full;
  constexpr float scale = 0x1p24f;
  float& smaller = std::fabs(a) < std::fabs(b) ? a : b;
  a = flushed(a), b = flushed(b), smaller *= scale;
  const float larger = std::fma(a, b, flushed(sum) * scale);
  return std::fabs(larger) < 0x1p-126f * scale ? std::copysign(0.0f, larger) : full;
}

// Any bits, with exponents that meet, and those around the least and the largest
uint32_t bits_near(int exponent) {
  const uint32_t e = uint32_t(std::clamp(exponent + int(random_bits() % 5) - 2, 0, 255));
  const uint32_t kFractions[] = {0, 1, 0x7fffff, 0x400000, 0x8000, 0x18000, 0x7fff, 0x8001};
  const uint32_t fraction = random_bits() % 3 ? uint32_t(random_bits() & 0x7fffff) : kFractions[random_bits() % 8];
  return uint32_t(random_bits() % 2) << 31 | e << 23 | fraction;
}
void same(const char* what, int64_t i, float got, float expected) {
  if (std::isnan(got) && std::isnan(expected)) return;
  if (to_bits(got) != to_bits(expected)) fail(what, i, got, expected);
}

}  // namespace

TEST(bf16_pairs) {
  CASE("sums of products of pairs");
  const int kExponents[] = {0, 1, 2, 20, 40, 64, 100, 127, 150, 200, 253, 255};
  for (int round = 0; round < 200000; round++) {
    const int a_exponent = kExponents[random_bits() % 12], b_exponent = kExponents[random_bits() % 12];
    const int of_product = std::clamp(a_exponent + b_exponent - 127, 0, 255);
    kernels::vu a, b;
    kernels::vf sum;
    for (int l = 0; l < kFloats; l++) {
      a[l] = (bits_near(a_exponent) & 0xffff0000u) | bits_near(a_exponent) >> 16;
      b[l] = (bits_near(b_exponent) & 0xffff0000u) | bits_near(b_exponent) >> 16;
      sum[l] = from_bits(bits_near(random_bits() % 3 ? of_product + int(random_bits() % 60) - 30 : of_product));
    }
    const kernels::vf got = kernels::add_products(sum, a, b);
    for (int l = 0; l < kFloats; l++) {
      const float second = multiply_add(from_bits(a[l] & 0xffff0000u), from_bits(b[l] & 0xffff0000u), sum[l]);
      same("sum", l, got[l], multiply_add(from_bits(a[l] << 16), from_bits(b[l] << 16), second));
    }
  }
  CASE("numbers rounded to pairs");
  for (uint32_t upper = 0; upper < 0x10000; upper += 2) {
    const uint32_t kLower[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x4000, 0xc000};
    float of[2 * kFloats];
    for (int i = 0; i < 2 * kFloats; i++) of[i] = from_bits((upper + uint32_t(i) / 16) << 16 | kLower[i % 8]);
    uint16_t got[2 * kFloats];
    kernels::store_pairs(got, kernels::round_to_pairs(kernels::load(of), kernels::load(of + kFloats)));
    for (int i = 0; i < 2 * kFloats; i++) {
      const uint16_t expected =
          std::isnan(of[i]) ? uint16_t(to_bits(of[i]) >> 16 | 0x40) : encode(flushed(of[i]), bf16);
      if (got[i] != expected) fail("rounded", i, got[i], expected);
    }
  }
}

// What C++ translated from PTX (ptx_to_cpp.py) is made of. Registers are variables that hold bits; read<T> gives them
// a type. Functions with the name of an instruction and a final underscore do what that instruction does.
#pragma once

#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "common/cuda.h"

#define HERE (::host_cuda::Loc{__FILE__, __LINE__})

namespace host_cuda {
namespace ptx {

using fk::cuda::bf16;
using fk::cuda::half;

// A translated kernel; `layout` has the offset and size of each parameter in the block that it reads them from.
struct Parameter {
  size_t offset, size;
};
struct Registration {
  std::string name;
  void (*function)(const char* parameters);
  std::vector<Parameter> layout;
  Registration(const char* name, void (*)(const char*), std::initializer_list<Parameter> layout);
};
// A variable of the text's own in global memory.
struct Variable {
  Variable(const void* p, size_t bytes);
};
uint64_t launches();  // of translated kernels so far

// ---- registers ----
template <class T, class Bits>
inline T read(Bits bits) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(bits);
  } else {
    T value;
    const uint64_t wide = bits;
    memcpy(&value, &wide, sizeof(T));  // little endian
    return value;
  }
}
template <class T>
inline uint64_t to_bits(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<uint64_t>(value);
  } else {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
  }
}
inline uint64_t low(uint64_t bits, int width) {
  return bits & ((1ull << width) - 1);
}

// ---- memory ----
// Shared variables are known by their offset from here; the emulation knows them by an address, one for each.
#define shared_variable(bytes, where)               \
  [&] {                                             \
    static const char key = 0;                      \
    return ::host_cuda::shared(&key, bytes, where); \
  }()
template <int bytes, class P>
inline P aligned(P p, Loc loc) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(loc, "access of %d bytes at the misaligned address %p", bytes, p);
  return p;
}
// An access of global memory has to be of a tensor of the launch, where the launch says which those are.
void check_global(const void* p, size_t bytes, Loc loc);
template <int bytes, class P>
inline P global(P p, Loc loc) {
  check_global(p, bytes, loc);
  return aligned<bytes>(p, loc);
}
template <class T>
inline T load(const char* p) {
  T value;
  memcpy(&value, p, sizeof(T));
  return value;
}
template <class T>
inline void store(char* p, T value) {
  memcpy(p, &value, sizeof(T));
}

// ---- arithmetic ----
template <class T>
constexpr bool is_float = std::is_floating_point_v<T>;
template <class T>
constexpr bool is_low = std::is_same_v<T, bf16> || std::is_same_v<T, half>;
template <class T>
constexpr uint32_t width = 8 * sizeof(T);
template <class T>
using Bits = std::conditional_t<
    sizeof(T) == 8, uint64_t,
    std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>>;
template <class T>
struct Twice;
template <>
struct Twice<int16_t> {
  using type = int32_t;
};
template <>
struct Twice<uint16_t> {
  using type = uint32_t;
};
template <>
struct Twice<int32_t> {
  using type = int64_t;
};
template <>
struct Twice<uint32_t> {
  using type = uint64_t;
};
template <>
struct Twice<int64_t> {
  using type = __int128;
};
template <>
struct Twice<uint64_t> {
  using type = unsigned __int128;
};
template <class T>
using Wide = typename Twice<T>::type;

// To 16 bits from more than a float has: what a float cannot hold makes its last bit odd, so that rounding from there
// is rounding from the value itself. Of two floats of 16 bits, sum, difference and product round once if a float holds
// them first: it has more than twice their bits.
template <class T>
inline T narrow_from(double v) {
  float f = static_cast<float>(v);
  if (std::isfinite(f) && double(f) != v) {
    if (std::fabs(double(f)) > std::fabs(v)) f = std::nextafter(f, 0.0f);
    f = __uint_as_float(__float_as_uint(f) | 1);
  }
  return fk::cuda::convert<T>(f);
}

// Integers wrap around: in 64 bits unsigned.
#define HOST_CUDA_BINARY(name, op)                       \
  template <class T>                                     \
  inline T name(T a, T b) {                              \
    if constexpr (is_low<T>)                             \
      return fk::cuda::convert<T>(widen(a) op widen(b)); \
    else if constexpr (is_float<T>)                      \
      return a op b;                                     \
    else                                                 \
      return static_cast<T>(uint64_t(a) op uint64_t(b)); \
  }
HOST_CUDA_BINARY(add_, +)
HOST_CUDA_BINARY(sub_, -)
HOST_CUDA_BINARY(mul_, *)
#undef HOST_CUDA_BINARY
template <class T>
inline T mul_lo_(T a, T b) {
  return mul_(a, b);
}
template <class T>
inline Wide<T> mul_wide_(T a, T b) {
  return static_cast<Wide<T>>(a) * b;
}
template <class T>
inline T mul_hi_(T a, T b) {
  return static_cast<T>(mul_wide_(a, b) >> width<T>);
}
template <class T>
inline T mad_lo_(T a, T b, T c) {
  return add_(mul_(a, b), c);
}
template <class T>
inline Wide<T> mad_wide_(T a, T b, Wide<T> c) {
  return add_(mul_wide_(a, b), c);
}
// With the carry of the instruction before, and for the one after.
template <class T>
inline T add_carry(T a, T b, bool in, bool& out) {
  const unsigned __int128 sum = static_cast<unsigned __int128>(Bits<T>(a)) + Bits<T>(b) + in;
  out = sum >> width<T> & 1;
  return static_cast<T>(sum);
}
template <class T>
inline T sub_carry(T a, T b, bool in, bool& out) {  // what is carried is a borrow
  const unsigned __int128 difference = static_cast<unsigned __int128>(Bits<T>(a)) - Bits<T>(b) - in;
  out = difference >> width<T> & 1;
  return static_cast<T>(difference);
}
template <class T>
inline T fma_(T a, T b, T c) {
  if constexpr (is_low<T>) {  // the product is exact in double; of the sum, the error makes its last bit odd
    const double product = double(widen(a)) * widen(b), addend = widen(c), sum = product + addend;
    const double part = sum - product, error = (product - (sum - part)) + (addend - part);
    uint64_t bits = to_bits(sum);
    if (std::isfinite(sum) && error != 0 && !(bits & 1)) bits += (error < 0) == (sum < 0) ? 1 : -1;
    return narrow_from<T>(read<double>(bits));
  } else {
    static_assert(is_float<T>);
    return std::fma(a, b, c);
  }
}
inline float below(float v) {
  return std::nextafter(v, -std::numeric_limits<float>::infinity());
}
template <class T>
inline T fma_rm_(T a, T b, T c) {  // rounded down; a b is exact in double, and the sum's error is that of two terms
  static_assert(std::is_same_v<T, float>);
  const double product = double(a) * b, sum = product + c, part = sum - product;
  const double error = (product - (sum - part)) + (c - part);
  const float nearest = static_cast<float>(sum);
  return nearest > sum || (nearest == sum && error < 0) ? below(nearest) : nearest;
}
template <class T>
inline T div_(T a, T b) {
  if constexpr (is_float<T>)
    return a / b;
  else
    return b ? T(a / b) : T(-1);
}
template <class T>
inline T rem_(T a, T b) {
  return b ? T(a % b) : a;
}
template <class T>
inline T neg_(T a) {
  if constexpr (is_low<T>)
    return {static_cast<uint16_t>(a.bits ^ 0x8000)};
  else if constexpr (is_float<T>)
    return -a;
  else
    return sub_(T(0), a);
}
template <class T>
inline T abs_(T a) {
  if constexpr (is_low<T>)
    return {static_cast<uint16_t>(a.bits & 0x7fff)};
  else if constexpr (is_float<T>)
    return std::fabs(a);
  else
    return a < 0 ? neg_(a) : a;
}
template <class T>
inline auto comparable(T a) {
  if constexpr (is_low<T>)
    return widen(a);
  else
    return a;
}
template <class T>
inline bool unordered(T a, T b) {
  return a != a || b != b;
}
template <class T>
inline T min_(T a, T b) {  // of a number and NaN, the number
  const auto x = comparable(a), y = comparable(b);
  return x != x ? b : y != y ? a : x < y ? a : b;
}
template <class T>
inline T max_(T a, T b) {
  const auto x = comparable(a), y = comparable(b);
  return x != x ? b : y != y ? a : x > y ? a : b;
}
template <class T>
inline T min_NaN_(T a, T b) {  // of a number and NaN, NaN
  return comparable(a) != comparable(a) ? a : comparable(b) != comparable(b) ? b : min_(a, b);
}
template <class T>
inline T max_NaN_(T a, T b) {
  return comparable(a) != comparable(a) ? a : comparable(b) != comparable(b) ? b : max_(a, b);
}
template <class T>
inline T copysign_(T sign, T a) {
  return std::copysign(a, sign);
}
#define HOST_CUDA_UNARY(name, expression) \
  template <class T>                      \
  inline T name(T a) {                    \
    static_assert(is_float<T>);           \
    return expression;                    \
  }
HOST_CUDA_UNARY(sqrt_, std::sqrt(a))
HOST_CUDA_UNARY(rcp_, T(1) / a)
HOST_CUDA_UNARY(rsqrt_, T(1) / std::sqrt(a))
HOST_CUDA_UNARY(ex2_, std::exp2(a))
HOST_CUDA_UNARY(lg2_, std::log2(a))
HOST_CUDA_UNARY(sin_, std::sin(a))
HOST_CUDA_UNARY(cos_, std::cos(a))
HOST_CUDA_UNARY(tanh_, std::tanh(a))
#undef HOST_CUDA_UNARY
template <class F>
inline uint64_t each_f32(uint64_t a, uint64_t b, uint64_t c, F f) {  // of a pair
  const auto high = [](uint64_t v) { return read<float>(v >> 32); };
  return to_bits(f(read<float>(a), read<float>(b), read<float>(c))) | to_bits(f(high(a), high(b), high(c))) << 32;
}
inline uint64_t fma_f32x2(uint64_t a, uint64_t b, uint64_t c) {
  return each_f32(a, b, c, [](float x, float y, float z) { return std::fma(x, y, z); });
}
inline uint64_t add_f32x2(uint64_t a, uint64_t b) {
  return each_f32(a, b, 0, [](float x, float y, float) { return x + y; });
}
inline uint64_t sub_f32x2(uint64_t a, uint64_t b) {
  return each_f32(a, b, 0, [](float x, float y, float) { return x - y; });
}
inline uint64_t mul_f32x2(uint64_t a, uint64_t b) {
  return each_f32(a, b, 0, [](float x, float y, float) { return x * y; });
}
template <class T, class F, class... Words>
inline uint64_t each_low(F f, Words... words) {  // of two floats of 16 bits
  const auto at = [&](int shift) { return to_bits(f(read<T>(uint32_t(words) >> shift)...)) << shift; };
  return at(0) | at(16);
}

// ---- bits ----
template <class T>
inline T and_(T a, T b) {
  return a & b;
}
template <class T>
inline T or_(T a, T b) {
  return a | b;
}
template <class T>
inline T xor_(T a, T b) {
  return a ^ b;
}
template <class T>
inline T not_(T a) {
  if constexpr (std::is_same_v<T, bool>)
    return !a;
  else
    return static_cast<T>(~a);
}
template <class T>
inline T cnot_(T a) {
  return a == 0;
}
template <class T>
inline T shl_(T a, uint32_t n) {
  return n >= width<T> ? T(0) : static_cast<T>(uint64_t(a) << n);
}
template <class T>
inline T shr_(T a, uint32_t n) {
  return n < width<T> ? static_cast<T>(a >> n) : a < T(0) ? T(-1) : T(0);
}
template <class T>
inline T shf_l_wrap_(T lower, T upper, T n) {
  return static_cast<T>(((uint64_t(upper) << 32 | lower) << (n & 31)) >> 32);
}
template <class T>
inline T shf_l_clamp_(T lower, T upper, T n) {
  return n >= 32 ? lower : shf_l_wrap_(lower, upper, n);
}
template <class T>
inline T shf_r_wrap_(T lower, T upper, T n) {
  return static_cast<T>((uint64_t(upper) << 32 | lower) >> (n & 31));
}
template <class T>
inline T shf_r_clamp_(T lower, T upper, T n) {
  return n >= 32 ? upper : shf_r_wrap_(lower, upper, n);
}
template <class T>
inline T bfe_(T a, uint32_t from, uint32_t count) {  // beyond the end: the sign
  from &= 255, count &= 255;
  if (count == 0) return 0;
  const bool negative = std::is_signed_v<T> && (Bits<T>(a) >> min(from + count - 1, width<T> - 1) & 1);
  T field = 0;
  for (uint32_t i = 0; i < width<T>; i++) {
    const bool inside = i < count && from + i < width<T>;
    field |= T(Bits<T>(inside ? Bits<T>(a) >> (from + i) & 1 : negative) << i);
  }
  return field;
}
template <class T>
inline T bfi_(T field, T into, uint32_t from, uint32_t count) {
  from &= 255, count &= 255;
  const T mask = shl_<T>(count >= width<T> ? T(-1) : static_cast<T>((uint64_t(1) << count) - 1), from);
  return static_cast<T>((into & ~mask) | (shl_<T>(field, from) & mask));
}
template <class T>
inline T prmt_(T a, T b, T selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  T result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t which = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (which & 7) & 255;
    if (which & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
template <class T>
inline T lop3_(T a, T b, T c, T table) {
  T result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
template <class T>
inline uint32_t popc_(T a) {
  return __builtin_popcountll(Bits<T>(a));
}
template <class T>
inline uint32_t clz_(T a) {
  return a ? __builtin_clzll(Bits<T>(a)) - (64 - width<T>) : width<T>;
}
template <class T>
inline T brev_(T a) {
  T result = 0;
  for (uint32_t i = 0; i < width<T>; i++) result = T(result << 1 | (a >> i & 1));
  return result;
}
template <class T>
inline T selp_(T a, T b, bool which) {
  return which ? a : b;
}

// ---- conversions ----
enum class Rounding { none, rni, rzi, rmi, rpi };
template <class T>
inline T to_integral(T v, Rounding rounding) {
  switch (rounding) {
    case Rounding::rni: return std::nearbyint(v);
    case Rounding::rzi: return std::trunc(v);
    case Rounding::rmi: return std::floor(v);
    case Rounding::rpi: return std::ceil(v);
    default: return v;
  }
}
template <class To, class From>
inline To cvt(From v, Rounding rounding, bool saturate) {
  if constexpr (is_low<From>) {
    return cvt<To>(widen(v), rounding, saturate);
  } else if constexpr (is_low<To>) {
    return narrow_from<To>(cvt<double>(v, rounding, saturate));
  } else if constexpr (is_float<To>) {
    To to = static_cast<To>(v);
    if constexpr (is_float<From>) to = static_cast<To>(to_integral(v, rounding));
    return saturate ? to > 0 ? to < 1 ? to : To(1) : To(0) : to;
  } else {
    using Limits = std::numeric_limits<To>;
    if constexpr (is_float<From>) {  // saturates, and NaN gives 0
      const double whole = to_integral(double(v), rounding);
      if (whole != whole) return 0;
      if (whole < double(Limits::min())) return Limits::min();
      return whole >= std::ldexp(1.0, Limits::digits) ? Limits::max() : To(whole);
    } else {
      const __int128 wide = v;
      if (saturate) return wide < Limits::min() ? Limits::min() : wide > Limits::max() ? Limits::max() : To(wide);
      return static_cast<To>(v);
    }
  }
}
inline uint32_t cvt_rna_tf32(float v) {  // to nearest, ties away from zero
  const uint32_t bits = __float_as_uint(v);
  return v != v ? 0x7fffffffu : (bits + 0x1000u) & 0xffffe000u;
}
template <class T>
inline uint32_t pair(float lower, float upper) {
  return uint32_t(to_bits(fk::cuda::convert<T>(lower)) | to_bits(fk::cuda::convert<T>(upper)) << 16);
}

// ---- warps ----
// how: 0 up, 1 down, 2 bfly, 3 idx; limits: the clamp in bits 0-4 and the segment mask in bits 8-12
template <int how>
inline uint32_t shfl(uint32_t value, uint32_t b, uint32_t limits, uint32_t mask, bool& valid, Loc loc) {
  const uint32_t lane = current->lane, segment = limits >> 8 & 31, clamp = limits & 31;
  const int last = int((lane & segment) | (clamp & ~segment)), by = int(b & 31);
  const int from = how == 0   ? int(lane) - by
                   : how == 1 ? int(lane) + by
                   : how == 2 ? int(lane) ^ by
                              : int((lane & segment) | (uint32_t(by) & ~segment));
  valid = how == 0 ? from >= last : from <= last;
  return shuffled(mask, value, valid ? from : -1, loc);
}
template <class T, class F>
inline T redux(T value, uint32_t mask, F f, Loc loc) {
  T result{};
  bool first = true;
  for (int i = 0; i < 32; i++) {
    if (!(mask >> i & 1)) continue;
    const T other = shuffled(mask, value, i, loc);
    result = first ? other : f(result, other);
    first = false;
  }
  return result;
}
template <int count, bool transposed>
inline void ldmatrix(uint32_t (&r)[count], const char* row, Loc loc) {
  const unsigned lane = current->lane;
  if (lane < 8 * count && !is_shared(aligned<16>(row, loc), 16))
    fail(loc, "ldmatrix: row %p is not in shared memory", row);
  const void* rows[32];
  exchange(row, rows, loc);
  for (unsigned i = 0; i < count; i++)
    for (unsigned half = 0; half < 2; half++) {  // of a register: an element each
      const unsigned k = 2 * (lane % 4) + half, in = transposed ? k : lane / 4, at = transposed ? lane / 4 : k;
      memcpy(reinterpret_cast<char*>(&r[i]) + 2 * half, static_cast<const char*>(rows[8 * i + in]) + 2 * at, 2);
    }
}
// mma.m16n8k<depth> of 16-bit floats or tf32, and mma.m8n8k4 of doubles.
enum class Element { bf16, half, tf32 };
void mma(Element, unsigned depth, float (&d)[4], std::initializer_list<uint32_t> a, std::initializer_list<uint32_t> b,
         Loc loc);
void mma_m8n8k4(double (&d)[2], double a, double b, Loc loc);

}  // namespace ptx
}  // namespace host_cuda

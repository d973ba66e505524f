// CUDA's names for the host emulation: the part of the language and of its library that kernels use, and the emulated
// twins of what common/cuda.h wraps.
#pragma once
#include <float.h>
#include <math.h>
#include <string.h>

#include <initializer_list>
#include <tuple>
#include <type_traits>
#include <utility>

#include "host_cuda/emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))  // also what the checks are to find in the kernel's line
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define threadIdx (::host_cuda::current->index)
#define blockIdx (::host_cuda::current->block)
#define blockDim (::host_cuda::current->block_size)
#define gridDim (::host_cuda::current->grid_size)
constexpr int warpSize = 32;

// The line of the call, as the last parameters of a function, and as a Loc in it.
#define HOST_CUDA_LOC const char *loc_file = __builtin_FILE(), int loc_line = __builtin_LINE()
#define HOST_CUDA_HERE (::host_cuda::Loc{loc_file, loc_line})

// `typedef float t[8][33]` turns any array declarator into a type; the address of the key tells declarations apart.
#define FK_SHARED(T, name, ...)          \
  typedef T fk_##name##_t __VA_ARGS__;   \
  static const char fk_##name##_key = 0; \
  fk_##name##_t& name =                  \
      *static_cast<fk_##name##_t*>(::host_cuda::shared(&fk_##name##_key, sizeof(fk_##name##_t), {__FILE__, __LINE__}))
#define FK_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::host_cuda::dynamic_shared({__FILE__, __LINE__}))
#define FK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), ::host_cuda::launch_kernel(#kernel, (grid), (block), (shared), (kernel), __VA_ARGS__))

namespace host_cuda {

// Copying the arguments into the kernel's parameters is no access of the kernel's own.
template <class... P, class... A>
void launch_kernel(const char* name, dim3 grid, dim3 block, size_t shared, void (*kernel)(P...), A&&... a) {
  if (launch_instead) {
    const std::tuple<P...> values(static_cast<P>(a)...);
    return std::apply(
        [&](const P&... value) {
          const void* arguments[] = {&value...};
          const size_t sizes[] = {sizeof(P)...};
          launch_instead(name, grid, block, shared, reinterpret_cast<const void*>(kernel), arguments, sizes,
                         sizeof...(P));
        },
        values);
  }
  auto call = [&]() __attribute__((no_sanitize("thread"))) { kernel(static_cast<P>(a)...); };
  using Call = decltype(call);
  launch(
      name, grid, block, shared, reinterpret_cast<const void*>(kernel),
      [](const void* c) __attribute__((no_sanitize("thread"))) { (*static_cast<const Call*>(c))(); }, &call);
}

template <class T>
T shuffled(unsigned mask, T v, int source, Loc loc) {
  T out;
  shuffle(mask, &v, &out, sizeof(T), source, loc);
  return out;
}

// Relaxed, as CUDA's atomics are. Floating-point numbers go as the integers of their bits.
template <class T, class F>
__forceinline__ T update(T* p, F f) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  Bits* q = reinterpret_cast<Bits*>(p);
  Bits before = __atomic_load_n(q, __ATOMIC_RELAXED), after;
  T old;
  do {
    memcpy(&old, &before, sizeof(T));
    const T wanted = f(old);
    memcpy(&after, &wanted, sizeof(T));
  } while (!__atomic_compare_exchange_n(q, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

template <class To, class From>
To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &v, sizeof(to));
  return to;
}

}  // namespace host_cuda

// ---- vector types ----
#define HOST_CUDA_VECTOR(T, name, alignment2, alignment4) \
  struct alignas(alignment2) name##2 {                    \
    T x, y;                                               \
  };                                                      \
  struct alignas(alignment4) name##4 {                    \
    T x, y, z, w;                                         \
  };                                                      \
  inline name##2 make_##name##2(T x, T y) {               \
    return {x, y};                                        \
  }                                                       \
  inline name##4 make_##name##4(T x, T y, T z, T w) {     \
    return {x, y, z, w};                                  \
  }
HOST_CUDA_VECTOR(float, float, 8, 16)
HOST_CUDA_VECTOR(int, int, 8, 16)
HOST_CUDA_VECTOR(unsigned, uint, 8, 16)
HOST_CUDA_VECTOR(double, double, 16, 16)
#undef HOST_CUDA_VECTOR

// ---- barriers and warp collectives ----
inline void __syncthreads(HOST_CUDA_LOC) {
  host_cuda::barrier(false, HOST_CUDA_HERE);
}
inline int __syncthreads_count(int vote, HOST_CUDA_LOC) {
  return host_cuda::barrier(vote, HOST_CUDA_HERE);
}
inline int __syncthreads_or(int vote, HOST_CUDA_LOC) {
  return host_cuda::barrier(vote, HOST_CUDA_HERE) > 0;
}
inline int __syncthreads_and(int vote, HOST_CUDA_LOC) {
  return host_cuda::barrier(!vote, HOST_CUDA_HERE) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, HOST_CUDA_LOC) {
  host_cuda::warp_barrier(mask, HOST_CUDA_HERE);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, HOST_CUDA_LOC) {
  const int first = int(host_cuda::current->lane) & ~(width - 1);
  return host_cuda::shuffled(mask, v, first + (source & (width - 1)), HOST_CUDA_HERE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, HOST_CUDA_LOC) {
  const int lane = int(host_cuda::current->lane), source = lane ^ lanes;
  return host_cuda::shuffled(mask, v, source <= (lane | (width - 1)) ? source : -1, HOST_CUDA_HERE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned lanes, int width = 32, HOST_CUDA_LOC) {
  const int lane = int(host_cuda::current->lane), source = lane + int(lanes);
  return host_cuda::shuffled(mask, v, source <= (lane | (width - 1)) ? source : -1, HOST_CUDA_HERE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned lanes, int width = 32, HOST_CUDA_LOC) {
  const int lane = int(host_cuda::current->lane), source = lane - int(lanes);
  return host_cuda::shuffled(mask, v, source >= (lane & ~(width - 1)) ? source : -1, HOST_CUDA_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int vote, HOST_CUDA_LOC) {
  return host_cuda::ballot(mask, vote, HOST_CUDA_HERE);
}
inline int __any_sync(unsigned mask, int vote, HOST_CUDA_LOC) {
  return host_cuda::ballot(mask, vote, HOST_CUDA_HERE) != 0;
}
inline int __all_sync(unsigned mask, int vote, HOST_CUDA_LOC) {
  return host_cuda::ballot(mask, vote, HOST_CUDA_HERE) == mask;
}
unsigned __activemask() = delete;  // which lanes happen to run together is nothing to rely on

// ---- memory ----
template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcs(const T* p) {
  return *p;
}
template <class T>
__forceinline__ void __stcs(T* p, T v) {
  *p = v;
}
inline void __threadfence() {
  host_cuda::fence();
}
template <class T>
using HostCudaSame = typename std::common_type<T>::type;  // a parameter that takes no part in deduction
template <class T>
__forceinline__ T atomicAdd(T* p, HostCudaSame<T> v) {
  return host_cuda::update(p, [=](T old) { return T(old + v); });
}
template <class T>
__forceinline__ T atomicMin(T* p, HostCudaSame<T> v) {
  static_assert(std::is_integral_v<T>, "CUDA has none for floating-point numbers");
  return host_cuda::update(p, [=](T old) { return old < v ? old : v; });
}
template <class T>
__forceinline__ T atomicMax(T* p, HostCudaSame<T> v) {
  static_assert(std::is_integral_v<T>, "CUDA has none for floating-point numbers");
  return host_cuda::update(p, [=](T old) { return old > v ? old : v; });
}
template <class T>
__forceinline__ T atomicOr(T* p, HostCudaSame<T> v) {
  return host_cuda::update(p, [=](T old) { return T(old | v); });
}
template <class T>
__forceinline__ T atomicExch(T* p, HostCudaSame<T> v) {
  return host_cuda::update(p, [=](T) { return v; });
}
template <class T>
__forceinline__ T atomicCAS(T* p, HostCudaSame<T> expected, HostCudaSame<T> v) {
  static_assert(std::is_integral_v<T>, "CUDA has none for floating-point numbers");
  return host_cuda::update(p, [=](T old) { return old == expected ? v : old; });
}
__forceinline__ unsigned atomicInc(unsigned* p, unsigned last) {
  return host_cuda::update(p, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

// ---- arithmetic; what is approximate on a GPU is exact to the last bit here ----
inline float __int_as_float(int v) {
  return host_cuda::bits_as<float>(v);
}
inline float __uint_as_float(unsigned v) {
  return host_cuda::bits_as<float>(v);
}
inline int __float_as_int(float v) {
  return host_cuda::bits_as<int>(v);
}
inline unsigned __float_as_uint(float v) {
  return host_cuda::bits_as<unsigned>(v);
}
inline long long __double_as_longlong(double v) {
  return host_cuda::bits_as<long long>(v);
}
inline double __longlong_as_double(long long v) {
  return host_cuda::bits_as<double>(v);
}
inline int __popc(unsigned v) {
  return __builtin_popcount(v);
}
inline int __ffs(int v) {
  return __builtin_ffs(v);
}
inline int __clz(int v) {
  return v ? __builtin_clz(unsigned(v)) : 32;
}
inline float rsqrtf(float x) {
  return 1 / sqrtf(x);
}
inline double rsqrt(double x) {
  return 1 / sqrt(x);
}
inline float __expf(float x) {
  return expf(x);
}
inline float __logf(float x) {
  return logf(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float x) {
  return 1 / x;
}
inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
inline float __fmul_rn(float a, float b) {  // never contracted with a sum, nor is the next
  const volatile float product = a * b;
  return product;
}
inline double __dmul_rn(double a, double b) {
  const volatile double product = a * b;
  return product;
}
template <class T>
constexpr const T& min(const T& a, const T& b) {
  return b < a ? b : a;
}
template <class T>
constexpr const T& max(const T& a, const T& b) {
  return a < b ? b : a;
}

// ---- what common/cuda.h wraps ----
namespace fk {
namespace cuda {

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};
inline float widen(bf16 v) {
  return __uint_as_float(uint32_t(v.bits) << 16);
}
inline float widen(half v) {
  return host_cuda::bits_as<_Float16>(v);
}
inline void narrow(bf16& to, float v) {  // to nearest, ties to even
  const uint32_t u = __float_as_uint(v);
  to.bits = v != v ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void narrow(half& to, float v) {
  to = host_cuda::bits_as<half>(_Float16(v));
}

inline int thread_again() {
  return int(threadIdx.x);
}
inline int block_again() {
  return int(blockIdx.x);
}
inline uint32_t half_pair(float first, float second) {
  half pair[2];
  narrow(pair[0], first), narrow(pair[1], second);
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

__forceinline__ void cp_async16(void* to, const void* from, unsigned from_bytes = 16, HOST_CUDA_LOC) {
  host_cuda::cp_async(to, from, 16, from_bytes, HOST_CUDA_HERE);
}
inline void cp_async_commit() {
  host_cuda::cp_async_commit();
}
template <int N>
void cp_async_wait() {
  host_cuda::cp_async_wait(N);
}
inline void named_barrier(int id, int threads, HOST_CUDA_LOC) {
  host_cuda::named_barrier(id, threads, HOST_CUDA_HERE);
}

// Lanes 8 i to 8 i + 7 give the rows of matrix i; a lane gets two neighbours of row lane / 4 of each.
template <int matrices>
__forceinline__ void ldmatrix(uint32_t (&r)[matrices], const void* row, host_cuda::Loc loc) {
  const unsigned lane = host_cuda::current->lane;
  if (lane < 8 * matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16) host_cuda::fail(loc, "ldmatrix: row %p is not aligned to 16 bytes", row);
    if (!host_cuda::is_shared(row, 16)) host_cuda::fail(loc, "ldmatrix: row %p is not in shared memory", row);
  }
  const void* rows[32];
  host_cuda::exchange(row, rows, loc);
  for (int i = 0; i < matrices; i++) r[i] = static_cast<const uint32_t*>(rows[8 * i + lane / 4])[lane % 4];
}
__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row, HOST_CUDA_LOC) {
  ldmatrix(r, row, HOST_CUDA_HERE);
}
__forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row, HOST_CUDA_LOC) {
  ldmatrix(r, row, HOST_CUDA_HERE);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HOST_CUDA_LOC) {
  constexpr auto low = std::is_same_v<T, bf16> ? host_cuda::Low::bf16 : host_cuda::Low::half;
  host_cuda::mma_m16n8k16(low, d, a, b, HOST_CUDA_HERE);
}

// What st.global would do with the address of shared memory is anyone's guess.
template <class Word>
__forceinline__ void store_word(Word* p, Word w, HOST_CUDA_LOC) {
  if (host_cuda::is_shared(p, sizeof(Word))) host_cuda::fail(HOST_CUDA_HERE, "store_vector to shared memory");
  *p = w;
}

}  // namespace cuda
}  // namespace fk

// ---- what launchers ask of the CUDA runtime ----
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;  // 0: of FK_SHARED arrays the emulation hears when the kernel runs
};
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;  // the emulation throws
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // multiprocessors: more than one and odd, so that shares of the work are uneven
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : int(host_cuda::kSharedLimit);
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  *a = {};
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return host_cuda::allow_shared(kernel, size_t(bytes)) ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

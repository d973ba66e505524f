// host_cuda: run CUDA C++ device code on the CPU, for tests.  One fiber per CUDA thread, so
// __syncthreads(), warp shuffles, ballots, mma fragments and cp.async really happen, and
// misuse (divergent barriers, bad masks, missing waits) is an error, not a hang.
// Kernel sources include fk/device.h, never this file.
#pragma once
#ifdef __CUDACC__
#error "host_cuda.h is the host emulation: include fk/device.h"
#endif
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

// ---- language keywords -------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// ---- vector types ------------------------------------------------------------------------
#define HOST_CUDA_VEC(T, N, A2, A4)             \
  struct alignas(A2) N##2 {                     \
    T x, y;                                     \
  };                                            \
  struct N##3 {                                 \
    T x, y, z;                                  \
  };                                            \
  struct alignas(A4) N##4 {                     \
    T x, y, z, w;                               \
  };                                            \
  inline N##2 make_##N##2(T x, T y) {           \
    return {x, y};                              \
  }                                             \
  inline N##3 make_##N##3(T x, T y, T z) {      \
    return {x, y, z};                           \
  }                                             \
  inline N##4 make_##N##4(T x, T y, T z, T w) { \
    return {x, y, z, w};                        \
  }
HOST_CUDA_VEC(float, float, 8, 16)
HOST_CUDA_VEC(int, int, 8, 16)
HOST_CUDA_VEC(unsigned, uint, 8, 16)
HOST_CUDA_VEC(double, double, 16, 16)
#undef HOST_CUDA_VEC
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- runtime interface (host_cuda_rt.cpp, compiled WITHOUT -fsanitize=thread) ------------------
namespace host_cuda {
struct ThreadCtx {            // what a fiber sees; `cur` is swapped at every switch
  uint3 tid, bid;
  dim3 bdim, gdim;
  unsigned linear, lane, warp;
};
extern thread_local ThreadCtx* cur;
struct Loc {
  const char* file;
  int line;
};
struct CollView {
  const uint32_t* slots;
  void* op;
};   // 32 x kSlotWords words
constexpr unsigned kSlotWords = 16;
enum Kind { SYNCWARP, SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, MATCH, REDUCE, MMA, LDMATRIX };

[[noreturn]] void fail(Loc, const char* fmt, ...) __attribute__((format(printf, 2, 3)));
void barrier(int id, int nthreads, Loc);                // nthreads < 0: all that have not exited
int barrier_reduce(int pred, int op, Loc);              // 0 count, 1 and, 2 or
CollView coll_begin(unsigned mask, Kind, const void* in, unsigned bytes, Loc);
void coll_end(CollView);
void* shared_alloc(const void* key, size_t bytes, size_t align, Loc);
void* dyn_shared(Loc);
bool is_shared(const void* p, size_t bytes);
bool is_internal(const void* p);
char* shared_base();
void cp_async(void* dst, const void* src, unsigned bytes, unsigned src_bytes, Loc);
void cp_async_commit();
void cp_async_wait(int keep);
void fence();
void yield();
void launch_raw(const char* name, dim3 g, dim3 b, size_t smem, void (*fn)(void*), void* arg);

struct Options {
  int workers = 0;            // 0: HOST_CUDA_THREADS or the core count
  int sched = 0;              // thread and block order: 0 forward, 1 reverse, 2 random
  uint64_t seed = 1;
  bool async_lazy = true;     // cp.async lands as late as is legal (true) or at once (false)
  bool strict_exit = true;    // a __syncthreads() after some threads have exited is an error
  size_t max_smem = 99 * 1024;  // smallest opt-in limit among the targets (sm_120: 99 KiB)
};
Options& options();
struct Stats {
  uint64_t launches, blocks, switches, barriers, collectives, max_smem;
};
Stats stats(bool reset = false);

template <class... P, class... A>
void launch(const char* name, dim3 g, dim3 b, size_t smem, void (*k)(P...), A&&... a) {
  auto call = [&] { k(static_cast<P>(a)...); };
  launch_raw(name, g, b, smem, [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call);
}
inline bool in_warp(unsigned mask, unsigned lane) {
  return (mask >> lane) & 1u;
}
template <class T>
inline T slot(const CollView& c, unsigned lane) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 4 * kSlotWords, "payload");
  T r;
  memcpy(&r, c.slots + lane * kSlotWords, sizeof(T));
  return r;
}
template <class T>
inline T shfl(unsigned mask, T v, int src, bool in_range, Kind k, Loc loc) {
  CollView c = coll_begin(mask, k, &v, sizeof(T), loc);
  if (in_range && !in_warp(mask, unsigned(src)))
    fail(loc, "shuffle reads lane %d, which is not in the mask 0x%08x", src, mask);
  T r = in_range ? slot<T>(c, unsigned(src)) : v;
  coll_end(c);
  return r;
}
}  // namespace host_cuda

#define threadIdx (::host_cuda::cur->tid)
#define blockIdx (::host_cuda::cur->bid)
#define blockDim (::host_cuda::cur->bdim)
#define gridDim (::host_cuda::cur->gdim)
constexpr int warpSize = 32;
#define HOST_CUDA_LOC const char *f_ = __builtin_FILE(), int l_ = __builtin_LINE()
#define HOST_CUDA_HERE (::host_cuda::Loc{f_, l_})

// ---- barriers and warp collectives --------------------------------------------------------
inline void __syncthreads(HOST_CUDA_LOC) {
  host_cuda::barrier(0, -1, HOST_CUDA_HERE);
}
inline int __syncthreads_count(int p, HOST_CUDA_LOC) {
  return host_cuda::barrier_reduce(p, 0, HOST_CUDA_HERE);
}
inline int __syncthreads_and(int p, HOST_CUDA_LOC) {
  return host_cuda::barrier_reduce(p, 1, HOST_CUDA_HERE);
}
inline int __syncthreads_or(int p, HOST_CUDA_LOC) {
  return host_cuda::barrier_reduce(p, 2, HOST_CUDA_HERE);
}
inline void __syncwarp(unsigned mask = ~0u, HOST_CUDA_LOC) {
  host_cuda::coll_end(host_cuda::coll_begin(mask, host_cuda::SYNCWARP, nullptr, 0, HOST_CUDA_HERE));
}
template <class T>
inline T __shfl_sync(unsigned mask, T v, int src, int width = 32, HOST_CUDA_LOC) {
  int base = int(host_cuda::cur->lane) & ~(width - 1);
  return host_cuda::shfl(mask, v, base + (src & (width - 1)), true, host_cuda::SHFL, HOST_CUDA_HERE);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, HOST_CUDA_LOC) {
  int lane = int(host_cuda::cur->lane), s = lane ^ x;
  return host_cuda::shfl(mask, v, s, (s & ~(width - 1)) <= (lane & ~(width - 1)), host_cuda::SHFL_XOR, HOST_CUDA_HERE);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32, HOST_CUDA_LOC) {
  int lane = int(host_cuda::cur->lane), s = lane + int(d);
  return host_cuda::shfl(mask, v, s, s <= (lane | (width - 1)), host_cuda::SHFL_DOWN, HOST_CUDA_HERE);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32, HOST_CUDA_LOC) {
  int lane = int(host_cuda::cur->lane), s = lane - int(d);
  return host_cuda::shfl(mask, v, s, s >= (lane & ~(width - 1)), host_cuda::SHFL_UP, HOST_CUDA_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int pred, HOST_CUDA_LOC) {
  auto c = host_cuda::coll_begin(mask, host_cuda::BALLOT, &pred, 4, HOST_CUDA_HERE);
  unsigned r = 0;
  for (unsigned i = 0; i < 32; i++)
    if (host_cuda::in_warp(mask, i) && host_cuda::slot<int>(c, i)) r |= 1u << i;
  host_cuda::coll_end(c);
  return r;
}
inline int __any_sync(unsigned mask, int p, HOST_CUDA_LOC) {
  return __ballot_sync(mask, p, f_, l_) != 0;
}
inline int __all_sync(unsigned mask, int p, HOST_CUDA_LOC) {
  return __ballot_sync(mask, p, f_, l_) == mask;
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T v, HOST_CUDA_LOC) {
  auto c = host_cuda::coll_begin(mask, host_cuda::MATCH, &v, sizeof(T), HOST_CUDA_HERE);
  unsigned r = 0;
  for (unsigned i = 0; i < 32; i++)
    if (host_cuda::in_warp(mask, i) && host_cuda::slot<T>(c, i) == v) r |= 1u << i;
  host_cuda::coll_end(c);
  return r;
}
#define HOST_CUDA_REDUCE(NAME, T, EXPR)                                                     \
  inline T NAME(unsigned mask, T v, HOST_CUDA_LOC) {                                        \
    auto c = host_cuda::coll_begin(mask, host_cuda::REDUCE, &v, sizeof(T), HOST_CUDA_HERE); \
    T a{};                                                                                  \
    bool first = true;                                                                      \
    for (unsigned i = 0; i < 32; i++)                                                       \
      if (host_cuda::in_warp(mask, i)) {                                                    \
        T b = host_cuda::slot<T>(c, i);                                                     \
        a = first ? b : (EXPR);                                                             \
        first = false;                                                                      \
      }                                                                                     \
    host_cuda::coll_end(c);                                                                 \
    return a;                                                                               \
  }
HOST_CUDA_REDUCE(__reduce_add_sync, unsigned, a + b)
HOST_CUDA_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
HOST_CUDA_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
HOST_CUDA_REDUCE(__reduce_add_sync, int, a + b)
HOST_CUDA_REDUCE(__reduce_min_sync, int, a < b ? a : b)
HOST_CUDA_REDUCE(__reduce_max_sync, int, a > b ? a : b)
HOST_CUDA_REDUCE(__reduce_or_sync, unsigned, a | b)
#undef HOST_CUDA_REDUCE
unsigned __activemask() = delete;   // never says what one hopes: pass masks explicitly

// ---- memory ---------------------------------------------------------------------------------
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, T v) {
  *p = v;
}
inline void __threadfence() {
  host_cuda::fence();
}
inline void __threadfence_block() {
  host_cuda::fence();
}
inline void __nanosleep(unsigned) {
  host_cuda::yield();
}
template <class T, class F>
inline T host_cuda_rmw(T* p, F f) {   // relaxed, as CUDA's atomics are
  T old, want;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    want = f(old);
  } while (!__atomic_compare_exchange(p, &old, &want, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <class T>
inline T atomicAdd(T* p, typename std::common_type<T>::type v) {
  return host_cuda_rmw(p, [=](T o) { return T(o + v); });
}
template <class T>
inline T atomicSub(T* p, typename std::common_type<T>::type v) {
  return host_cuda_rmw(p, [=](T o) { return T(o - v); });
}
template <class T>
inline T atomicMin(T* p, typename std::common_type<T>::type v) {
  return host_cuda_rmw(p, [=](T o) { return o < v ? o : v; });
}
template <class T>
inline T atomicMax(T* p, typename std::common_type<T>::type v) {
  return host_cuda_rmw(p, [=](T o) { return o > v ? o : v; });
}
template <class T>
inline T atomicAnd(T* p, typename std::common_type<T>::type v) {
  return host_cuda_rmw(p, [=](T o) { return T(o & v); });
}
template <class T>
inline T atomicOr(T* p, typename std::common_type<T>::type v) {
  return host_cuda_rmw(p, [=](T o) { return T(o | v); });
}
template <class T>
inline T atomicXor(T* p, typename std::common_type<T>::type v) {
  return host_cuda_rmw(p, [=](T o) { return T(o ^ v); });
}
template <class T>
inline T atomicExch(T* p, typename std::common_type<T>::type v) {
  return host_cuda_rmw(p, [=](T) { return v; });
}
template <class T>
inline T atomicCAS(T* p, typename std::common_type<T>::type c, typename std::common_type<T>::type v) {
  return host_cuda_rmw(p, [=](T o) { return o == c ? v : o; });
}
inline unsigned atomicInc(unsigned* p, unsigned m) {
  return host_cuda_rmw(p, [=](unsigned o) { return o >= m ? 0u : o + 1; });
}

// ---- intrinsics -------------------------------------------------------------------------------
inline float __int_as_float(int v) {
  float r;
  memcpy(&r, &v, 4);
  return r;
}
inline float __uint_as_float(unsigned v) {
  float r;
  memcpy(&r, &v, 4);
  return r;
}
inline int __float_as_int(float v) {
  int r;
  memcpy(&r, &v, 4);
  return r;
}
inline unsigned __float_as_uint(float v) {
  unsigned r;
  memcpy(&r, &v, 4);
  return r;
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
  return 1.0f / std::sqrt(x);
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __saturatef(float x) {
  return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f;
}
template <class T>
constexpr const T& min(const T& a, const T& b) {
  return b < a ? b : a;
}
template <class T>
constexpr const T& max(const T& a, const T& b) {
  return a < b ? b : a;
}

// The one header that cuda.cu files include: CUDA under nvcc; under a plain C++17 compiler the host emulation, for
// tests, whose host_cuda/device.h has a twin of everything in the first half of this file. Kernels use CUDA's spelling
// for everything but what is wrapped here.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>
// FK_SHARED(float, tile, [32][33]);
#define FK_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
// FK_DYNAMIC_SHARED(float, tile); aligned to 16 bytes
#define FK_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char fk_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(fk_dynamic_shared)
// FK_LAUNCH((kernel<float, 4>), grid, block, shared_bytes, stream, arguments...); then `return launched();`
#define FK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (kernel)<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace fk {
namespace cuda {

// ---- element types, asynchronous copies, matrix units ----
using bf16 = __nv_bfloat16;
using half = __half;
__device__ __forceinline__ float widen(bf16 v) {
  return __bfloat162float(v);
}
__device__ __forceinline__ float widen(half v) {
  return __half2float(v);
}
__device__ __forceinline__ void narrow(bf16& to, float v) {
  to = __float2bfloat16_rn(v);
}
__device__ __forceinline__ void narrow(half& to, float v) {
  to = __float2half_rn(v);
}

// threadIdx.x, read anew: in a loop, what follows from it is computed in every turn and not kept in registers.
__device__ __forceinline__ int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
__device__ __forceinline__ int block_again() {  // the same of blockIdx.x
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}
__device__ __forceinline__ uint32_t half_pair(float first, float second) {  // rounded to nearest, as one word
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

__device__ __forceinline__ unsigned smem_u32(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
// 16-byte asynchronous copy; src_bytes < 16 zero-fills the rest.
__device__ __forceinline__ void cp_async16(void* dst, const void* src, unsigned src_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_u32(dst)), "l"(src), "r"(src_bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void named_barrier(int id, int n) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_u32(row))
               : "memory");
}
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// nvcc takes the assignment of a word that was computed in parts for stores of these parts; this is one store.
__device__ __forceinline__ void store_word(uint4* p, uint4 w) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
}
__device__ __forceinline__ void store_word(uint2* p, uint2 w) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(w.x), "r"(w.y) : "memory");
}

}  // namespace cuda
}  // namespace fk
#else
#include "host_cuda/device.h"
#endif

#include <array>
#include <map>
#include <mutex>
#include <type_traits>

#include "common/dtype.h"

namespace fk {
namespace cuda {

// ---- for launchers: no allocation on the device, no synchronisation, nothing that a graph capture forbids ----
inline int launched() {  // a cudaError_t, of the launches so far on this thread
  return static_cast<int>(cudaGetLastError());
}

// What the runtime says of the current device, or of a kernel on it, asked for once: launches are too short to ask at
// each. `ask(value)` returns a cudaError_t; while it fails, `otherwise` is the answer and it is asked again. Others who
// want the same answer wait for it. Each lambda has memory of its own.
template <class Ask>
int remembered(const void* kernel, int threads, int shared_bytes, int otherwise, Ask ask) {
  static std::mutex lock;
  static std::map<std::array<intptr_t, 4>, int> known;
  int device;
  if (cudaGetDevice(&device) != cudaSuccess) return otherwise;
  std::lock_guard<std::mutex> hold(lock);
  const auto at = known.insert({{device, reinterpret_cast<intptr_t>(kernel), threads, shared_bytes}, 0}).first;
  if (at->second == 0 && (ask(device, at->second) != cudaSuccess || at->second <= 0)) {
    known.erase(at);
    return otherwise;
  }
  return at->second;
}
inline int multiprocessors() {
  return remembered(nullptr, 0, 0, 108, [](int device, int& value) {
    return cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
  });
}
inline int shared_limit() {  // bytes of shared memory that a block may ask for
  return remembered(nullptr, 0, 0, 99 << 10, [](int device, int& value) {
    return cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  });
}
// Needed before a launch with more than 48 KiB of dynamic shared memory. The kernel gets all that the device has for
// it, once: the limit is the kernel's, and one of this launch's own could be lowered by another thread before it.
template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  if (bytes <= (48 << 10)) return;
  const auto* k = reinterpret_cast<const void*>(kernel);
  remembered(k, 0, 0, 0, [k](int, int& most) {
    cudaFuncAttributes a;
    const cudaError_t status = cudaFuncGetAttributes(&a, k);
    if (status != cudaSuccess) return status;
    most = shared_limit() - static_cast<int>(a.sharedSizeBytes);
    return cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  });
}
template <class Kernel>
int resident_blocks(Kernel kernel, int threads, int shared_bytes) {  // that a multiprocessor holds at once
  const auto* k = reinterpret_cast<const void*>(kernel);
  return remembered(k, threads, shared_bytes, 1, [=](int, int& blocks) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, k, threads, static_cast<size_t>(shared_bytes));
  });
}

// ---- element types ----
template <class To, class From>
__device__ __forceinline__ To convert(From v) {  // double to 16 bits goes through float, as torch does
  constexpr bool from_low = sizeof(From) == 2, to_low = sizeof(To) == 2;
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else if constexpr (to_low) {
    To to;
    narrow(to, convert<float>(v));
    return to;
  } else if constexpr (from_low) {
    return static_cast<To>(widen(v));
  } else {
    return static_cast<To>(v);
  }
}

// ---- vector accesses: N neighbours in words of up to 16 bytes; p is a multiple of the word ----
template <int bytes>
using Word =
    std::conditional_t<bytes >= 16, uint4,
                       std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, uint32_t, uint16_t>>>;
template <class T, int N>
__device__ __forceinline__ void load_vector(T (&to)[N], const T* p) {
  using W = Word<int(N * sizeof(T))>;
  constexpr int words = N * sizeof(T) / sizeof(W);
  W w[words];
#pragma unroll
  for (int i = 0; i < words; i++) w[i] = reinterpret_cast<const W*>(p)[i];
  memcpy(to, w, sizeof(to));
}
__device__ __forceinline__ void store_word(uint32_t* p, uint32_t w) {
  *p = w;
}
__device__ __forceinline__ void store_word(uint16_t* p, uint16_t w) {
  *p = w;
}
// To global memory only.
template <class T, int N>
__device__ __forceinline__ void store_vector(T* p, const T (&from)[N]) {
  using W = Word<int(N * sizeof(T))>;
  constexpr int words = N * sizeof(T) / sizeof(W);
  W w[words];
  memcpy(w, from, sizeof(from));
#pragma unroll
  for (int i = 0; i < words; i++) store_word(reinterpret_cast<W*>(p) + i, w[i]);
}

// Elements before the first place where N neighbours of every one of these can be taken as words; -1: there is none.
// Null pointers do not count.
template <int N, class... T>
inline int aligned_head(int64_t n, const T*... p) {
  for (int head = 0; head < N; head++)
    if (((!p || reinterpret_cast<uintptr_t>(p + head) % sizeof(Word<int(N * sizeof(T))>) == 0) && ...))
      return head < n ? head : static_cast<int>(n);
  return -1;
}

// Never contracted with a sum
__device__ __forceinline__ float rounded_product(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ double rounded_product(double a, double b) {
  return __dmul_rn(a, b);
}

// ---- dispatch on element types: f is called with a Type<T> ----
template <class T>
struct Type {
  using type = T;
};
template <class F>
inline int with_low_type(Dtype d, F&& f) {
  return d == Dtype::bf16 ? f(Type<bf16>{}) : f(Type<half>{});
}
template <class F>
inline int with_type(Dtype d, F&& f) {
  return d == Dtype::f64 ? f(Type<double>{}) : d == Dtype::f32 ? f(Type<float>{}) : with_low_type(d, f);
}

}  // namespace cuda
}  // namespace fk

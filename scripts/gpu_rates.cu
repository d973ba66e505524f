// What scripts/gpu_model.py and machine_code/binaries.py take of a GPU, measured on the one at hand; not run on one
// yet.
//
//   nvcc -O3 -std=c++17 -arch=native -o build/gpu_rates scripts/gpu_rates.cu && build/gpu_rates
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

static void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  fprintf(stderr, "gpu_rates: %s\n", cudaGetErrorString(status));
  exit(1);
}
// Seconds of what `f` queues, by events: the median of nine
template <class F>
static double seconds(F f) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> found;
  for (int i = 0; i < 10; i++) {  // the first one is not counted
    check(cudaEventRecord(begin));
    f();
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i) found.push_back(ms * 1e-3f);
  }
  std::sort(found.begin(), found.end());
  return found[found.size() / 2];
}

__global__ void nothing_kernel() {}
__global__ void copy_kernel(const uint4* from, uint4* to, int64_t words) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < words; i += int64_t(gridDim.x) * blockDim.x)
    to[i] = from[i];
}
// Every block reads all words, as often as it is told to, and begins elsewhere.
__global__ void read_kernel(const uint4* from, int words, int times, unsigned* to) {
  constexpr int kTogether = 8;
  unsigned sum = 0;
  for (int i = 0; i < times * words; i += int(blockDim.x) * kTogether) {
    uint4 v[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; k++)
      v[k] = __ldcg(from + (i + (blockIdx.x * kTogether + k) * blockDim.x + threadIdx.x) % words);
#pragma unroll
    for (int k = 0; k < kTogether; k++) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  to[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
__global__ void chase_kernel(const unsigned* next, int steps, long long* clocks, unsigned* to) {
  unsigned at = 0;
  for (int i = 0; i < steps; i++) at = __ldcg(next + at);  // into the cache
  const long long begin = clock64();
  for (int i = 0; i < steps; i++) at = __ldcg(next + at);
  *clocks = clock64() - begin;
  *to = at;
}

enum What { kShared, kShuffle, kProduct, kDouble, kExponential, kBarrier };
__device__ __forceinline__ void product(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
constexpr int kSteps = 1024;
template <What what>
__global__ void latency_kernel(float x, double y, long long* clocks, float* to) {
  __shared__ int next[64];
  next[threadIdx.x % 64] = (threadIdx.x + 1) % 64;
  __syncthreads();
  int at = threadIdx.x % 64;
  float c[4] = {x, x, x, x};
  const uint32_t a[4] = {}, b[2] = {};
  const double d = y;
  const long long begin = clock64();
#pragma unroll 16
  for (int i = 0; i < kSteps; i++) {
    if (what == kShared) at = next[at];
    if (what == kShuffle) at = __shfl_xor_sync(~0u, at, 1);
    if (what == kProduct) product(c, a, b);
    if (what == kDouble) y = y + d;
    if (what == kExponential) x = __expf(x);
    if (what == kBarrier) __syncthreads();
  }
  if (threadIdx.x == 0) *clocks = clock64() - begin;
  to[threadIdx.x] = x + float(y) + c[0] + at;
}
__global__ void products_kernel(float x, int times, float* to) {
  float c[4][4];
  for (int i = 0; i < 16; i++) c[i / 4][i % 4] = x;
  const uint32_t a[4] = {threadIdx.x}, b[2] = {threadIdx.x};
#pragma unroll 4
  for (int i = 0; i < times; i++)
#pragma unroll
    for (int k = 0; k < 4; k++) product(c[k], a, b);
  to[blockIdx.x * blockDim.x + threadIdx.x] = c[0][0] + c[1][1] + c[2][2] + c[3][3];
}

int main() {
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, 0));
  const int sms = p.multiProcessorCount;
  printf("%s, %d multiprocessors\n", p.name, sms);
  const int64_t bytes = int64_t(1) << 30;
  char* memory;
  float* to;
  long long* clocks;
  check(cudaMalloc(&memory, bytes));
  check(cudaMemset(memory, 0, bytes));
  check(cudaMalloc(&to, 16 << 20));
  check(cudaMallocManaged(&clocks, sizeof(*clocks)));
  auto* words = reinterpret_cast<uint4*>(memory);

  const double copied = seconds([&] { copy_kernel<<<sms * 16, 512>>>(words, words + bytes / 32, bytes / 32); });
  printf("copy: %.2f TB/s\n", double(bytes) / copied / 1e12);
  const int of_l2 = 8 << 20, times = 8;
  const double read =
      seconds([&] { read_kernel<<<sms * 4, 512>>>(words, of_l2 / 16, times, reinterpret_cast<unsigned*>(to)); });
  printf("L2, read: %.2f TB/s\n", double(of_l2) * times * sms * 4 / read / 1e12);
  for (int warps : {8, 16, 32}) {
    const int turns = 4000;
    const double took = seconds([&] { products_kernel<<<sms, 32 * warps>>>(0, turns, to); });
    printf("products by %d warps of a multiprocessor: %.0f Tflop/s\n", warps,
           4. * turns * warps * sms * 4096 / took / 1e12);
  }

  auto say = [&](const char* what, double steps) {
    check(cudaDeviceSynchronize());
    printf("%s: %.1f clocks\n", what, double(*clocks) / steps);
  };
  for (auto [what, size] : {std::pair("L2", 4 << 20), std::pair("memory", 512 << 20)}) {
    const int apart = size / (1 << 14) / 4, places = 1 << 14;  // a random way round all of them
    std::vector<unsigned> order(places), next(size_t(places) * apart);
    for (int i = 0; i < places; i++) order[i] = i;
    std::shuffle(order.begin() + 1, order.end(), std::mt19937(1));
    for (int i = 0; i < places; i++) next[size_t(order[i]) * apart] = order[(i + 1) % places] * apart;
    check(cudaMemcpy(memory, next.data(), next.size() * 4, cudaMemcpyHostToDevice));
    const int steps = size > (64 << 20) ? 2000 : places;  // of memory, those timed have not been read before
    chase_kernel<<<1, 1>>>(reinterpret_cast<unsigned*>(memory), steps, clocks, reinterpret_cast<unsigned*>(to));
    say(what, steps);
  }
  auto latency = [&](auto kernel, const char* what, int threads = 32) {
    for (int i = 0; i < 2; i++) kernel<<<1, threads>>>(0.5f, 0.5, clocks, to);
    say(what, kSteps);
  };
  latency(latency_kernel<kShared>, "LDS");
  latency(latency_kernel<kShuffle>, "SHFL");
  latency(latency_kernel<kProduct>, "HMMA");
  latency(latency_kernel<kDouble>, "DADD");
  latency(latency_kernel<kExponential>, "exponential");
  latency(latency_kernel<kBarrier>, "barrier of 256 threads", 256);
  latency(latency_kernel<kBarrier>, "barrier of 1,024 threads", 1024);

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check(cudaStreamCreate(&stream));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < 1000; i++) nothing_kernel<<<sms, 256, 0, stream>>>();
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replay, graph, 0));
  printf("a kernel of a graph: %.2f us\n", seconds([&] {
                                             check(cudaGraphLaunch(replay, stream));
                                             check(cudaStreamSynchronize(stream));
                                           }) * 1e3);
}

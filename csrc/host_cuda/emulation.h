// Runs CUDA kernels on the host, for tests: see docs/host-cuda.md. Each CUDA thread of a block is a fiber with a stack
// of its own, so that barriers, warp collectives and asynchronous copies really wait, and what is undefined on a GPU is
// an error that names the kernel's line. Kernels see host_cuda/device.h, by way of common/cuda.h.
#pragma once
#if !defined(__x86_64__) || !defined(__linux__)
#error "the host emulation of CUDA switches stacks in assembly for x86-64 Linux; kernels are tested there only"
#endif

#include <stddef.h>
#include <stdint.h>

#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace host_cuda {

struct Thread {
  uint3 index, block;
  dim3 block_size, grid_size;
  unsigned number, warp, lane;  // number: within the block
};
// The CUDA thread that runs; null outside of kernels. Initial-exec, since kernels read it all the time.
extern __thread Thread* current __attribute__((tls_model("initial-exec")));

struct Loc {
  const char* file;
  int line;
};
// Ends the launch with an error.
[[noreturn]] void fail(Loc, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Collectives of the block. barrier() is __syncthreads and returns how many threads voted for.
int barrier(bool vote, Loc);
void named_barrier(int id, int threads, Loc);

// Collectives of the lanes in `mask`.
void warp_barrier(unsigned mask, Loc);
void shuffle(unsigned mask, const void* in, void* out, int bytes, int source, Loc);  // source < 0: the lane itself
unsigned ballot(unsigned mask, bool vote, Loc);
void exchange(const void* row, const void* (&rows)[32], Loc);  // everyone's pointer, for ldmatrix
enum class Low { bf16, half };
void mma_m16n8k16(Low, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Loc);
void add_and_cut(const double (*terms)[8], int count, double (&sums)[8]);  // columns, as the matrix unit adds

// Memory. Shared memory is found by the key of its declaration and starts as NaN.
constexpr size_t kSharedLimit = 99 << 10, kSharedUnasked = 48 << 10;  // the first is sm_120's, the least of our targets
void* shared(const void* key, size_t bytes, Loc);
void* dynamic_shared(Loc);
char* shared_space();  // where it begins
bool is_shared(const void* p, size_t bytes);
bool allow_shared(const void* kernel, size_t bytes);  // the limit of its launches from now on, unless that is too much
void cp_async(void* to, const void* from, unsigned bytes, unsigned from_bytes, Loc);  // 4, 8 or 16 bytes
void cp_async_commit();
void cp_async_wait(size_t pending);
void fence();

enum class Order { forward, reverse, random };
struct Options {
  Order order = Order::forward;  // of threads and of blocks
  uint64_t seed = 1;
  bool async_lazy = true;  // cp.async lands as late as it may, rather than at once
  int pause = 0;  // milliseconds after a setter of a kernel's attributes, in which others run
};
Options& options();

std::vector<std::pair<const void*, size_t>>
large_launches();  // since the last call: kernels, bytes over kSharedUnasked

void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_shared, const void* kernel,
            void (*body)(const void* arguments), const void* arguments);

// Set by ptx.cpp: what runs in place of a kernel, given the addresses and sizes of its arguments.
extern void (*launch_instead)(const char* name, dim3 grid, dim3 block, size_t dynamic_shared, const void* kernel,
                              const void* const* arguments, const size_t* sizes, size_t count);

}  // namespace host_cuda

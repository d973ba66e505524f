// The checked build: kernels are compiled with `-fsanitize=thread` for its load/store hooks only,
// and host_cuda_check.cpp supplies those hooks.  No libtsan, no LD_PRELOAD: it loads into plain Python.
#pragma once
#include "host_cuda/emulation.h"
namespace host_cuda {
namespace check {
enum { WRITE = 1, ATOMIC = 2 };
void launch_begin(const char* name, void (*fn)(void*));
std::string launch_end();
void block_begin(uint3 bid, dim3 grid, unsigned n, char* arena, size_t bytes);
void block_end();
void shared_var(char* p, size_t bytes);
void join(const unsigned* who, unsigned n);
void fence();
void access(const void* p, unsigned bytes, int flags, void* pc);
}  // namespace check
}  // namespace host_cuda
// C interface for tests: what a kernel may touch, and what it did.
extern "C" {
void host_cuda_buffer(void* p, size_t bytes, unsigned elem, int initialised, const char* name);
void host_cuda_clear();
size_t host_cuda_unwritten(void* p);           // elements of that buffer never written since registration
const char* host_cuda_report();                // memory-access table of the last launch
}

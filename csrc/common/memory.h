// Scratch memory for kernels, aligned to a cache line, and what the caches hold.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fk {

void* allocate(size_t bytes);  // throws std::bad_alloc
void release(void*);

// Asks the system to back fresh memory with large pages. Without it, writing a large tensor for the first time costs
// more in page faults, 4 KiB each, than in bandwidth. A hint: nothing happens where it is not understood.
void advise_large_pages(void* p, size_t bytes);

int64_t level2_bytes();  // of one core's second-level cache; 1 MiB where the system does not say
int64_t level3_bytes();  // of the cache that cores share; 8 MiB where the system does not say

// Whether a thread that writes this many bytes does better past the caches (simd.h: stream).
bool past_caches(int64_t bytes);

}  // namespace fk

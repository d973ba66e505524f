// Scratch memory for kernels, aligned to a cache line, and what the caches hold.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fk {

void* allocate(size_t bytes);  // throws std::bad_alloc
void release(void*);

int64_t level2_bytes();  // of one core's second-level cache; 1 MiB where the system does not say

// Whether a thread that writes this many bytes does better past the caches (simd.h: stream).
bool past_caches(int64_t bytes);

}  // namespace fk

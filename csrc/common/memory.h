// Scratch memory for kernels, aligned to a cache line.
#pragma once

#include <stddef.h>

namespace fk {

void* allocate(size_t bytes);  // throws std::bad_alloc
void release(void*);

}  // namespace fk

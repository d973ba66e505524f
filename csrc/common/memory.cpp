#include "common/memory.h"

#include <cstdlib>
#include <new>

namespace fk {

void* allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
  if (!p) throw std::bad_alloc();
  return p;
}

void release(void* p) {
  std::free(p);
}

}  // namespace fk

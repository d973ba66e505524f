#include "common/memory.h"

#include <sys/mman.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <initializer_list>
#include <new>

namespace fk {
namespace {

// From CPUID where there is one: on AMD, sysconf adds up the third-level caches of all cores. 0: unknown.
int64_t cache_bytes(unsigned level, int name) {
#if defined(__x86_64__)
  for (unsigned leaf : {4u, 0x8000001du})  // Intel's, AMD's
    for (unsigned i = 0, a, b, c, d; __get_cpuid_count(leaf, i, &a, &b, &c, &d) && (a & 31); i++)
      if ((a & 31) != 2 && (a >> 5 & 7) == level)  // not of instructions
        return ((b >> 22) + 1LL) * ((b >> 12 & 1023) + 1) * ((b & 4095) + 1) * (c + 1LL);
#else
  (void)level;
#endif
  return sysconf(name);
}

}  // namespace

void* allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
  if (!p) throw std::bad_alloc();
  return p;
}

void release(void* p) {
  std::free(p);
}

void advise_large_pages(void* p, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = (uintptr_t(p) + page - 1) / page * page,
                  end = (uintptr_t(p) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

int64_t level2_bytes() {
  static const int64_t bytes = cache_bytes(2, _SC_LEVEL2_CACHE_SIZE);
  return bytes > 0 ? bytes : int64_t(1) << 20;
}

int64_t level3_bytes() {
  static const int64_t bytes = cache_bytes(3, _SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? bytes : int64_t(8) << 20;
}

bool past_caches(int64_t bytes) {
  return bytes >= level2_bytes() / 2;
}

}  // namespace fk

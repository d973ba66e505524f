#include "common/isa.h"

#if defined(FK_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fk {
namespace {

// The processor has the matrix unit for bfloat16, and the system lets this process use its registers.
[[maybe_unused]] bool has_amx() {
#if defined(FK_AMX)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // Linux: ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, -TILE
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;                     // AVX512-BF16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return has_amx() ? Isa::amx : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa top = best();
  const char* name = std::getenv("FLOWKERNELS_ISA");
  if (!name || !*name) return top;
  for (Isa i : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (std::strcmp(name, isa_name(i))) continue;
    if (i > top)
      throw std::runtime_error(std::string("FLOWKERNELS_ISA=") + name + ": this processor or build has at most " +
                               isa_name(top));
    return i;
  }
  throw std::runtime_error(std::string("FLOWKERNELS_ISA: expected baseline, avx2, avx512 or amx, got '") + name + "'");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa i) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "amx"};
  return names[int(i)];
}

}  // namespace fk

#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fk {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa top = best();
  const char* name = std::getenv("FLOWKERNELS_ISA");
  if (!name || !*name) return top;
  for (Isa i : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(name, isa_name(i))) continue;
    if (i > top)
      throw std::runtime_error(std::string("FLOWKERNELS_ISA=") + name + ": this processor or build has at most " +
                               isa_name(top));
    return i;
  }
  throw std::runtime_error(std::string("FLOWKERNELS_ISA: expected baseline, avx2 or avx512, got '") + name + "'");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa i) {
  return i == Isa::avx512 ? "avx512" : i == Isa::avx2 ? "avx2" : "baseline";
}

}  // namespace fk

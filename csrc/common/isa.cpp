#include "common/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace fk {
namespace {

#if defined(__x86_64__)
// From CPUID itself: which names __builtin_cpu_supports knows depends on the compiler ("f16c" is clang's from 18 on).
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Cpuid(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

bool has(unsigned word, std::initializer_list<int> bits) {
  for (int bit : bits)
    if (!(word >> bit & 1)) return false;
  return true;
}

// The registers that the system saves for this process.
unsigned saved() {
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

[[maybe_unused]] bool has_bf16() {  // AVX512-BF16
  return has(Cpuid(7, 1).a, {5});
}

// The processor has the matrix unit for bfloat16, and the system lets this process use its registers.
[[maybe_unused]] bool has_amx(unsigned registers) {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // Linux: ARCH_REQ_XCOMP_PERM
  return has(registers, {17, 18}) && has(Cpuid(7, 0).d, {22, 24}) &&  // AMX-BF16, -TILE
         has_bf16() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa best() {
#if defined(__x86_64__)
  if (!has(Cpuid(1, 0).c, {12, 27, 28, 29})) return Isa::baseline;  // FMA, OSXSAVE, AVX, F16C
  const unsigned registers = saved(), extended = Cpuid(7, 0).b;
  if (!has(registers, {1, 2}) || !has(extended, {5})) return Isa::baseline;                           // AVX2
  if (!has(registers, {5, 6, 7}) || !has(extended, {16, 17, 30, 31})) return Isa::avx2;  // AVX512F, -DQ, -BW, -VL
#if defined(FK_AMX)
  if (has_amx(registers)) return Isa::amx;
#endif
#if defined(FK_BF16)
  if (has_bf16()) return Isa::avx512_bf16;
#endif
  return Isa::avx512;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa top = best();
  const char* name = std::getenv("FLOWKERNELS_ISA");
  if (!name || !*name) return top;
#if defined(FK_EMULATED_BF16)
  if (!std::strcmp(name, isa_name(Isa::emulated_bf16))) return Isa::emulated_bf16;
#endif
  for (Isa i : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    if (std::strcmp(name, isa_name(i))) continue;
    if (i > top)
      throw std::runtime_error(std::string("FLOWKERNELS_ISA=") + name + ": this processor or build has at most " +
                               isa_name(top));
    return i;
  }
  throw std::runtime_error(std::string("FLOWKERNELS_ISA: expected baseline, avx2, avx512, avx512_bf16 or amx, got '") +
                           name + "'");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa i) {
  constexpr const char* names[] = {"emulated_bf16", "baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  return names[int(i) + 1];
}

}  // namespace fk

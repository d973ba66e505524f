// Instruction sets: every <op>/cpu.cpp is compiled once for each, in a namespace of that name, and chosen at run time.
#pragma once

namespace fk {

enum class Isa { baseline, avx2, avx512 };

// The best set that this processor has; FLOWKERNELS_ISA=baseline|avx2|avx512 asks for a lower one.
// Throws std::runtime_error for a name that is unknown or a set that the processor lacks.
Isa isa();
const char* isa_name(Isa);

}  // namespace fk

// Declares `fn`, a function of type `type`, for every instruction set that this build has.
#if defined(__x86_64__)
#define FK_DECLARE(type, fn) \
  namespace baseline {       \
  type fn;                   \
  }                          \
  namespace avx2 {           \
  type fn;                   \
  }                          \
  namespace avx512 {         \
  type fn;                   \
  }
#define FK_SELECT(fn)                                  \
  (::fk::isa() == ::fk::Isa::avx512 ? ::fk::avx512::fn \
   : ::fk::isa() == ::fk::Isa::avx2 ? ::fk::avx2::fn   \
                                    : ::fk::baseline::fn)
#else
#define FK_DECLARE(type, fn) \
  namespace baseline {       \
  type fn;                   \
  }
#define FK_SELECT(fn) (::fk::baseline::fn)
#endif

// Instruction sets: every <op>/cpu.cpp is compiled once for each, in a namespace of that name, and chosen at run time.
#pragma once

namespace fk {

enum class Isa { baseline, avx2, avx512, amx };

// The best set that this processor and build have; FLOWKERNELS_ISA=baseline|avx2|avx512|amx asks for a lower one.
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
  (::fk::isa() >= ::fk::Isa::avx512 ? ::fk::avx512::fn \
   : ::fk::isa() == ::fk::Isa::avx2 ? ::fk::avx2::fn   \
                                    : ::fk::baseline::fn)
#else
#define FK_DECLARE(type, fn) \
  namespace baseline {       \
  type fn;                   \
  }
#define FK_SELECT(fn) (::fk::baseline::fn)
#endif

// The same for an op that has an amx.cpp: the matrix unit on top of avx512.
#if defined(FK_AMX)
#define FK_DECLARE_AMX(type, fn) \
  FK_DECLARE(type, fn)           \
  namespace amx {                \
  type fn;                       \
  }
#define FK_SELECT_AMX(fn) (::fk::isa() == ::fk::Isa::amx ? ::fk::amx::fn : FK_SELECT(fn))
#else
#define FK_DECLARE_AMX(type, fn) FK_DECLARE(type, fn)
#define FK_SELECT_AMX(fn) FK_SELECT(fn)
#endif

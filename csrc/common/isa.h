// Instruction sets: every <op>/cpu.cpp is compiled once for each, in a namespace of that name, and chosen at run time.
#pragma once

namespace fk {

// emulated_bf16 is of test_kernels alone: baseline, with the avx512_bf16.cpp of ops on plain C++ that does what these
// instructions do (common/bf16_pairs.h), so that every processor runs that code. No other binary has it.
enum class Isa { emulated_bf16 = -1, baseline, avx2, avx512, avx512_bf16, amx };

// The best set that this processor and build have; FLOWKERNELS_ISA=baseline|avx2|avx512|avx512_bf16|amx asks for a
// lower one. Throws std::runtime_error for a name that is unknown or a set that the processor lacks.
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

// The same for an op that has more than a cpu.cpp: an avx512_bf16.cpp, products of pairs of bfloat16 on top of avx512,
// or an amx.cpp, the matrix unit on top of that. FK_SELECT_BF16_AMX is for an op that has both.
#if defined(FK_EMULATED_BF16)
#define FK_DECLARE_EMULATED(type, fn) \
  namespace emulated_bf16 {           \
  type fn;                            \
  }
#define FK_IN_EMULATED(fn, otherwise) (::fk::isa() == ::fk::Isa::emulated_bf16 ? ::fk::emulated_bf16::fn : otherwise)
#else
#define FK_DECLARE_EMULATED(type, fn)
#define FK_IN_EMULATED(fn, otherwise) otherwise
#endif

#if defined(FK_BF16)
#define FK_DECLARE_BF16(type, fn) \
  FK_DECLARE_EMULATED(type, fn)   \
  namespace avx512_bf16 {         \
  type fn;                        \
  }
#define FK_IN_BF16(fn, otherwise) \
  FK_IN_EMULATED(fn, (::fk::isa() >= ::fk::Isa::avx512_bf16 ? ::fk::avx512_bf16::fn : otherwise))
#else
#define FK_DECLARE_BF16(type, fn) FK_DECLARE_EMULATED(type, fn)
#define FK_IN_BF16(fn, otherwise) FK_IN_EMULATED(fn, otherwise)
#endif
#define FK_SELECT_BF16(fn) FK_IN_BF16(fn, FK_SELECT(fn))

#if defined(FK_AMX)
#define FK_DECLARE_AMX(type, fn) \
  namespace amx {                \
  type fn;                       \
  }
#define FK_IN_AMX(fn, otherwise) (::fk::isa() == ::fk::Isa::amx ? ::fk::amx::fn : otherwise)
#else
#define FK_DECLARE_AMX(type, fn)
#define FK_IN_AMX(fn, otherwise) otherwise
#endif
#define FK_SELECT_AMX(fn) FK_IN_AMX(fn, FK_SELECT(fn))
#define FK_SELECT_BF16_AMX(fn) FK_IN_AMX(fn, FK_SELECT_BF16(fn))

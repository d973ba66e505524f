// Sizes of tiles: what the kernels that multiply share. Only for <op>/cpu.cpp and its like, as common/simd.h.
#pragma once

#include "common/simd.h"

namespace fk {
namespace FK_ISA {

// Dot products that are summed at once in registers: of kRows rows with kCols others.
constexpr int kRows = 4;
#if defined(__AVX512F__) || defined(FK_EMULATED_BF16)
constexpr int kCols = 6;  // 24 accumulators + 6 + 1 of 32 registers
#elif defined(__AVX2__)
constexpr int kCols = 3;  // 12 accumulators + 3 + 1 of 16 registers
#else
constexpr int kCols = 2;  // 8 accumulators + 2 + 1 + a product of 16 registers
#endif

FK_INLINE int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}
FK_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
FK_INLINE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

}  // namespace FK_ISA
}  // namespace fk

// What this machine can do at most, for the benchmarks to compare with: fused multiply-adds, and bytes from memory.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace fk {

// Multiply-adds in float32 from registers, on each of `threads` threads; returns how many operations that were, two for
// each multiply-add and lane. `sink` takes a sum that nothing needs.
using multiply_adds_fn = double(int64_t rounds, int threads, float* sink);

// out = a + s b over n elements, stored past the caches (the STREAM triad): moves 12 n bytes
using triad_fn = void(const float* a,  // [n]
                      const float* b,  // [n]
                      float s,
                      float* out,  // [n], aligned to 64 bytes
                      int64_t n, int threads);

// Reads n floats `rounds` times, each thread the same part of them every time, and does nothing else.
using read_again_fn = void(const float* a,  // [n]
                           int64_t n, int64_t rounds, int threads, float* sink);

FK_DECLARE(multiply_adds_fn, multiply_adds)
FK_DECLARE(triad_fn, triad)
FK_DECLARE(read_again_fn, read_again)

}  // namespace fk

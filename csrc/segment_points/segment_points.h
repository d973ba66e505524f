// Points on the segments of trajectories: out_b = x_a + u_b (x_b - x_a), with x_a, x_b gathered from a bank by index.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace fk {

struct SegmentPointsArgs {
  const void* bank;         // [knots, samples, D] states, f32 or f64
  const int64_t* interval;  // [B], 0 .. knots - 2
  const int64_t* sample;    // [B], 0 .. samples - 1
  const void* u;            // [B], or null: x_a itself; f64, on a GPU of the bank's type
  void* out;                // [B, D]
  Dtype bank_type, out_type;  // out: the bank's type, bf16 or f16
  int64_t knots, samples, B, D;
  int threads;
};

// Returns the first b whose interval or sample is out of range, and nothing is written then; else -1.
using segment_points_fn = int64_t(const SegmentPointsArgs&);
FK_DECLARE(segment_points_fn, segment_points)
namespace cuda {
// Nothing is returned of places out of range: their points are NaN.
int segment_points(const SegmentPointsArgs&, void* stream);
}  // namespace cuda

}  // namespace fk

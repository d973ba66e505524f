// out = scale x + sum_i b_i v_i, in one pass, and a copy of out in low precision for the next model call.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace fk {

struct LinearUpdateArgs {
  const void* x;         // [n] state, f32 or f64
  const void* const* v;  // [terms] of [n]: f32, bf16 or f16 with an f32 state, f64 with an f64 state
  const double* b;       // [terms] coefficients
  int64_t terms;         // >= 1
  double scale;          // of x, whose product is rounded before it is added to
  void* out;             // [n] of x's type; may be x itself
  void* low;             // [n] second output, or null
  Dtype x_type, v_type, low_type;  // low: bf16, f16
  int64_t n;
  int threads;
};

using linear_update_fn = void(const LinearUpdateArgs&);
FK_DECLARE(linear_update_fn, linear_update)
namespace cuda {
int linear_update(const LinearUpdateArgs&, void* stream);
}

}  // namespace fk

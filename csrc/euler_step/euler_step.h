// out = x + h (v_uncond + w (v - v_uncond)), and a copy of out in low precision for the next model call.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace fk {

struct EulerStepArgs {
  const void* x;         // [n] state, f32 or f64
  const void* v;         // [n] velocity, f32, bf16 or f16 with an f32 state, f64 with an f64 state
  const void* v_uncond;  // [n] of v's type, or null: no guidance
  void* out;             // [n] of x's type; may be x itself
  void* low;             // [n] second output, or null
  Dtype x_type, v_type, low_type;  // low: bf16, f16
  int64_t n;
  double h;         // step size
  double guidance;  // w
  int threads;
};

using euler_step_fn = void(const EulerStepArgs&);
FK_DECLARE(euler_step_fn, euler_step)
namespace cuda {
int euler_step(const EulerStepArgs&, void* stream);
}

}  // namespace fk

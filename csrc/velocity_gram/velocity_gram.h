// Gram matrix of velocity increments; see flowkernels/ops/velocity_gram/__init__.py for the mathematics.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace fk {

struct VelocityGramArgs {
  const void* v;         // [K, M], rows v_stride elements apart
  Dtype v_type;          // f32, f64, bf16, f16
  int64_t K;             // velocities, >= 1
  int64_t M;             // elements of a velocity: samples * features
  int64_t v_stride;      //
  const void* x;         // [K+1, M] states, f64 if v is and else f32; null for an Euler teacher
  int64_t x_stride;      //
  const double* times;   // [K+1], with x
  double* gram;          // [R, R] out, R = K-1, or 2K-1 with x: rows a_1..a_{K-1}, then e_0..e_{K-1}
  int threads;           // parts of the fixed-order reduction; not of CUDA
  void* workspace = nullptr;  // of CUDA, velocity_gram_workspace bytes
};

using velocity_gram_fn = void(const VelocityGramArgs&);
FK_DECLARE(velocity_gram_fn, velocity_gram)
FK_DECLARE_AMX(velocity_gram_fn, velocity_gram)

namespace cuda {
// gram and workspace on the device, times on the host
int velocity_gram(const VelocityGramArgs& g, void* stream);
int64_t velocity_gram_workspace(const VelocityGramArgs& g);  // bytes; looks at what the pointers are, not at memory
}  // namespace cuda

}  // namespace fk

// Straightening loss and its gradient: e_b = v_b - (x_b - x_a) / h, with x_a, x_b gathered from a bank by index.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace fk {

struct StraightenLossArgs {
  const void* v;             // [B, D] velocities: f32, bf16 or f16 with an f32 bank, f64 with an f64 bank
  const void* bank;          // [knots, samples, D] states, f32 or f64
  const void* step_sizes;    // [knots - 1], f64; this, the weights and the losses are of the bank's type on a GPU
  const int64_t* interval;   // [B], 0 .. knots - 2
  const int64_t* sample;     // [B], 0 .. samples - 1
  const void* weight;        // [B], f64: factors on the samples' losses, or null: all 1
  double huber_c;            // > 0: sqrt(|e|^2 / D + c^2) - c; 0: |e|^2 / D
  Dtype v_type, bank_type;
  int64_t knots, samples, B, D;
  void* loss;          // [1] out, f64: mean over b of weight * loss
  void* per_sample;    // [B] out, f64, unweighted
  void* per_interval;  // [knots - 1] out, f64: mean of the samples' losses, NaN where there are none
  void* gradient;      // [B, D] out, of v's type: of loss with respect to v; or null
  int threads;
  void* partial = nullptr;  // on a GPU: room for cuda::straighten_loss_partials(...) sums
};

// Returns the first b whose interval or sample is out of range, and nothing is written then; else -1.
using straighten_loss_fn = int64_t(const StraightenLossArgs&);
FK_DECLARE(straighten_loss_fn, straighten_loss)
namespace cuda {
int64_t straighten_loss_partials(int64_t B, int64_t D, int64_t knots);
// Nothing is returned of places out of range: their losses and gradients are NaN, and so is the loss.
int straighten_loss(const StraightenLossArgs&, void* stream);

struct StraightenLossScaleArgs {
  void* gradient;      // [n] in, out
  const void* factor;  // [1], of the bank's type, read by the device; 1 moves nothing
  Dtype v_type, bank_type;
  int64_t n;
};
int straighten_loss_scale(const StraightenLossScaleArgs&, void* stream);
}  // namespace cuda

}  // namespace fk

// out = x_scale x + h v + sum_i b_i v_i with v = place(f(z) W^T + bias), the last layer of a velocity network and the
// step after it, and a copy of out in low precision for the next model call. f: LayerNorm, then scale and shift, where
// wanted.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace fk {

// Rows whose elements lie side by side; p is null where there is none.
struct Rows {
  const void* p;
  Dtype type;
  int64_t stride;  // elements from one row to the next; 0: one row for all
};

// m = n samples, or 2 n with guidance: the conditional ones first. With an f64 state everything but `low` is f64.
struct LinearEulerArgs {
  const void* x;                // [n, T * outputs] state, or [n, C, H, W] with patches; f32 or f64
  Rows z;                       // [m, T, d] tokens, a row a sample: f32, bf16 or f16
  int64_t z_token;              // elements from one token to the next
  Rows weight;                  // [outputs, d] of z's type or the state's
  Rows bias;                    // [outputs]; null: 0
  Rows norm_weight, norm_bias;  // [d]; null: 1, 0
  Rows scale, shift;            // [m, d] of one type, z's or the state's: f (1 + scale) + shift; null: 0
  const void* const* history;   // [terms] of x's shape: earlier velocities
  const double* b;              // [terms] their coefficients
  int64_t terms;
  void* out;       // of x's shape and type; may be x itself
  void* low;       // of x's shape, or null
  void* velocity;  // of x's shape, or null: v; may be one of `history`
  Dtype x_type, history_type, low_type, velocity_type;
  int64_t n, T, d, outputs;
  int64_t patch;          // p; 0: the tokens' outputs lie as the state does
  int64_t C, H, W;        // of the state, with patches: T = (H / p) (W / p), outputs >= p p C
  bool channels_first;    // a token's outputs are [c, p, q], else [p, q, c]
  bool normed, guided;
  double eps;       // of LayerNorm
  double h;         // step size
  double guidance;  // w: v = v_u + w (v_c - v_u)
  double x_scale;   // of x, whose product is rounded before it is added to
  int threads;
  void* workspace = nullptr;  // on a GPU: linear_euler_workspace bytes, or null
};

using linear_euler_fn = void(const LinearEulerArgs&);
FK_DECLARE(linear_euler_fn, linear_euler)
FK_DECLARE_BF16(linear_euler_fn, linear_euler)
namespace cuda {
// weight, norm_weight, norm_bias, scale and shift are of one type. Unless that is float64, a row starts at a multiple
// of the size of four entries, and d is a multiple of 4 or there are zeros behind the row up to one.
int linear_euler(const LinearEulerArgs&, void* stream);
int64_t linear_euler_workspace(const LinearEulerArgs&);  // bytes; looks at sizes and types alone
}  // namespace cuda

}  // namespace fk

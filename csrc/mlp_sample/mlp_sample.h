// Whole samplers in one call: the velocity network and all Euler steps, x <- x + h_s v(x, t_s), s = 0..steps-1, or all
// updates of a solver, which add velocities of earlier evaluations as well.
//
// The network is a list of layers over the values of one sample, which lie side by side in a row of scratch memory.
// What depends on time or on conditioning alone comes as tables. Every field has 8 bytes: Python writes these structs
// (flowkernels/ops/mlp_sample/__init__.py).
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace fk {

enum class MlpMap : int64_t { identity, linear, layer_norm, rms_norm };  // norms last
enum class MlpCombine : int64_t { none, add, multiply, maximum, minimum };
enum class Activation : int64_t {
  none,
  relu,
  leaky_relu,
  silu,
  gelu,
  gelu_tanh,
  elu,
  tanh,
  sigmoid,
  mish,
  softplus,
  at_least,
  at_most
};

// out = other (+, *, max or min) gain * activation(scale * map(in) + shift + shift_each); max and min keep NaN
struct MlpLayer {
  MlpMap map;
  int64_t in, in_width;     // place in the row and length, in floats; whole vectors are read
  int64_t out, out_width;   // whole vectors are written, up to the next multiple of 16 floats
  const void* weight;       // of linear: as mlp_pack wrote it
  double eps;               // of layer_norm and rms_norm
  int64_t scale;            // a table, or -1
  int64_t shift;            // a table, or -1
  int64_t shift_each;       // another, or -1: a sum of one row a step and one row a sample needs no table of both
  Activation activation;
  double alpha;  // slope of leaky_relu below zero, what elu tends to there, or the bound of at_least and at_most
  double gain;
  MlpCombine combine;
  int64_t other;  // place in the row
};

// The row of step s and sample i is at data + s * step_stride + i * sample_stride.
struct MlpTable {
  const float* data;
  int64_t step_stride, sample_stride;
};

// What follows an evaluation: x <- scale * (x_0 or x) + its terms, one after another.
struct MlpUpdate {
  int64_t from_start;  // 1: from x_0
  int64_t terms;
  int64_t kept;  // where a later update finds this evaluation's velocity, or -1
};
struct MlpTerm {
  int64_t place;  // of an earlier velocity, or -1: this evaluation's
  double factor;
};

// What stays the same from call to call, so that a caller writes it once.
struct MlpPrepared {
  int64_t D, steps;
  const double* h;  // [steps], or null: there are updates
  const MlpLayer* layers;  // [layer_count]
  int64_t layer_count;
  int64_t row;  // floats of scratch a sample; the state is at 0
  int64_t velocity;  // place in the row
  const MlpTable* tables;  // as the layers count them
  const MlpTable* tables_uncond;  // of the unconditional velocity, or null
  double guidance;  // v = v_uncond + guidance (v - v_uncond)
  int64_t low;  // 1: weights are bf16, and the inputs of linear layers are rounded to it as well
  const MlpUpdate* updates;  // [steps], or null: Euler steps
  const MlpTerm* terms;  // of all updates
  int64_t places;  // for velocities that are kept
  const double* scales;  // [steps], of updates, or null: all are 1
};

struct MlpSampleArgs : MlpPrepared {
  const float* x;  // [n, D]
  float* out;  // [n, D], may be x
  int64_t n;
  float* states;  // [steps + 1, n, D] or null
  float* velocities;  // [steps, n, D] or null
  int threads;
};

// The first sample whose result is not finite, or -1.
typedef int64_t MlpSample(const MlpSampleArgs&);
FK_DECLARE(MlpSample, mlp_sample)
FK_DECLARE_BF16(MlpSample, mlp_sample)
FK_DECLARE_AMX(MlpSample, mlp_sample)

// Weights as the kernel reads them. The size does not depend on the values.
struct MlpPackArgs {
  const float* weight;  // [out, in]
  int64_t out, in;
  Dtype type;  // f32 or bf16, to nearest
  void* packed;  // on a cache line, or null to ask for the size alone
};
typedef int64_t MlpPack(const MlpPackArgs&);  // bytes
FK_DECLARE(MlpPack, mlp_pack)
FK_DECLARE_BF16(MlpPack, mlp_pack)
FK_DECLARE_AMX(MlpPack, mlp_pack)

// On a GPU MlpPrepared, its layers, tables, step sizes and updates lie in host memory, what they point at in device
// memory, and weights are as flowkernels/ops/mlp_sample/__init__.py packs them for it. Of all that mlp_program makes
// the list that the kernel reads, and mlp_upload brings it to the device, once for many calls.
namespace cuda {
int64_t mlp_program(const MlpPrepared&, void* to);  // bytes, a multiple of 16; null to ask for them alone
struct MlpUploadArgs {
  const void* from;
  int64_t bytes;
  void* to;
};
int mlp_upload(const MlpUploadArgs&, void* stream);
struct MlpLaunchArgs : MlpSampleArgs {
  const void* program;
  void* scratch;
};
int64_t mlp_scratch(
    const MlpSampleArgs&);  // bytes of device memory: for rows too long for shared memory, kept velocities
int mlp_sample(const MlpLaunchArgs&, void* stream);
}  // namespace cuda

}  // namespace fk

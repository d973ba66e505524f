// Products of linear layers by multiply-adds in float32.
#include "mlp_sample/panels.h"

namespace fk {
namespace FK_ISA {
namespace {

struct Floats {
  typedef float Weight, Packed, Input;
  typedef vf Held;
  static constexpr int kDepth = 1, kParts = 1;

  FK_INLINE vf weight(const Weight* w, int) { return load(w); }
  FK_INLINE vf input(const Input* x) { return splat(*x); }
  FK_INLINE vf add(vf sum, vf input, vf weight) { return sum + input * weight; }
  static int64_t input_pitch(int64_t) {
    return 0;  // they are taken where they are
  }
  static void prepare(const float*, int64_t, Input*) {}
};

// Weights and inputs rounded to bfloat16: products of two are exact in float32. The weights of two inputs share a word.
struct Rounded : Floats {
  typedef uint32_t Weight;
  typedef bf16 Packed;
  typedef Floats Wide;
  static constexpr int kDepth = 2, kParts = 2;

  FK_INLINE vf weight(const Weight* w, int part) {
    vu both;
    memcpy(&both, w, sizeof(both));
    return as_float(part ? both & 0xffff0000u : both << 16);
  }
  static int64_t input_pitch(int64_t in) { return round_up(in, kPlace); }
  static void prepare(const float* in, int64_t n, Input* to) {
    for (int64_t k = 0; k < n; k += kFloats) {
      bf16 rounded[kFloats];
      store(rounded, load(in + k));
      store(to + k, load(rounded));
    }
    if (n % kDepth) to[n] = 0;  // its weight is zero; what lies there may be no number
  }
};

}  // namespace

int64_t mlp_sample(const MlpSampleArgs& a) {
  return a.low ? run_sampler<Panels<Rounded>>(a) : run_sampler<Panels<Floats>>(a);
}

int64_t mlp_pack(const MlpPackArgs& a) {
  return a.type == Dtype::bf16 ? Panels<Rounded>::pack(a) : Panels<Floats>::pack(a);
}

}  // namespace FK_ISA
}  // namespace fk

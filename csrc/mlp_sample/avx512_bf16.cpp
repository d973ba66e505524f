// Products of linear layers in pairs of bfloat16, summed in float32: twice as many to an instruction as cpu.cpp's.
// Inputs are rounded as there, but subnormal ones are zero, as in amx.cpp.
#include "common/bf16_pairs.h"
#include "mlp_sample/panels.h"

namespace fk {
namespace FK_ISA {
namespace {

struct Pairs {
  typedef uint32_t Weight, Input;
  typedef bf16 Packed;
  typedef bf16_pairs Held;
  static constexpr int kDepth = 2, kParts = 1;

  FK_INLINE bf16_pairs weight(const Weight* w, int) { return load_pairs(w); }
  FK_INLINE bf16_pairs input(const Input* x) { return splat_pair(x); }
  FK_INLINE vf add(vf sum, bf16_pairs input, bf16_pairs weight) { return add_products(sum, input, weight); }
  static int64_t input_pitch(int64_t in) { return round_up(in, 2 * kFloats) / 2; }
  static void prepare(const float* in, int64_t n, Input* to) {
    const int64_t whole = n / (2 * kFloats) * (2 * kFloats);
    for (int64_t k = 0; k < whole; k += 2 * kFloats)
      store_pairs(to + k / 2, round_to_pairs(load(in + k), load(in + k + kFloats)));
    if (whole == n) return;
    float rest[2 * kFloats] = {};
    memcpy(rest, in + whole, size_t(n - whole) * sizeof(float));
    store_pairs(to + whole / 2, round_to_pairs(load(rest), load(rest + kFloats)));
  }
};

}  // namespace

int64_t mlp_sample(const MlpSampleArgs& a) {
  return a.low ? run_sampler<Panels<Pairs>>(a) : below::mlp_sample(a);
}

int64_t mlp_pack(const MlpPackArgs& a) {
  return a.type == Dtype::bf16 ? Panels<Pairs>::pack(a) : below::mlp_pack(a);
}

}  // namespace FK_ISA
}  // namespace fk

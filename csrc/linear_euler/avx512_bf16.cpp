// Products of plain heads, of bfloat16 tokens and weights, in pairs of them where they lie. Features that are
// normalised or modulated are not rounded, and in two parts of bfloat16 they take as many instructions as float32:
// cpu.cpp's. Subnormal tokens and weights are zero.
#include "common/bf16_pairs.h"
#include "linear_euler/run.h"

namespace fk {
namespace FK_ISA {
namespace {

struct Pairs {
  typedef Pairs Product;
  typedef float State;
  typedef bf16 Z, Element;
  typedef bf16_pairs Held;
  static constexpr Dtype kType = Dtype::bf16;
  static constexpr int kLanes = 2 * kFloats;

  FK_INLINE bf16_pairs held(const bf16* p) { return load_pairs(p); }
  FK_INLINE vf add(vf sum, bf16_pairs a, bf16_pairs b) { return add_products(sum, a, b); }
  static void prepare(const LinearEulerArgs& a, const Shared<Pairs>&, const Token<bf16>* token, bf16* tile, int64_t ld,
                      Modulation<float>&) {
    for (int r = 0; r < kRows; r++) widen(token[r].z, kType, 0, a.d, tile + r * ld);
  }
};

}  // namespace

void linear_euler(const LinearEulerArgs& a) {
  const bool pairs = is_plain(a) && a.z.type == Dtype::bf16 && a.weight.type == Dtype::bf16;
  pairs ? run<Pairs>(a) : below::linear_euler(a);
}

}  // namespace FK_ISA
}  // namespace fk

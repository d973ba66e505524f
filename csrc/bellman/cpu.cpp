// The inner loop runs along k, so that a row of costs is read in order, a vector of knots at a time.
// j ascends and only a strictly smaller cost replaces, so ties go to the smaller j on every instruction set.
// Compiled with -ffp-contract=off: a product is rounded before it is added to, as on every other backend.
#include "bellman/bellman.h"
#include "common/simd.h"

namespace fk {
namespace FK_ISA {

int64_t bellman(const BellmanArgs& a) {
  typedef int64_t vi __attribute__((vector_size(kVectorBytes)));
  typedef int64_t vi_mem __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  constexpr int L = kVectorBytes / 8;
  const double inf = __builtin_inf();
  for (int64_t j = 0; j < a.n; j++) {
    const double* c = a.cost + j * a.n;
    bool bad = false;
    for (int64_t k = j + 1; k < a.n; k++) bad |= !(c[k] > -inf);
    for (int64_t k = j + 1; bad; k++)
      if (!(c[k] > -inf)) return j * a.n + k;
  }
  for (int64_t i = 0; i < (a.steps + 1) * a.n; i++) a.value[i] = inf, a.parent[i] = -1;
  a.value[0] = 0;
  for (int64_t s = 1; s <= a.steps; s++) {
    const double* last = a.value + (s - 1) * a.n;
    double* value = a.value + s * a.n;
    int64_t* parent = a.parent + s * a.n;
    for (int64_t j = s - 1; j < a.n - 1; j++) {
      const double base = a.carry * last[j];
      const double* c = a.cost + j * a.n;
      if (base == inf) continue;
      int64_t k = j + 1;
      for (; k + L <= a.n; k += L) {
        const vd sum = base + load(c + k), best = load(value + k);
        const vi better = sum < best;
        store(value + k, better ? sum : best);
        *(vi_mem*)(parent + k) = better ? vi{} + j : *(const vi_mem*)(parent + k);
      }
      for (; k < a.n; k++)
        if (base + c[k] < value[k]) value[k] = base + c[k], parent[k] = j;
    }
  }
  return -1;
}

}  // namespace FK_ISA
}  // namespace fk

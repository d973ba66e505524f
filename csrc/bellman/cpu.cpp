// The inner loop runs along k, so that a row of costs is read in order and the compiler makes vectors of it.
// j ascends and only a strictly smaller cost replaces, so ties go to the smaller j on every instruction set.
#include "bellman/bellman.h"

#include "common/simd.h"

namespace fk {
namespace FK_ISA {

void bellman(const BellmanArgs& a) {
  const double inf = __builtin_inf();
  for (int64_t i = 0; i < (a.steps + 1) * a.n; i++) a.value[i] = inf, a.parent[i] = -1;
  a.value[0] = 0;
  for (int64_t s = 1; s <= a.steps; s++) {
    const double* last = a.value + (s - 1) * a.n;
    double* __restrict__ value = a.value + s * a.n;
    int64_t* __restrict__ parent = a.parent + s * a.n;
    for (int64_t j = s - 1; j < a.n - 1; j++) {
      const double base = last[j];
      const double* __restrict__ c = a.cost + j * a.n;
      if (base == inf) continue;
      for (int64_t k = j + 1; k < a.n; k++) {
        const double sum = base + c[k];
        const bool better = sum < value[k];
        value[k] = better ? sum : value[k];
        parent[k] = better ? j : parent[k];
      }
    }
  }
}

}  // namespace FK_ISA
}  // namespace fk

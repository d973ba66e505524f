#include "axpy/axpy.h"

namespace fk {
namespace FK_ISA {

void axpy(const AxpyArgs& g) {
  for (int64_t i = 0; i < g.n; i++) g.out[i] = g.x[i] + g.a * g.y[i];
}

}  // namespace FK_ISA
}  // namespace fk

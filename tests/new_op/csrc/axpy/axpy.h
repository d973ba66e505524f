// out = x + a y.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace fk {

struct AxpyArgs {
  const float* x;  // [n]
  const float* y;  // [n]
  float a;
  float* out;  // [n]
  int64_t n;
};

using axpy_fn = void(const AxpyArgs&);
FK_DECLARE(axpy_fn, axpy)
namespace cuda {
int axpy(const AxpyArgs&, void* stream);
}

}  // namespace fk

// The N-step path of least cost for every N: J(s, k) = min_j carry J(s-1, j) + c(j, k), rounded twice.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace fk {

struct BellmanArgs {
  const double* cost;  // [n, n], contiguous; only k > j is read
  int64_t n;           // knots, K + 1
  int64_t steps;       // largest number of steps
  double carry;        // finite, > 0
  double* value;       // [steps + 1, n] out: J(s, k), infinite where k cannot be reached in s steps
  int64_t* parent;     // [steps + 1, n] out: the smallest j that attains J(s, k), -1 where there is none
  int64_t* bad = nullptr;  // [1] out, on a GPU only
};

// Returns the place j * n + k of the first cost above the diagonal that is NaN or -Inf, and nothing is written then;
// else -1.
using bellman_fn = int64_t(const BellmanArgs&);
FK_DECLARE(bellman_fn, bellman)
namespace cuda {
// What the others return is written to `bad`; where there is such a cost, values are NaN and parents -1.
int bellman(const BellmanArgs&, void* stream);
}  // namespace cuda

}  // namespace fk

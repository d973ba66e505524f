// The Bellman recursion over pairs of knots: V(s, j, k) = min_{i < j} V(s-1, i, j) + c(i, j, k), V(1, 0, k) = first(k).
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace fk {

struct BellmanPairsArgs {
  const double* first;  // [n]; only k >= 1 is read
  const double* cost;  // [n, n, n], contiguous; only i < j < k is read
  int64_t n;  // knots, K + 1
  int64_t steps;  // largest number of steps
  double* value;  // [steps + 1, n, n] out: V(s, j, k), infinite where (j, k) are no last two knots of s steps
  int64_t* parent;  // [steps + 1, n, n] out: the smallest i that attains V(s, j, k), -1 where there is none
  int64_t* bad = nullptr;  // [1] out, on a GPU only
};

// Returns the place of the first value that is NaN or -Inf, k in `first` or n + (i * n + j) * n + k in `cost`; what has
// been written then is nothing. Else -1.
using bellman_pairs_fn = int64_t(const BellmanPairsArgs&);
FK_DECLARE(bellman_pairs_fn, bellman_pairs)
namespace cuda {
// What the others return is written to `bad`; where there is such a value, all of `value` is NaN and of `parent` -1.
int bellman_pairs(const BellmanPairsArgs&, void* stream);
}  // namespace cuda

}  // namespace fk

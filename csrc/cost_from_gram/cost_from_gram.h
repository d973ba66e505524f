// All step costs from the mean Gram matrix of velocity increments; docs/mathematics.md has the recursion.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace fk {

struct CostFromGramArgs {
  const double* gram;   // [R, R], symmetric, R = K-1, or 2K-1 with states: rows a_1..a_{K-1}, then e_0..e_{K-1}
  const double* times;  // [K+1]
  int64_t K;            // >= 1
  bool states;          //
  double* cost;         // [K+1, K+1] out: c(j, k), infinite where k <= j
};

using cost_from_gram_fn = void(const CostFromGramArgs&);
FK_DECLARE(cost_from_gram_fn, cost_from_gram)
namespace cuda {
int cost_from_gram(const CostFromGramArgs&, void* stream);
}

}  // namespace fk

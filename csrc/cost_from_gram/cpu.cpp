// j descends, so the sums over m > j that every k needs grow by one row of the matrix at a time, a vector of k at once;
// then one pass along k, with S(j, k) = sum_{j<m<k} (t_k - t_m) a_m and B(j, k) = sum_{j<m<=k} a_m.
#include "common/memory.h"
#include "cost_from_gram/cost_from_gram.h"

namespace fk {
namespace FK_ISA {

void cost_from_gram(const CostFromGramArgs& g) {
  const int64_t K = g.K, R = g.states ? 2 * K - 1 : K - 1;
  const double *t = g.times, inf = __builtin_inf();
  double* Ba = static_cast<double*>(allocate(size_t(2 * (K + 1)) * sizeof(double)));  // <B(j, k-1), a_k>
  double* Sa = Ba + K + 1;  // <S(j, k), a_k>
  for (int64_t i = 0; i < 2 * (K + 1); i++) Ba[i] = 0;
  for (int64_t k = 0; k <= K; k++) g.cost[K * (K + 1) + k] = inf;
  for (int64_t j = K - 1; j >= 0; j--) {
    if (j + 1 < K) {  // a_{j+1} joins the sums
      const double* a = g.gram + j * R;  // <a_{j+1}, a_k> at k - 1
      const double tm = t[j + 1];
      for (int64_t k = j + 2; k < K; k++) Ba[k] += a[k - 1], Sa[k] += (t[k] - tm) * a[k - 1];
    }
    const double* e = g.states ? g.gram + (K - 1 + j) * R : nullptr;  // <e_j, a_k> at k - 1
    const double ee = g.states ? e[K - 1 + j] : 0;
    double BB = 0, SB = 0, SS = 0, Be = 0, Se = 0;
    double* cost = g.cost + j * (K + 1);
    for (int64_t k = 0; k <= j; k++) cost[k] = inf;
    for (int64_t k = j + 1; k <= K; k++) {
      const double h = t[k] - t[k - 1], span = t[k] - t[j];
      SS += 2 * h * SB + h * h * BB;
      Se += h * Be;
      const double c = g.states ? SS + 2 * span * Se + span * span * ee : SS;
      cost[k] = c < 0 ? 0 : c;  // rounding may leave a residual of zero at -1e-17; NaN stays
      if (k == K) break;
      SB += h * BB + Sa[k];
      BB += 2 * Ba[k] + g.gram[(k - 1) * R + k - 1];
      if (g.states) Be += e[k - 1];
    }
  }
  release(Ba);
}

}  // namespace FK_ISA
}  // namespace fk

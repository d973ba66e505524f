#include "common/test.h"

#include "cost_from_gram/cost_from_gram.h"

// Against the quadratic form, of a matrix that need not be one of increments
TEST(cost_from_gram) {
  for (int64_t K : {1, 2, 3, 4, 8, 9, 10, 17, 33})
    for (bool states : {false, true}) {
      CASE("cost_from_gram K %ld states %d", long(K), states);
      const int64_t R = states ? 2 * K - 1 : K - 1, n = K + 1;
      Tensor gram(f64, R * R, 1), t(f64, n, 1), cost(f64, n * n, 1);
      gram.random(-3, 3);
      for (int64_t i = 0; i < R; i++) {
        for (int64_t j = 0; j < i; j++) gram.set(i * R + j, gram[j * R + i]);
        gram.set(i * R + i, 1e3 * double(K) + gram[i * R + i]);  // positive definite: no cost is cut off at zero
      }
      for (int64_t k = 0; k < n; k++) t.set(k, double(k + k * k) / 64);
      auto kernel = [&](int) {
        FK_SELECT(cost_from_gram)({gram.as<double>(), t.as<double>(), K, states, cost.as<double>()});
      };
      run({1}, {&cost}, kernel, [&] {
        for (int64_t j = 0; j < n; j++)
          for (int64_t k = 0; k < n; k++) {
            std::vector<double> w(R + 1);
            for (int64_t m = j + 1; m < k; m++) w[m - 1] = t[k] - t[m];
            if (states && j < K) w[K - 1 + j] = t[k] - t[j];
            double truth = 0, scale = 0;
            for (int64_t a = 0; a < R; a++)
              for (int64_t b = 0; b < R; b++) {
                const double term = w[a] * w[b] * gram[a * R + b];
                truth += term, scale += std::fabs(term);
              }
            near("cost", j * n + k, cost[j * n + k], k > j ? truth : kInf, 8 * double(n) * kEps64 * scale);
          }
      });
    }
}

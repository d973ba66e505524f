#include "common/test.h"

#include "bellman_pairs/bellman_pairs.h"

TEST(bellman_pairs) {
  for (int64_t n : {2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 18, 33})
    for (int64_t steps : {int64_t(1), n / 2, n - 1})
      for (int kind = 0; kind < 6; kind++) {  // as of bellman
        CASE("bellman_pairs n %ld steps %ld kind %d", long(n), long(steps), kind);
        const int shift = kind % 2;
        const int64_t plane = n * n, all = (steps + 1) * plane;
        Tensor first(f64, n, shift), cost(f64, n * plane, shift), value(f64, all, shift), parent(f64, all, shift);
        for (int64_t at = -n; at < n * plane; at++) {
          const int64_t i = at / plane, j = at / n % n, k = at % n;
          const double c = uniform(), of_kind = kind < 2 ? c : kind < 4 ? std::floor(4 * c) : c < 0.7 ? kInf : c;
          if (at < 0)
            first.set(at + n, at == -n ? NAN : of_kind);
          else
            cost.set(at, i < j && j < k ? of_kind : NAN);
        }
        auto kernel = [&](int = 0) {
          return FK_SELECT(bellman_pairs)(
              {first.as<double>(), cost.as<double>(), n, steps, value.as<double>(), parent.as<int64_t>()});
        };
        run({1}, {&value, &parent}, kernel, [&] {
          for (int64_t at = 0; at < all; at++) {
            const int64_t s = at / plane, j = at / n % n, k = at % n;
            double best = at == 0 ? 0 : s == 1 && j == 0 && k > 0 ? first[k] : kInf;
            int64_t from = -1;
            for (int64_t i = 0; s > 1 && j < k && i < j; i++) {
              const double sum = value[(s - 1) * plane + i * n + j] + cost[i * plane + j * n + k];
              if (sum < best) best = sum, from = i;
            }
            near("value", at, value[at], best, 0);
            near("parent", at, double(parent.as<int64_t>()[at]), double(from), 0);
          }
        });
        if (n > 10 || steps != n / 2) continue;
        for (int64_t at = n * plane - 1; at > -n; at--) {  // every place, and all after it
          const int64_t i = at / plane, j = at / n % n, k = at % n;
          if (at >= 0 && !(i < j && j < k)) continue;
          at < 0 ? first.set(at + n, NAN) : cost.set(at, at % 2 ? NAN : -kInf);
          if (kernel() != at + n) fail("returned", 0, double(kernel()), double(at + n));
        }
      }
}

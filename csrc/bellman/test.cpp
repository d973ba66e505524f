#include "common/test.h"

#include "bellman/bellman.h"

// The same sums and the same choice of a minimum, so no error is allowed
TEST(bellman) {
  for (int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 18, 33, 65, 101})
    for (int64_t steps : {int64_t(0), int64_t(1), n / 2, n - 1})
      for (int kind = 0; kind < 6; kind++) {  // plain, ties, forbidden steps; each aligned and misaligned
        const double carry = kind < 2 ? 1 / 0.9 : 1;
        CASE("bellman n %ld steps %ld kind %d", long(n), long(steps), kind);
        const int shift = kind % 2;
        Tensor cost(f64, n * n, shift), value(f64, (steps + 1) * n, shift), parent(f64, (steps + 1) * n, shift);
        for (int64_t i = 0; i < n * n; i++) {
          const double c = uniform();
          cost.set(i, i % n <= i / n ? NAN : kind < 2 ? c : kind < 4 ? std::floor(4 * c) : c < 0.7 ? kInf : c);
        }
        auto kernel = [&](int = 0) {
          return FK_SELECT(bellman)({cost.as<double>(), n, steps, carry, value.as<double>(), parent.as<int64_t>()});
        };
        run({1}, {&value, &parent}, kernel, [&] {
          for (int64_t s = 0; s <= steps; s++)
            for (int64_t k = 0; k < n; k++) {
              double best = s + k == 0 ? 0 : kInf;
              int64_t from = -1;
              for (int64_t j = 0; s && j < k; j++) {
                const volatile double before = carry * value[(s - 1) * n + j];  // rounded
                const double sum = before + cost[j * n + k];
                if (sum < best) best = sum, from = j;
              }
              near("value", s * n + k, value[s * n + k], best, 0);
              near("parent", s * n + k, double(parent.as<int64_t>()[s * n + k]), double(from), 0);
            }
        });
        if (n > 18 || steps != 1) continue;
        for (int64_t i = n * n - 1; i > 0; i--)  // every place, and all after it
          if (i % n > i / n) cost.set(i, i % 2 ? NAN : -kInf), refused({&value, &parent}, i, kernel);
      }
}

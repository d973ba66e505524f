#include "common/test.h"

#include <memory>

#include "linear_update/linear_update.h"

TEST(linear_update) {
  for (auto [x_type, v_type] : kStates)
    for (int terms : {1, 3, 8, 600}) {  // 600: a part for each of a few lines
      const double factor = terms == 1 ? 1 : terms == 3 ? -0.3 : terms == 8 ? 0 : 1.7;  // of x
      auto body = [&, v_type = v_type](Tensor& x, Tensor& out, Tensor& low, int layout) {
        std::vector<std::unique_ptr<Tensor>> v;
        std::vector<const void*> addresses;
        Tensor b(f64, terms);
        b.random(-3, 0);
        for (int t = 0; t < terms; t++) {
          v.push_back(std::make_unique<Tensor>(v_type, x.n, layout > 0));
          v[t]->random(-20, 5);
          addresses.push_back(v[t]->as());
        }
        auto kernel = [&](int threads) {
          if (layout == 2) out.copy(x);
          FK_SELECT(linear_update)
          ({layout == 2 ? out.as() : x.as(), addresses.data(), b.as<double>(), terms, factor, out.as(), low.as(),
            x.type, v_type, low.type, x.n, threads});
        };
        run({1, 2, 3}, {&out, &low}, kernel, [&] {
          for (int64_t i = 0; i < x.n; i++) {
            double truth = factor * x[i], scale = std::fabs(factor * x[i]);
            for (int t = 0; t < terms; t++) truth += b[t] * (*v[t])[i], scale += std::fabs(b[t] * (*v[t])[i]);
            near("out", i, out[i], truth, (terms + 2) * eps(x.type) * scale);
          }
          is_rounded(low, out);
        });
      };
      const std::vector<int64_t> few = {1, 65, 129};
      updates("linear_update", x_type, v_type, body, terms == 600 ? few : kSizes, terms == 3);
    }
}

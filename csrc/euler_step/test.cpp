#include "common/test.h"

#include "euler_step/euler_step.h"

TEST(euler_step) {
  for (auto [x_type, v_type] : kStates)
    for (bool guided : {false, true}) {
      auto body = [&, v_type = v_type](Tensor& x, Tensor& out, Tensor& low, int layout) {
        Tensor v(v_type, x.n, layout > 0), u(v_type, guided ? x.n : 0, layout > 0);
        v.random(-20, 5), u.random(-20, 5);
        const double h = 0.37, w = guided ? 3.5 : 1;
        auto kernel = [&](int threads) {
          if (layout == 2) out.copy(x);
          FK_SELECT(euler_step)
          ({layout == 2 ? out.as() : x.as(), v.as(), u.as(), out.as(), low.as(), x.type, v.type, low.type, x.n, h, w,
            threads});
        };
        run({1, 2, 3}, {&out, &low}, kernel, [&] {
          for (int64_t i = 0; i < x.n; i++) {
            const double base = guided ? u[i] : 0, truth = x[i] + h * (base + w * (v[i] - base));
            const double scale = std::fabs(x[i]) + h * (std::fabs(base) + w * (std::fabs(v[i]) + std::fabs(base)));
            near("out", i, out[i], truth, 5 * eps(x.type) * scale);
          }
          is_rounded(low, out);
        });
      };
      updates(guided ? "euler_step guided" : "euler_step", x_type, v_type, body, kSizes, guided);
    }
}

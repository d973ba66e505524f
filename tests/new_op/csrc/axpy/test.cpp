#include "common/test.h"

#include "axpy/axpy.h"

TEST(axpy) {
  for (int64_t n : kSizes) {
    CASE("axpy n %ld", long(n));
    Tensor x(f32, n, 1), y(f32, n, 1), out(f32, n, 1);
    x.random(-5, 5), y.random(-5, 5);
    const float a = 0.37f;
    auto kernel = [&](int) { FK_SELECT(axpy)({x.as<float>(), y.as<float>(), a, out.as<float>(), n}); };
    run({1}, {&out}, kernel, [&] {
      for (int64_t i = 0; i < n; i++)
        near("out", i, out[i], x[i] + double(a) * y[i], eps(f32) * (std::fabs(x[i]) + std::fabs(y[i])));
    });
  }
}

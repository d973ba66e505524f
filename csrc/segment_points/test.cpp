#include "common/test.h"

#include "segment_points/segment_points.h"

TEST(segment_points) {
  const Dtype types[][2] = {{f32, f32}, {f32, bf16}, {f32, f16}, {f64, f64}, {f64, bf16}, {f64, f16}};
  for (auto [x_type, out_type] : types)
    for (int shift : {0, 1})
      for (bool lerp : {false, true})
        for (auto [B, D] : shapes(size_of(out_type), !shift && lerp, false)) {
          CASE("segment_points bank %d out %d B %ld D %ld u %d shift %d", int(x_type), int(out_type), long(B), long(D),
               lerp, shift);
          Places at(B, shift);
          Tensor bank(x_type, at.knots * at.samples * D, shift), u(f64, lerp ? B : 0, shift),
              out(out_type, B * D, shift);
          bank.random(-26, 5);
          for (int64_t r = 0; r < u.n; r++) u.set(r, B == 1 || r > 1 ? uniform() : double(r));
          auto kernel = [&, B = B, D = D](int threads) {
            return FK_SELECT(segment_points)({bank.as(), at.i(), at.s(), u.as<double>(), out.as(), bank.type, out.type,
                                              at.knots, at.samples, B, D, threads});
          };
          run({1, 2, 3}, {&out}, kernel, [&, B = B, D = D] {
            for (int64_t r = 0; r < B; r++)
              for (int64_t d = 0; d < D; d++) {
                const int64_t i = at.row(r) * D + d;
                const double a = bank[i], b = bank[i + at.samples * D], p = lerp ? u[r] : 0, truth = a + p * (b - a);
                const double first = p ? 4 * eps(bank.type) * (std::fabs(a) + p * (std::fabs(a) + std::fabs(b))) : 0;
                const int64_t o = r * D + d;
                if (out.type == bank.type)
                  near("out", o, out[o], truth, first);
                else if (p == 0)
                  near("out", o, out[o], decode(encode(float(a), out.type), out.type), 0);
                else  // by way of float32
                  near("out", o, out[o], truth,
                       first + half_ulp(truth, f32) + half_ulp(std::fabs(truth) * 1.001 + first, out.type));
              }
          });
          if (B == 5 && D == 17) at.refuse({&out}, [&] { return kernel(2); });
        }
}

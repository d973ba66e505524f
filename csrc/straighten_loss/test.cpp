#include "common/test.h"

#include "straighten_loss/straighten_loss.h"

TEST(straighten_loss) {
  for (auto [x_type, v_type] : kStates)
    for (int variant = 0; variant < 16; variant++) {
      const int shift = variant & 1, wanted = variant >> 1 & 1, weighted = variant >> 2 & 1, huber = variant >> 3;
      for (auto [B, D] : shapes(size_of(v_type), !shift && wanted && weighted, huber)) {
        CASE("straighten_loss bank %d v %d B %ld D %ld gradient %d weight %d huber %d shift %d", int(x_type),
             int(v_type), long(B), long(D), wanted, weighted, huber, shift);
        Places at(B, shift);
        const int64_t steps = at.knots - 1;
        Tensor bank(x_type, at.knots * at.samples * D, shift), v(v_type, B * D, shift), h(f64, steps, shift);
        Tensor weight(f64, weighted ? B : 0, shift), gradient(v_type, wanted ? B * D : 0, shift);
        Tensor loss(f64, 1, shift), per_sample(f64, B, shift), per_interval(f64, steps, shift);
        bank.random(-4, 0), v.random(-4, 3);
        for (int64_t i = 0; i < steps; i++) h.set(i, 0.1 + 0.2 * double(i));
        for (int64_t r = 0; r < weight.n; r++) weight.set(r, (0.5 + uniform()) * double(B * D));  // gradients near 1
        const double c = huber ? 0.7 : 0;
        const Outputs outputs = {&loss, &per_sample, &per_interval, &gradient};
        auto kernel = [&, B = B, D = D](int threads) {
          return FK_SELECT(straighten_loss)({v.as(), bank.as(), h.as<double>(), at.i(), at.s(), weight.as<double>(), c,
                                             v.type, bank.type, at.knots, at.samples, B, D, loss.as<double>(),
                                             per_sample.as<double>(), per_interval.as<double>(), gradient.as(),
                                             threads});
        };
        run({1, 2, 3}, outputs, kernel, [&, B = B, D = D] {
          const double e1 = eps(bank.type), adds = double(std::min<int64_t>(D, 1024)) / (4 * lanes(bank.type)) + 12;
          double total = 0, total_allowed = 0;
          std::vector<double> sum(steps), sum_allowed(steps), count(steps), e(D), off(D);
          for (int64_t r = 0; r < B; r++) {
            double square = 0, allowed = 0;
            for (int64_t d = 0; d < D; d++) {
              const int64_t i = at.row(r) * D + d;
              const double slope = (bank[i + at.samples * D] - bank[i]) / h[at.i()[r]], vd = v[r * D + d];
              e[d] = vd - slope, off[d] = 4 * e1 * (std::fabs(slope) + std::fabs(vd));
              square += e[d] * e[d], allowed += (2 * std::fabs(e[d]) + off[d]) * off[d];
            }
            allowed = (allowed + (adds * e1 + double(D + 8) * kEps64) * square) / double(D), square /= double(D);
            const double root = std::sqrt(square + c * c), each = huber ? root - c : square;
            if (huber) allowed = allowed / (2 * c) + 4 * kEps64 * (root + c);  // the root's slope is at most 1 / 2c
            near("per_sample", r, per_sample[r], each, allowed);
            const double w = weighted ? weight[r] : 1;
            total += w * each, total_allowed += w * (allowed + double(B + 4) * kEps64 * each);
            sum[at.i()[r]] += each, sum_allowed[at.i()[r]] += allowed + double(B + 4) * kEps64 * each;
            count[at.i()[r]]++;
            const double scale = w * (huber ? 1 / (each + c) : 2) / double(B) / double(D);
            for (int64_t d = 0; d < D && wanted; d++) {
              const double near_by = scale * (off[d] + std::fabs(e[d]) * (4 * e1 + (huber ? allowed / c : 0)));
              near("gradient", r * D + d, gradient[r * D + d], scale * e[d],
                   near_by + half_ulp(std::fabs(scale * e[d]) + near_by, v.type));
            }
          }
          near("loss", 0, loss[0], total / double(B), total_allowed / double(B));
          for (int64_t i = 0; i < steps; i++)  // 0 / 0 is NaN
            near("per_interval", i, per_interval[i], sum[i] / count[i], sum_allowed[i] / count[i]);
        });
        if (B == 5 && D == 17) at.refuse(outputs, [&] { return kernel(2); });
      }
    }
}

#include "common/test.h"

#include <utility>

#include "velocity_gram/plan.h"
#include "velocity_gram/velocity_gram.h"

namespace {

void velocity_gram_case(Dtype x_type, Dtype v_type, int64_t K, int64_t M, bool states, int layout) {
  const int shift = layout > 0, gap = layout > 1 ? 3 : 0;  // elements between rows
  const int64_t R = states ? 2 * K - 1 : K - 1, v_stride = M + gap, x_stride = M + 2 * gap;
  if (states && M + gap == 0) return;  // no address would mean no states
  Tensor v(v_type, (K - 1) * v_stride + M, shift), x(x_type, states ? K * x_stride + M : 0, shift);
  Tensor times(f64, states ? K + 1 : 0, shift), gram(f64, R * R, shift);
  v.random(-3, 1), x.random(-3, 0);
  for (int64_t c = 0; c < v.n; c++)
    if (c % v_stride >= M) v.set(c, NAN);
  for (int64_t c = 0; c < x.n; c++)
    if (c % x_stride >= M) x.set(c, NAN);
  for (int64_t k = 0; k < times.n; k++) times.set(k, double(k + k * k) / 8);
  std::vector<double> rows(R * M);  // before the only rounding that they get, to the type that accumulates
  for (int64_t k = 0; k < K; k++)
    for (int64_t c = 0; c < M; c++) {
      auto secant = [&](int64_t i) {
        return (x[(i + 1) * x_stride + c] - x[i * x_stride + c]) / (times[i + 1] - times[i]);
      };
      auto row = [&](int64_t i) { return states ? secant(i) : v[i * v_stride + c]; };
      if (k) rows[(k - 1) * M + c] = row(k) - row(k - 1);
      if (states) rows[(K - 1 + k) * M + c] = secant(k) - v[k * v_stride + c];
    }
  // a lane adds min(M, 1024) / lanes products of two rounded rows, lanes add up in at most 8 steps, then doubles
  double adds = double(std::min<int64_t>(M, 1024)) / lanes(x_type) + 12;
  // the matrix unit: in one lane, three products each, of parts that lack the last 2^-16
  if (fk::isa() == fk::Isa::amx && K > 64 && M >= 4096) adds = 3 * 1024 + 2 * 0x1p-16 / eps(f32);
  for (int threads : {1, 2, 3}) {
    CASE("velocity_gram x %d v %d K %ld M %ld states %d layout %d threads %d", int(x_type), int(v_type), long(K),
         long(M), states, layout, threads);
    auto kernel = [&](int t) {
      FK_SELECT_AMX(velocity_gram)
      ({v.as(), v.type, K, M, v_stride, x.as(), x_stride, times.as<double>(), gram.as<double>(), t});
    };
    run({threads}, {&gram}, kernel, [&] {
      for (int64_t j = 0; j < R; j++)
        for (int64_t i = 0; i <= j; i++) {
          double truth = 0, scale = 0;
          const double *a = rows.data() + i * M, *b = rows.data() + j * M;
          for (int64_t c = 0; c < M; c++) truth += a[c] * b[c], scale += std::fabs(a[c] * b[c]);
          near("gram", j * R + i, gram[j * R + i], truth, (adds * eps(x_type) + double(M + 8) * kEps64) * scale);
          near("gram", i * R + j, gram[i * R + j], gram[j * R + i], 0);
        }
    });
  }
}

// What the blocks of the CUDA kernels leave idle: none adds up too many columns, and a device whose time is that of its
// longest blocks, wave after wave, is at work for 0.9 of it at least.
void plan_case(int64_t M, int64_t unit, int64_t room, std::vector<std::pair<int64_t, int64_t>> grids) {
  const int64_t units = fk::gram::ceil_div(M, unit);
  double work = 0, time = 0;
  for (auto [splits, each] : grids) {
    const int64_t longest = fk::gram::ceil_div(units, splits), waves = fk::gram::ceil_div(splits * each, room);
    if (splits < 1 || longest * unit > fk::gram::kMostColumns) fail("splits", 0, double(splits), 1);
    work += double(units * each), time += double(room * waves * longest);
  }
  if (work < 0.9 * time) fail("at work", 0, work / time, 1, 0.1);
}

void plan_cases() {
  for (int64_t multiprocessors : {108, 132, 148, 160})
    for (int64_t K = 16; K <= 513; K++)
      for (double columns = 1e5; columns < 1.01e9; columns *= 1.23) {
        const int64_t M = int64_t(columns);
        CASE("velocity_gram plan K %ld M %ld multiprocessors %ld", long(K), long(M), long(multiprocessors));
        const fk::gram::Grids g = fk::gram::grids_for(K, M, multiprocessors);
        std::vector<std::pair<int64_t, int64_t>> grids = {{g.own, g.panels}};
        if (g.pairs) grids.push_back({g.other, g.pairs});
        plan_case(M, fk::gram::kBand, multiprocessors, grids);
        for (int64_t R : {K - 1, 2 * K - 1}) {  // rows of float64, and from states
          const int64_t each = fk::gram::pairs(fk::gram::ceil_div(R, 64)), room = 2 * multiprocessors;
          plan_case(M, 32, room, {{fk::gram::splits_for(M, 32, room, each), each}});
        }
      }
}

}  // namespace

TEST(velocity_gram) {
  plan_cases();
  for (auto [x_type, v_type] : kStates)
    for (bool states : {false, true}) {
      for (int64_t K : {1, 2, 3, 4, 5, 7, 8, 9, 14})
        for (int64_t M : kSizes)
          if (M < 200) velocity_gram_case(x_type, v_type, K, M, states, int((K + M) % 3));
      for (int64_t M : {1023, 1024, 1025, 2051, 8000})
        for (int layout : {0, 1, 2}) velocity_gram_case(x_type, v_type, 6, M, states, layout);
    }
  for (Dtype v_type : {f32, bf16, f16})  // one and two bands of 16 rows past a pair of them, for the matrix unit
    for (int64_t K : {66, 98}) velocity_gram_case(f32, v_type, K, 4099, false, 2);
  velocity_gram_case(f32, f32, 400, 1100, false, 0);  // chunks shorter than 1,024 columns, where L2 is 2 MiB or less
}

// Memory bound: a thread has the loads of several 16-byte words in flight, where rows are aligned; else of single
// elements. Rows are not cut where they are short: some lanes of a warp take one each.
#include "common/rows_cuda.h"
#include "segment_points/segment_points.h"

namespace fk {
namespace cuda {

template <class X, class Out, bool lerp, int E>
__global__ void __launch_bounds__(kRowBlock)
    segment_points_kernel(const X* bank, const int64_t* interval, const int64_t* sample, const X* u, Out* out,
                          int64_t knots, int64_t samples, int64_t B, int64_t words) {
  constexpr int many = E > 1 ? 2 : 4;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, stride = int64_t(gridDim.y) * blockDim.x;
  if (row >= B) return;
  const int64_t i = interval[row], s = sample[row];
  const bool inside = in_bank(i, s, knots, samples);
  const X *a = bank + (inside ? i * samples + s : 0) * words * E, *b = a + samples * words * E;
  const X p = lerp ? u[row] : 0;
  out += row * words * E;
  auto points = [&](auto count, int64_t w) {
    constexpr int U = decltype(count)::value;
    X x[U][E], y[U][E];
#pragma unroll
    for (int n = 0; n < U; n++) {
      load_vector(x[n], a + (w + n * stride) * E);
      if constexpr (lerp) load_vector(y[n], b + (w + n * stride) * E);
    }
#pragma unroll
    for (int n = 0; n < U; n++) {
      Out point[E];
#pragma unroll
      for (int e = 0; e < E; e++) point[e] = convert<Out>(lerp ? x[n][e] + p * (y[n][e] - x[n][e]) : x[n][e]);
      store_vector(out + (w + n * stride) * E, point);
    }
  };
  int64_t w = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  if (!inside) {
    Out none[E];
#pragma unroll
    for (int e = 0; e < E; e++) none[e] = convert<Out>(X(NAN));
    for (; w < words; w += stride) store_vector(out + w * E, none);
    return;
  }
  for (; w + (many - 1) * stride < words; w += many * stride) points(std::integral_constant<int, many>{}, w);
  for (; w < words; w += stride) points(std::integral_constant<int, 1>{}, w);
}

template <class X, class Out, bool lerp>
int run(const SegmentPointsArgs& g, void* stream) {
  const auto *bank = static_cast<const X*>(g.bank), *u = static_cast<const X*>(g.u);
  auto* out = static_cast<Out*>(g.out);
  auto launch = [&](auto neighbours) {
    constexpr int E = decltype(neighbours)::value;
    const int64_t words = g.D / E;
    const dim3 block = row_block(words);
    const int64_t parts = (words + 4 * block.x - 1) / (4 * block.x);
    const dim3 grid(row_blocks(g.B, block), static_cast<unsigned>(parts < 65535 ? parts : 65535));
    FK_LAUNCH((segment_points_kernel<X, Out, lerp, E>), grid, block, 0, stream, bank, g.interval, g.sample, u, out,
              g.knots, g.samples, g.B, words);
    return launched();
  };
  return with_words<16 / sizeof(X)>(g.D, launch, bank, static_cast<const Out*>(out));
}

int segment_points(const SegmentPointsArgs& g, void* stream) {
  if (g.B == 0 || g.D == 0) return launched();
  auto by_out = [&](auto x) {
    using X = typename decltype(x)::type;
    auto to = [&](auto out) {
      using Out = typename decltype(out)::type;
      return g.u ? run<X, Out, true>(g, stream) : run<X, Out, false>(g, stream);
    };
    return g.out_type == g.bank_type ? to(x) : with_low_type(g.out_type, to);
  };
  return g.bank_type == Dtype::f64 ? by_out(Type<double>{}) : by_out(Type<float>{});
}

}  // namespace cuda
}  // namespace fk

// One pass over memory. A thread takes 16 bytes of the state, where the tensors can be aligned together, or twice as
// many a block's width apart where velocities have half the bytes, so that a warp's requests are of whole sectors, and
// has all its loads in flight at once.
#include "common/cuda.h"
#include "euler_step/euler_step.h"

namespace fk {
namespace cuda {

constexpr int kThreads = 256;

// Vectors of a thread
template <class X, class V, int E>
constexpr int kVectors = E > 1 ? sizeof(X) / sizeof(V) : 1;

// Elements [0, head) and from head + vectors * E on are taken one by one, what lies between E at a time.
template <class X, class V, class Low, bool guided, int E>
__global__ void __launch_bounds__(kThreads)
    euler_step_kernel(const X* x, const V* v, const V* v_uncond, X* out, Low* low, int64_t n, int head, X h, X w) {
  auto step = [&](X state, V cond, V uncond) {
    const X c = convert<X>(cond);
    if constexpr (guided) {
      const X u = convert<X>(uncond);
      return state + h * (u + w * (c - u));
    }
    return state + h * c;
  };
  constexpr int N = kVectors<X, V, E>;
  const int64_t vectors = (n - head) / E, i = int64_t(blockIdx.x) * kThreads * N + threadIdx.x;
  X a[N][E];
  V c[N][E], u[N][E];
#pragma unroll
  for (int k = 0; k < N; k++) {
    if (i + k * kThreads >= vectors) break;
    const int64_t at = head + (i + k * kThreads) * E;
    load_vector(a[k], x + at);
    load_vector(c[k], v + at);
    if constexpr (guided) load_vector(u[k], v_uncond + at);
  }
#pragma unroll
  for (int k = 0; k < N; k++) {
    if (i + k * kThreads >= vectors) break;
    const int64_t at = head + (i + k * kThreads) * E;
#pragma unroll
    for (int j = 0; j < E; j++) a[k][j] = step(a[k][j], c[k][j], guided ? u[k][j] : c[k][j]);
    store_vector(out + at, a[k]);
    if constexpr (!std::is_same_v<Low, X>) {
      Low l[E];
#pragma unroll
      for (int j = 0; j < E; j++) l[j] = convert<Low>(a[k][j]);
      store_vector(low + at, l);
    }
  }
  const int64_t rest = n - vectors * E;  // fewer than 2 E
  if (E > 1 && i < rest) {
    const int64_t at = i < head ? i : i + vectors * E;
    const X a = step(x[at], v[at], guided ? v_uncond[at] : v[at]);
    out[at] = a;
    if constexpr (!std::is_same_v<Low, X>) low[at] = convert<Low>(a);
  }
}

// Low is X where no copy is wanted.
template <class X, class V, class Low, bool guided>
int launch(const EulerStepArgs& a, void* stream) {
  constexpr int E = 16 / sizeof(X);
  const auto* x = static_cast<const X*>(a.x);
  const auto *v = static_cast<const V*>(a.v), *u = static_cast<const V*>(a.v_uncond);
  auto* out = static_cast<X*>(a.out);
  auto* low = static_cast<Low*>(a.low);
  auto run = [&](auto kernel, int64_t vectors, int each, int head) {
    const dim3 grid(static_cast<unsigned>((vectors + kThreads * each - 1) / (kThreads * each)));
    FK_LAUNCH(kernel, grid, dim3(kThreads), 0, stream, x, v, u, out, low, a.n, head, X(a.h), X(a.guidance));
    return launched();
  };
  const int head = aligned_head<E>(a.n, x, v, u, out, low);
  if (head < 0) return run(euler_step_kernel<X, V, Low, guided, 1>, a.n, 1, 0);
  const int64_t vectors = (a.n - head) / E, rest = a.n - vectors * E;
  return run(euler_step_kernel<X, V, Low, guided, E>, vectors > rest ? vectors : rest, kVectors<X, V, E>, head);
}

template <class X, class V>
int by_outputs(const EulerStepArgs& a, void* stream) {
  auto by_guidance = [&](auto low) {
    using Low = typename decltype(low)::type;
    return a.v_uncond ? launch<X, V, Low, true>(a, stream) : launch<X, V, Low, false>(a, stream);
  };
  return a.low ? with_low_type(a.low_type, by_guidance) : by_guidance(Type<X>{});
}

int euler_step(const EulerStepArgs& a, void* stream) {
  if (a.n == 0) return launched();
  if (a.x_type == Dtype::f64) return by_outputs<double, double>(a, stream);
  if (a.v_type == Dtype::f32) return by_outputs<float, float>(a, stream);
  return with_low_type(a.v_type, [&](auto v) { return by_outputs<float, typename decltype(v)::type>(a, stream); });
}

}  // namespace cuda
}  // namespace fk

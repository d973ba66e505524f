// One pass over memory for up to kTerms velocities, and one more for each kTerms after them. A thread takes the
// elements of one 16-byte word of velocities, where the tensors can be aligned together, and keeps their sums in
// registers. The words of kUnroll terms are in flight at once.
#include "common/cuda.h"
#include "linear_update/linear_update.h"

namespace fk {
namespace cuda {

constexpr int kUpdateThreads = 256;
constexpr int kTerms = 16;
constexpr int kUnroll = 4;

template <class X, class V>
struct Terms {
  const V* v[kTerms];
  X b[kTerms];
  X scale;  // of x
  int count;
};

// sum[j] += b_t v_t[at + j], for `count` terms from the first
template <int count, int E, class X, class V>
__device__ __forceinline__ void add_terms(X (&sum)[E], const Terms<X, V>& terms, int first, int64_t at) {
  V v[count][E];
#pragma unroll
  for (int t = 0; t < count; t++) load_vector(v[t], terms.v[first + t] + at);
#pragma unroll
  for (int t = 0; t < count; t++) {
    const X b = terms.b[first + t];
#pragma unroll
    for (int j = 0; j < E; j++) sum[j] += b * convert<X>(v[t][j]);
  }
}

template <int E, class X, class V, class Low>
__device__ __forceinline__ void update(const X* x, const Terms<X, V>& terms, X* out, Low* low, int64_t at) {
  X sum[E];
  load_vector(sum, x + at);
#pragma unroll
  for (int j = 0; j < E; j++) sum[j] = rounded_product(terms.scale, sum[j]);
  int t = 0;
  for (; t + kUnroll <= terms.count; t += kUnroll) add_terms<kUnroll>(sum, terms, t, at);
  switch (terms.count - t) {
    case 3: add_terms<3>(sum, terms, t, at); break;
    case 2: add_terms<2>(sum, terms, t, at); break;
    case 1: add_terms<1>(sum, terms, t, at); break;
  }
  store_vector(out + at, sum);
  if constexpr (!std::is_same_v<Low, X>) {
    Low l[E];
#pragma unroll
    for (int j = 0; j < E; j++) l[j] = convert<Low>(sum[j]);
    store_vector(low + at, l);
  }
}

// Elements [0, head) and from head + vectors * E on are taken one by one, what lies between E at a time.
template <class X, class V, class Low, int E>
__global__ void __launch_bounds__(kUpdateThreads)
    linear_update_kernel(const X* x, const Terms<X, V> terms, X* out, Low* low, int64_t n, int head) {
  const int64_t vectors = (n - head) / E, i = int64_t(blockIdx.x) * kUpdateThreads + threadIdx.x;
  if (i < vectors) update<E>(x, terms, out, low, head + i * E);
  const int64_t rest = n - vectors * E;  // fewer than 2 E
  if (E > 1 && i < rest) update<1>(x, terms, out, low, i < head ? i : i + vectors * E);
}

// Low is X where no copy is wanted.
template <class X, class V, class Low>
int launch_terms(const X* x, const Terms<X, V>& terms, X* out, Low* low, int64_t n, void* stream) {
  constexpr int E = 16 / sizeof(V);
  auto run = [&](auto kernel, int64_t threads, int head) {
    const dim3 grid(static_cast<unsigned>((threads + kUpdateThreads - 1) / kUpdateThreads));
    FK_LAUNCH(kernel, grid, dim3(kUpdateThreads), 0, stream, x, terms, out, low, n, head);
    return launched();
  };
  const int head = aligned_head<E>(n, x, out, low);
  bool aligned = head >= 0;
  for (int t = 0; t < terms.count; t++) {
    const V* v = terms.v[t];
    aligned = aligned && (head == n || reinterpret_cast<uintptr_t>(v + head) % 16 == 0);
  }
  if (!aligned) return run(linear_update_kernel<X, V, Low, 1>, n, 0);
  const int64_t vectors = (n - head) / E, rest = n - vectors * E;
  return run(linear_update_kernel<X, V, Low, E>, vectors > rest ? vectors : rest, head);
}

template <class X, class V>
int by_terms(const LinearUpdateArgs& a, void* stream) {
  const auto* x = static_cast<const X*>(a.x);
  auto* out = static_cast<X*>(a.out);
  for (int64_t first = 0;; first += kTerms, x = out) {
    const bool last = a.terms - first <= kTerms;
    Terms<X, V> terms{};
    terms.scale = first ? X(1) : X(a.scale);
    terms.count = last ? static_cast<int>(a.terms - first) : kTerms;
    for (int t = 0; t < terms.count; t++) {
      terms.v[t] = static_cast<const V*>(a.v[first + t]);
      terms.b[t] = X(a.b[first + t]);
    }
    int status;
    if (last && a.low)
      status = with_low_type(a.low_type, [&](auto low) {
        using Low = typename decltype(low)::type;
        return launch_terms(x, terms, out, static_cast<Low*>(a.low), a.n, stream);
      });
    else
      status = launch_terms(x, terms, out, static_cast<X*>(nullptr), a.n, stream);
    if (status || last) return status;
  }
}

int linear_update(const LinearUpdateArgs& a, void* stream) {
  if (a.n == 0) return launched();
  if (a.x_type == Dtype::f64) return by_terms<double, double>(a, stream);
  if (a.v_type == Dtype::f32) return by_terms<float, float>(a, stream);
  return with_low_type(a.v_type, [&](auto v) { return by_terms<float, typename decltype(v)::type>(a, stream); });
}

}  // namespace cuda
}  // namespace fk

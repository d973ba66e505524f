// One pass over the velocities. A chunk of columns is differenced into a tile that stays near the core, and the tile's
// rows are multiplied with each other, upper triangle only, 4 x NJ dot products at a time in registers. Meanwhile the
// next chunk is fetched.
//
//   v [K, M]  --chunk of columns-->  tile [R, chunk]  -->  G[j, i] += <tile_j, tile_i>, i >= j
//
// float32 accumulates along a chunk of at most 1,024 columns (64 products a lane of AVX-512), then moves to float64.
#include "common/memory.h"
#include "common/simd.h"
#include "common/threads.h"
#include "common/tiles.h"
#include "velocity_gram/velocity_gram.h"

namespace fk {
namespace FK_ISA {
namespace {

constexpr int64_t kLeastColumns = 512, kMostColumns = 1024;  // of a chunk: a tile's end costs what 64 columns do

// G[j0+b, i0+a] += <A_a, B_b> over n columns, n a multiple of the vector length
template <class T, int NJ>
FK_INLINE void dot_tile(const T* A,  // kRows rows, ld apart
                        const T* B,  // NJ rows, ld apart
                        int64_t ld, int64_t n,
                        double* G,  // row j0, column i0
                        int64_t ldg) {
  using V = typename Vector<T>::type;
  V acc[kRows][NJ];
#pragma GCC unroll 8
  for (int a = 0; a < kRows; a++)
#pragma GCC unroll 8
    for (int b = 0; b < NJ; b++) acc[a][b] = V{};
  for (int64_t c = 0; c < n; c += Vector<T>::n) {
    V bv[NJ];
#pragma GCC unroll 8
    for (int b = 0; b < NJ; b++) {
      V v = load(B + b * ld + c);
      hold(v);
      bv[b] = v;
    }
#pragma GCC unroll 8
    for (int a = 0; a < kRows; a++) {
      V av = load(A + a * ld + c);
      hold(av);
#pragma GCC unroll 8
      for (int b = 0; b < NJ; b++) acc[a][b] += av * bv[b];
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < NJ; b++) add_lane_sums(G + b * ldg, acc[0][b], acc[1][b], acc[2][b], acc[3][b]);
}

template <class T>
void dot_tile(int64_t nj, const T* A, const T* B, int64_t ld, int64_t n, double* G, int64_t ldg) {
  switch (nj) {
    case 1: return dot_tile<T, 1>(A, B, ld, n, G, ldg);
    case 2: return dot_tile<T, 2>(A, B, ld, n, G, ldg);
#if defined(__AVX2__)
    case 3: return dot_tile<T, 3>(A, B, ld, n, G, ldg);
#endif
#if defined(__AVX512F__)
    case 4: return dot_tile<T, 4>(A, B, ld, n, G, ldg);
    case 5: return dot_tile<T, 5>(A, B, ld, n, G, ldg);
    case 6: return dot_tile<T, 6>(A, B, ld, n, G, ldg);
#endif
  }
}

// Lines of memory that are wanted soon, fetched a few at a time
struct Soon {
  const char* row;
  int64_t stride, bytes, rows;  // `bytes` of each row
  int64_t at = 0;
};
FK_INLINE void fetch(Soon& s, int64_t lines) {
  for (; lines > 0 && s.rows > 0; lines--) {
    __builtin_prefetch(s.row + s.at, 0, 2);
    s.at += 64;
    if (s.at >= s.bytes) s.at = 0, s.row += s.stride, s.rows--;
  }
}

// From `rows` on, kRows - 1 rows of the tile are zero
template <class T>
void gram_of_tile(const T* tile, int64_t rows, int64_t ld, int64_t n, double* G, int64_t ldg, Soon soon) {
  const int64_t tiles = (rows + kRows) * (rows + kCols) / (2 * kRows * kCols);
  const int64_t lines = soon.rows * ((soon.bytes + 63) / 64) / larger(tiles, 1) + 1;
  for (int64_t j = 0, nj = 0; j < rows; j += nj) {  // these rows stay in L1 while those after them stream past
    const int64_t left = rows - j;
    nj = left <= kCols ? left : left < 2 * kCols ? (left + 1) / 2 : kCols;  // one row alone is slow
    for (int64_t i = j; i < rows; i += kRows) {
      fetch(soon, lines);
      dot_tile(nj, tile + i * ld, tile + j * ld, ld, n, G + j * ldg + i, ldg);
    }
  }
}

// ---- increments into the tile: n columns, zero up to a whole vector ----
template <class T, class V>
void difference(const V* lo, const V* hi, T* out, int64_t n) {
  constexpr int L = Vector<T>::n;
  int64_t c = 0;
  for (; c + L <= n; c += L) store(out + c, load(hi + c) - load(lo + c));
  if (c < n) {  // through a padded copy, so that the arithmetic is the same
    V a[L] = {}, b[L] = {};
    memcpy(a, lo + c, (n - c) * sizeof(V));
    memcpy(b, hi + c, (n - c) * sizeof(V));
    store(out + c, load(b) - load(a));
  }
}

FK_INLINE double scalar(float v) {
  return v;
}
FK_INLINE double scalar(double v) {
  return v;
}
FK_INLINE double scalar(bf16 v) {
  const uint32_t u = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
FK_INLINE double scalar(f16 v) {
  f16 padded[kFloats] = {v};
  return double(load(padded)[0]);
}

template <class T, class V>
void pack_euler(const VelocityGramArgs& g, int64_t m, int64_t n, T* tile, int64_t ld) {
  const V* v = static_cast<const V*>(g.v) + m;
  for (int64_t i = 1; i < g.K; i++) difference(v + (i - 1) * g.v_stride, v + i * g.v_stride, tile + (i - 1) * ld, n);
}

// Secants u_i = (x_{i+1} - x_i) / h_i: rows u_m - u_{m-1}, then u_j - v_j. In double, since u_m and u_{m-1} nearly
// agree. States have the tile's type.
template <class T, class V>
void pack_secant(const VelocityGramArgs& g, int64_t m, int64_t n, T* tile, int64_t ld) {
  const T* x = static_cast<const T*>(g.x) + m;
  const V* v = static_cast<const V*>(g.v) + m;
  T* e = tile + (g.K - 1) * ld;
  for (int64_t i = 0; i < g.K; i++) {
    const T *here = x + i * g.x_stride, *next = here + g.x_stride, *last = here - g.x_stride;
    const V* vi = v + i * g.v_stride;
    const double h = g.times[i + 1] - g.times[i];
    for (int64_t c = 0; c < n; c++) e[i * ld + c] = T((double(next[c]) - double(here[c])) / h - scalar(vi[c]));
    if (i == 0) continue;
    const double h_last = g.times[i] - g.times[i - 1];
    for (int64_t c = 0; c < n; c++)
      tile[(i - 1) * ld + c] =
          T((double(next[c]) - double(here[c])) / h - (double(here[c]) - double(last[c])) / h_last);
  }
  for (int64_t r = 0; r < 2 * g.K - 1; r++)
    for (int64_t c = n; c % Vector<T>::n; c++) tile[r * ld + c] = 0;
}

// Equal chunks, of a tile that stays in L2 unless that took more tiles' ends than it saves
int64_t chunk_columns(int64_t rows, int64_t M, int threads, int element) {
  const int64_t fits = level2_bytes() * 5 / 8 / (larger(rows, 1) * element);
  const int64_t most = smaller(larger(fits, kLeastColumns), kMostColumns) / 64 * 64;
  const int64_t each = threads * ((M + threads * most - 1) / (threads * most));
  return round_up(larger((M + each - 1) / larger(each, 1), 1), 64);
}

template <class T, class V>
void run(const VelocityGramArgs& g) {
  const int64_t R = g.x ? 2 * g.K - 1 : g.K - 1, rows = R + kRows - 1;
  const int64_t chunk = chunk_columns(R, g.M, g.threads, sizeof(T)), chunks = (g.M + chunk - 1) / chunk;
  const int parts = int(larger(1, smaller(g.threads, chunks)));
  // an odd number of cache lines a row, so that rows do not compete for the same sets
  const int64_t ld = chunk + 64 / int64_t(sizeof(T));
  const size_t tile_bytes = size_t(rows * ld) * sizeof(T), gram_bytes = size_t(round_up(R * rows * 8, 64));
  const bool far = !g.x && g.K * g.M * int64_t(sizeof(V)) > level3_bytes() / 2;  // and worth fetching ahead
  char* scratch = static_cast<char*>(allocate((tile_bytes + gram_bytes) * size_t(parts)));
  auto part_gram = [&](int p) {
    return reinterpret_cast<double*>(scratch + (tile_bytes + gram_bytes) * p + tile_bytes);
  };

  parallel(parts, [&](int p) {
    T* tile = reinterpret_cast<T*>(scratch + (tile_bytes + gram_bytes) * p);
    double* G = part_gram(p);
    memset(static_cast<void*>(tile + R * ld), 0, size_t((rows - R) * ld) * sizeof(T));
    memset(G, 0, gram_bytes);
    const int64_t end = chunks * (p + 1) / parts;
    for (int64_t b = chunks * p / parts; b < end; b++) {
      const int64_t m = b * chunk, n = smaller(chunk, g.M - m), padded = round_up(n, Vector<T>::n);
      if (g.x)
        pack_secant<T, V>(g, m, n, tile, ld);
      else
        pack_euler<T, V>(g, m, n, tile, ld);
      const V* next = static_cast<const V*>(g.v) + m + chunk;
      const int64_t bytes = smaller(chunk, g.M - m - chunk) * int64_t(sizeof(V));
      const Soon soon{reinterpret_cast<const char*>(next), g.v_stride * int64_t(sizeof(V)), bytes,
                      far && b + 1 < end ? g.K : 0};
      gram_of_tile(tile, R, ld, padded, G, rows, soon);
    }
  });

  for (int64_t j = 0; j < R; j++)
    for (int64_t i = j; i < R; i++) {
      double s = 0;
      for (int p = 0; p < parts; p++) s += part_gram(p)[j * rows + i];
      g.gram[j * R + i] = g.gram[i * R + j] = s;
    }
  release(scratch);
}

}  // namespace

void velocity_gram(const VelocityGramArgs& g) {
  switch (g.v_type) {
    case Dtype::f32: return run<float, float>(g);
    case Dtype::f64: return run<double, double>(g);
    case Dtype::bf16: return run<float, bf16>(g);
    case Dtype::f16: return run<float, f16>(g);
  }
}

}  // namespace FK_ISA
}  // namespace fk

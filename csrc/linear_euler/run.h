// The head around the products, which is all that linear_euler/cpu.cpp and avx512_bf16.cpp differ in.
//
// Memory bound on z where a token has few outputs: z is read once. A tile of tokens, normalised and modulated in the
// first cache, is multiplied with the rows of W, 4 x NJ dot products at a time in registers; its velocities go from
// there into the state. Tokens that need no change are multiplied where they lie.
//
//   z [tokens, d]  --four rows-->  tile [rows, d]  --products-->  sums [outputs, rows]  --place-->  runs of the state
//
// A row's arithmetic does not depend on what shares its tile, so results do not depend on the threads.
//
// A kind of head is a struct D of
//
//   Z        elements of the tokens
//   prepare  four rows of the tile: features, zero from d to a whole vector
//   Product  a struct Dot of
//     State    float or double: of the sums, and of all that follows them
//     Element  of the features and weights that are multiplied; kType: its name
//     Held     a vector of kLanes of them, which `held` loads
//     add      sum + a * b
#pragma once

#include "common/memory.h"
#include "common/simd.h"
#include "common/threads.h"
#include "common/tiles.h"
#include "linear_euler/linear_euler.h"

namespace fk {
namespace FK_ISA {
namespace {

constexpr int64_t kGrain = 1 << 19;       // multiply-adds that a thread must have for a second one to pay
constexpr int64_t kTileBytes = 256 << 10;  // of rows that stay near the core while W passes
constexpr int64_t kMostRows = 32;
constexpr int64_t kColumns = 1536;  // of kCols rows of W that fit in the first cache
constexpr int64_t kBlock = 16;  // outputs

FK_INLINE bool is_plain(const LinearEulerArgs& a) {  // features are the tokens
  return !a.normed && !a.scale.p && !a.shift.p;
}

// ---- a vector of which `rest` elements exist ----
template <class T>
FK_INLINE auto load_some(const T* p, int64_t rest) {
  constexpr int64_t L = Vector<T>::n;
  if (rest >= L) return load(p);
  T some[L] = {};
  memcpy(static_cast<void*>(some), p, size_t(rest) * sizeof(T));
  return load(some);
}
template <class T, class V>
FK_INLINE void store_some(T* p, V v, int64_t rest) {
  constexpr int64_t L = sizeof(V) / sizeof(v[0]);
  if (rest >= L) return store(p, v);
  T some[L];
  store(some, v);
  memcpy(static_cast<void*>(p), some, size_t(rest) * sizeof(T));
}
template <class X>
FK_INLINE typename Vector<X>::type get(const void* p, Dtype type, int64_t i, int64_t rest) {
  if constexpr (sizeof(X) == 8) {
    return load_some(static_cast<const double*>(p) + i, rest);
  } else {
    if (type == Dtype::bf16) return load_some(static_cast<const bf16*>(p) + i, rest);
    if (type == Dtype::f16) return load_some(static_cast<const f16*>(p) + i, rest);
    return load_some(static_cast<const float*>(p) + i, rest);
  }
}
template <class V>
FK_INLINE void put(void* p, Dtype type, int64_t i, V v, int64_t rest) {
  if (type == Dtype::bf16) return store_some(static_cast<bf16*>(p) + i, v, rest);
  if (type == Dtype::f16) return store_some(static_cast<f16*>(p) + i, v, rest);
  if constexpr (sizeof(v[0]) == 8)
    store_some(static_cast<double*>(p) + i, v, rest);
  else
    store_some(static_cast<float*>(p) + i, v, rest);
}

// A row in X, zero up to a whole vector
template <class X>
void widen(const void* p, Dtype type, int64_t offset, int64_t n, X* out) {
  constexpr int L = Vector<X>::n;
  for (int64_t i = 0; i < n; i += L) store(out + i, get<X>(p, type, offset + i, n - i));
}

inline void widen(const void* p, Dtype, int64_t offset, int64_t n, bf16* out) {  // as it is, for pairs
  memcpy(static_cast<void*>(out), static_cast<const bf16*>(p) + offset, size_t(n) * sizeof(bf16));
  memset(static_cast<void*>(out + n), 0, size_t(round_up(n, 2 * kFloats) - n) * sizeof(bf16));
}

// What all tiles share: padded to whole vectors, and without gaps
template <class Dot>
struct Shared {
  const typename Dot::Element* weight;  // [outputs, weight_row]
  int64_t weight_row;
  const typename Dot::State *bias, *norm_weight, *norm_bias;  // null where there is none
};

template <class Z>
struct Token {
  const Z* z;      // [d]
  int64_t sample;  // of m
};

// sums[b * ld + a] += <rows[a], W_b> over n columns, n a multiple of the vector length
template <class Dot, int NR, int NJ, class E = typename Dot::Element>
FK_INLINE void dot_tile(const E* const* rows, const E* W, int64_t w_row, int64_t n, double* sums, int64_t ld) {
  using V = typename Vector<typename Dot::State>::type;
  V acc[kRows][NJ];
#pragma GCC unroll 8
  for (int a = 0; a < kRows; a++)
#pragma GCC unroll 8
    for (int b = 0; b < NJ; b++) acc[a][b] = V{};
  for (int64_t c = 0; c < n; c += Dot::kLanes) {
    typename Dot::Held bv[NJ];
#pragma GCC unroll 8
    for (int b = 0; b < NJ; b++) {
      auto v = Dot::held(W + b * w_row + c);
      hold(v);
      bv[b] = v;
    }
#pragma GCC unroll 8
    for (int a = 0; a < NR; a++) {
      auto av = Dot::held(rows[a] + c);
      hold(av);
#pragma GCC unroll 8
      for (int b = 0; b < NJ; b++) acc[a][b] = Dot::add(acc[a][b], av, bv[b]);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < NJ; b++) add_lane_sums(sums + b * ld, acc[0][b], acc[1][b], acc[2][b], acc[3][b]);
}

template <class Dot, int NR, class E = typename Dot::Element>
void dot_tile_edge(int64_t nj, const E* const* rows, const E* W, int64_t w_row, int64_t n, double* sums, int64_t ld) {
  switch (nj) {
    case 1: return dot_tile<Dot, NR, 1>(rows, W, w_row, n, sums, ld);
#if defined(__AVX2__) || defined(FK_EMULATED_BF16)
    case 2: return dot_tile<Dot, NR, 2>(rows, W, w_row, n, sums, ld);
#endif
#if defined(__AVX512F__) || defined(FK_EMULATED_BF16)
    case 3: return dot_tile<Dot, NR, 3>(rows, W, w_row, n, sums, ld);
    case 4: return dot_tile<Dot, NR, 4>(rows, W, w_row, n, sums, ld);
    case 5: return dot_tile<Dot, NR, 5>(rows, W, w_row, n, sums, ld);
#endif
    default: return dot_tile<Dot, NR, kCols>(rows, W, w_row, n, sums, ld);
  }
}

// sums [outputs, ld] of `count` rows, whose pointers are repeated up to a multiple of kRows
template <class Dot, class E = typename Dot::Element>
void multiply(const Shared<Dot>& s, const E* const* rows, int64_t count, int64_t n, int64_t outputs, double* sums,
              int64_t ld) {
  memset(sums, 0, size_t(outputs * ld) * sizeof(double));
  const int64_t chunks = (n + kColumns - 1) / kColumns, chunk = round_up((n + chunks - 1) / chunks, Dot::kLanes);
  for (int64_t begin = 0; begin < n; begin += chunk)
    for (int64_t o = 0, nj = 0; o < outputs; o += nj) {  // these rows of W stay in L1 while the tile's pass
      const int64_t left = outputs - o;
      nj = left <= kCols ? left : left < 2 * kCols ? (left + 1) / 2 : kCols;  // one row alone is slow
      for (int64_t r = 0; r < count; r += kRows) {
        const E *at[kRows], *W = s.weight + o * s.weight_row + begin;
        for (int i = 0; i < kRows; i++) at[i] = rows[r + i] + begin;
        const int64_t columns = smaller(chunk, n - begin);
        if (count == 1)
          dot_tile_edge<Dot, 1>(nj, at, W, s.weight_row, columns, sums + o * ld, ld);
        else
          dot_tile_edge<Dot, kRows>(nj, at, W, s.weight_row, columns, sums + o * ld + r, ld);
      }
    }
}

// count elements of the state from element `at`
template <class X>
void update(const LinearEulerArgs& a, const X* v, int64_t at, int64_t count) {
  constexpr int L = Vector<X>::n;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t rest = count - i;
    const auto velocity = load(v + i);
    auto sum = rounded(X(a.x_scale) * get<X>(a.x, a.x_type, at + i, rest)) + X(a.h) * velocity;
    for (int64_t t = 0; t < a.terms; t++) sum += X(a.b[t]) * get<X>(a.history[t], a.history_type, at + i, rest);
    put(a.out, a.x_type, at + i, sum, rest);
    if (a.low) put(a.low, a.low_type, at + i, sum, rest);
    if (a.velocity) put(a.velocity, a.velocity_type, at + i, velocity, rest);
  }
}

// What the tokens of a sample are multiplied with and what is added to them, made once for those of a tile
template <class X>
struct Modulation {
  X *by, *to;  // [padded d]
  int64_t sample;
};

template <class Dot>
struct Scratch {
  typename Dot::Element* tile;  // [rows of both halves, padded d]
  typename Dot::State* place;   // velocities in runs of the state, each padded to whole vectors
  double* sums;               // [outputs, rows of both halves]
  typename Dot::State *by, *to;  // of a Modulation
};

// `count` neighbouring tokens from token k of all n * T: of one line of patches, or of the whole batch without patches
template <class D, class Dot = typename D::Product>
void token_tile(const LinearEulerArgs& a, const Shared<Dot>& s, const Scratch<Dot>& scratch, int64_t k, int64_t count) {
  using X = typename Dot::State;
  using E = typename Dot::Element;
  using Z = typename D::Z;
  constexpr int L = Vector<X>::n;
  const int64_t half = round_up(count, kRows), columns = round_up(a.d, Dot::kLanes), P = a.patch;
  const bool in_place = sizeof(E) == sizeof(Z) && is_plain(a) && columns == a.d;
  const E* rows[2 * kMostRows];
  Modulation<X> of{scratch.by, scratch.to, -1};
  for (int64_t r = 0; r < (a.guided ? 2 : 1) * half; r += kRows) {
    Token<Z> token[kRows];
    for (int i = 0; i < kRows; i++) {  // past the last token: it once more
      const int64_t t = k + smaller(r % half + i, count - 1), sample = t / a.T + (r < half ? 0 : a.n);
      token[i] = {static_cast<const Z*>(a.z.p) + sample * a.z.stride + t % a.T * a.z_token, sample};
      rows[r + i] = in_place ? reinterpret_cast<const E*>(token[i].z) : scratch.tile + (r + i) * columns;
    }
    if (!in_place) D::prepare(a, s, token, scratch.tile + r * columns, columns, of);
  }
  const int64_t all = a.guided ? 2 * half : count, ld = round_up(all, kRows);
  multiply(s, rows, all, columns, a.outputs, scratch.sums, ld);

  const int64_t run = round_up(count * (P ? P : a.outputs), L);
  const int64_t step = P ? P : a.outputs, other = a.guided ? half : 0;
  const int64_t channels = P ? a.outputs / (P * P) : 0;  // of which the state has the first C
  for (int64_t o = 0; o < a.outputs; o += kBlock) {  // a few outputs of one token after another
    const int64_t width = smaller(kBlock, a.outputs - o);
    int64_t first[kBlock];
    double bias[kBlock];
    for (int64_t i = 0; i < width; i++) {
      first[i] = o + i;
      bias[i] = s.bias ? double(s.bias[o + i]) : 0;
      if (!P) continue;
      const int64_t c = a.channels_first ? (o + i) / (P * P) : (o + i) % channels;
      const int64_t pq = a.channels_first ? (o + i) % (P * P) : (o + i) / channels;
      first[i] = c < a.C ? (c * P + pq / P) * run + pq % P : -1;
    }
    for (int64_t r = 0; r < count; r++)
      for (int64_t i = 0; i < width; i++) {
        const double *sum = scratch.sums + (o + i) * ld + r, v = *sum + bias[i], base = sum[other] + bias[i];
        if (first[i] >= 0) scratch.place[first[i] + r * step] = X(a.guided ? base + a.guidance * (v - base) : v);
      }
  }
  if (!P) return update(a, scratch.place, k * a.outputs, count * a.outputs);
  const int64_t wide = a.W / P, line = k / wide, high = a.H / P;  // line `line % high` of patches of its sample
  for (int64_t i = 0; i < a.C * P; i++) {
    const int64_t y = line % high * P + i % P;
    update(a, scratch.place + i * run, ((line / high * a.C + i / P) * a.H + y) * a.W + k % wide * P, count * P);
  }
}

// Parts of one block of scratch memory, each on lines of its own
struct Arena {
  char* begin = nullptr;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = begin ? reinterpret_cast<T*>(begin + used) : nullptr;
    used += size_t(round_up(count * int64_t(sizeof(T)), 64));
    return p;
  }
};

template <class D, class Dot = typename D::Product>
void run(const LinearEulerArgs& a) {
  using X = typename Dot::State;
  using E = typename Dot::Element;
  constexpr int L = Vector<X>::n;
  const int64_t tokens = a.n * a.T, halves = a.guided ? 2 : 1, columns = round_up(a.d, Dot::kLanes);
  if (tokens == 0) return;
  const int64_t line = a.patch ? a.W / a.patch : tokens, lines = tokens / line;
  const int64_t want = (halves * tokens * a.d * (a.outputs + kRows) + kGrain - 1) / kGrain;
  int64_t rows = kTileBytes / int64_t(sizeof(E)) / (columns * halves) / kRows * kRows;
  rows = smaller(rows < kRows ? kRows : rows, kMostRows);
  rows = smaller(rows, round_up((tokens + a.threads - 1) / a.threads, kRows));  // a tile for every thread
  const int64_t tiles = (line + rows - 1) / rows;                              // of a line
  rows = round_up((line + tiles - 1) / tiles, kRows);                          // in each about as many
  const int parts = int(smaller(smaller(want, a.threads), lines * tiles));

  const bool convert = a.weight.type != Dot::kType || columns != a.d;
  Shared<Dot> s{static_cast<const E*>(a.weight.p), a.weight.stride, nullptr, nullptr, nullptr};
  E* weight;
  X* vectors[3];
  const Rows given[3] = {a.bias, a.norm_weight, a.norm_bias};
  const int64_t length[3] = {a.outputs, a.d, a.d};
  const int64_t place = round_up(rows * (a.patch ? a.patch : a.outputs), L) * (a.patch ? a.C * a.patch : 1);
  char* memory = nullptr;
  Scratch<Dot> first{};
  size_t step = 0;
  for (int pass = 0; pass < 2; pass++) {  // how much, then where
    Arena arena{memory};
    weight = arena.take<E>(convert ? a.outputs * columns : 0);
    for (int i = 0; i < 3; i++) vectors[i] = arena.take<X>(given[i].p ? round_up(length[i], L) : 0);
    const size_t before = arena.used;
    first = {arena.take<E>(halves * rows * columns), arena.take<X>(place),
             arena.take<double>(a.outputs * halves * rows), arena.take<X>(is_plain(a) ? 0 : columns),
             arena.take<X>(is_plain(a) ? 0 : columns)};
    step = arena.used - before;
    if (!memory) memory = static_cast<char*>(allocate(before + step * size_t(parts)));
  }

  for (int i = 0; i < 3; i++)
    if (given[i].p) widen(given[i].p, given[i].type, 0, length[i], vectors[i]);
  s.bias = given[0].p ? vectors[0] : nullptr;
  s.norm_weight = given[1].p ? vectors[1] : nullptr;
  s.norm_bias = given[2].p ? vectors[2] : nullptr;
  if (convert) {
    parallel(a.outputs * a.d < kGrain ? 1 : parts, [&](int p) {
      const int64_t shares = a.outputs * a.d < kGrain ? 1 : parts;
      for (int64_t o = a.outputs * p / shares; o < a.outputs * (p + 1) / shares; o++)
        widen(a.weight.p, a.weight.type, o * a.weight.stride, a.d, weight + o * columns);
    });
    s.weight = weight, s.weight_row = columns;
  }

  parallel(parts, [&](int p) {
    auto own = [&](auto* t) { return reinterpret_cast<decltype(t)>(reinterpret_cast<char*>(t) + step * size_t(p)); };
    const Scratch<Dot> scratch{own(first.tile), own(first.place), own(first.sums), own(first.by), own(first.to)};
    const int64_t end = lines * tiles * (p + 1) / parts;
    for (int64_t i = lines * tiles * p / parts; i < end; i++) {
      const int64_t begin = i % tiles * rows;
      token_tile<D>(a, s, scratch, i / tiles * line + begin, smaller(rows, line - begin));
    }
  });
  release(memory);
}

}  // namespace
}  // namespace FK_ISA
}  // namespace fk

// j ascends, so that V(s, j, k) has what it needs for every s, and each cost is read once, in order along k: kRows
// values of i at a time, a vector of k, and for it all s. What the sums add to a cost, V(s-1, i, j) for all i, is a
// column of the tables: those of kTile values of j are gathered at once. i ascends and only a strictly smaller sum
// replaces, so ties go to the smaller i on every instruction set.
#include "bellman_pairs/bellman_pairs.h"
#include "common/memory.h"
#include "common/simd.h"

namespace fk {
namespace FK_ISA {
namespace {

typedef int64_t vi __attribute__((vector_size(kVectorBytes)));
typedef int64_t vi_mem __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
constexpr int L = kVectorBytes / 8, kRows = kVectorBytes == 64 ? 8 : 4;
constexpr int64_t kTile = 8;
const double inf = __builtin_inf();

FK_INLINE int64_t up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// V(s, j, k) for all s and k, by way of best and from, of steps + 1 rows of up(n, L); base has V(s-1, i, j) at [s, i],
// rows `pitch` apart, and Inf from i = j on. Whether all costs were numbers.
bool row(const BellmanPairsArgs& a, int64_t j, const double* base, int64_t pitch, double* best, int64_t* from) {
  const int64_t n = a.n, begin = j + 1, width = n - begin, w = up(width, L), top = a.steps < begin ? a.steps : begin;
  for (int64_t x = 2 * w; x < (top + 1) * w; x++) best[x] = inf, from[x] = -1;
  vi past, numbers = vi{} - 1;  // past: lanes of the last vector behind the end of a row, where the next one begins
  for (int l = 0; l < L; l++) past[l] = w - L + l < width ? 0 : -1;
  for (int64_t i = 0; i < j; i += kRows) {
    const double* rows[kRows];
    for (int r = 0; r < kRows; r++) rows[r] = a.cost + ((i + r < j ? i + r : j - 1) * n + j) * n + begin;
    const int64_t next = kRows * n * n;
    // a pair (0, j) ends one step and no other; knot i > 0 is at most the i-th of a path
    const int64_t first = i ? 3 : 2, last = top < i + kRows + 1 ? top : i + kRows + 1;
    for (int64_t k = 0; k < w; k += L) {
      const vi unread = k + L < w ? vi{} : past;
      vd c[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        c[r] = load(rows[r] + k);
        numbers &= (c[r] > -inf) | unread;
        __builtin_prefetch(rows[r] + next + k);  // on other pages, which the processor does not foresee
      }
      for (int64_t s = first; s <= last; s++) {
        const double* before = base + s * pitch + i;
        vd least = load(best + s * w + k);
        vi of = *(const vi_mem*)(from + s * w + k);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
          const vd sum = before[r] + c[r];
          const vi better = sum < least;
          least = better ? sum : least;
          of = better ? vi{} + (i + r) : of;
        }
        store(best + s * w + k, least);
        *(vi_mem*)(from + s * w + k) = of;
      }
    }
  }
  for (int64_t s = 0; s <= a.steps; s++) {
    double* value = a.value + (s * n + j) * n;
    int64_t* parent = a.parent + (s * n + j) * n;
    const bool reached = s >= 2 && s <= top;
    for (int64_t k = 0; k < (reached ? begin : n); k++) value[k] = inf, parent[k] = -1;
    if (reached) {
      memcpy(value + begin, best + s * w, size_t(width) * sizeof(double));
      memcpy(parent + begin, from + s * w, size_t(width) * sizeof(int64_t));
    }
  }
  for (int l = 0; l < L; l++)
    if (!numbers[l]) return false;
  return true;
}

int64_t first_bad_cost(const BellmanPairsArgs& a) {
  for (int64_t i = 0; i < a.n; i++)
    for (int64_t j = i + 1; j < a.n; j++)
      for (int64_t k = j + 1, at = (i * a.n + j) * a.n; k < a.n; k++)
        if (!(a.cost[at + k] > -inf)) return a.n + at + k;
  return -1;
}

}  // namespace

int64_t bellman_pairs(const BellmanPairsArgs& a) {
  const int64_t n = a.n, S = a.steps + 1, pitch = up(n, kRows), each = S * up(n, L);
  for (int64_t k = 1; k < n; k++)
    if (!(a.first[k] > -inf)) return k;
  // [kTile, S, pitch], then best and from
  double* columns = static_cast<double*>(allocate(size_t(kTile * S * pitch + 2 * each) * sizeof(double)));
  double* best = columns + kTile * S * pitch;
  bool numbers = true;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t end = begin + kTile < n ? begin + kTile : n;
    auto column = [&](int64_t j, int64_t s) { return columns + ((j - begin) * S + s) * pitch; };
    for (int64_t s = 2; s < S; s++) {
      const double* before = a.value + (s - 1) * n * n;
      for (int64_t i = 0; i < begin; i++)
        for (int64_t j = begin; j < end; j++) column(j, s)[i] = before[i * n + j];
      for (int64_t j = begin; j < end; j++)
        for (int64_t i = begin; i < pitch; i++) column(j, s)[i] = inf;
    }
    for (int64_t j = begin; j < end; j++) {
      numbers &= row(a, j, column(j, 0), pitch, best, (int64_t*)(best + each));
      double* one = a.value + n * n;
      for (int64_t k = 1; k < n && j == 0; k++) one[k] = a.first[k];
      for (int64_t k = j + 1; k < end; k++)
        for (int64_t s = 2; s < S; s++) column(k, s)[j] = a.value[((s - 1) * n + j) * n + k];
    }
  }
  a.value[0] = 0;
  release(columns);
  return numbers ? -1 : first_bad_cost(a);
}

}  // namespace FK_ISA
}  // namespace fk

// Two kernels, and the sum of what their blocks leave.
//
// Increments alone, of float32 or shorter velocities, go through the tensor cores. A block takes columns, all rows of
// them: each byte is read once. Every increment, taken in float32, is split into two halves of 11 bits,
// s a = hi + lo, where the power of two s belongs to the row: it brings the largest of the block's first columns into
// the upper part of half's range, and is lowered, the sums with it, when a larger one comes. What half cannot hold is
// below 2^-33 of the largest so far, so that the two parts do for a row of any size. <a_i, a_j> is summed from three
// products, hi hi + hi lo + lo hi; lo lo is below 2^-24 |a_i| |a_j|. The unit adds in float32 and truncates, so that
// its sums move on after 32 columns, to ordinary float32.
//
//   v [K, M] --loaders: columns of four, down the rows--> differences, split --> hi, lo [rows, columns] of two slabs
//   --the other warps: tiles of 32 x 32 sums, upper triangle, in registers--> a partial sum for each block
//   --in float64, in a fixed order--> gram
//
// Loaders form one slab while the others multiply the one before; one barrier a slab. An increment is formed once.
//
// float64 velocities, and rows from states (secants differ in few digits: float64 until they have been subtracted), go
// through a kernel without tensor cores. With more than 128 rows, both multiply pairs of panels of rows.
#include "common/cuda.h"
#include "velocity_gram/plan.h"
#include "velocity_gram/velocity_gram.h"

namespace fk {
namespace cuda {
namespace {

using gram::ceil_div;
using gram::pairs;

// The p-th of (0, 0), (0, 1), (1, 1), (0, 2), ..
__device__ __forceinline__ void pair_of(int p, int& i, int& j) {
  for (j = 0; p > j; j++) p -= j + 1;
  i = p;
}
__device__ __forceinline__ int index_of(int i, int j) {
  return j * (j + 1) / 2 + i;
}

// ---- increments on tensor cores ----

constexpr int kTile = gram::kBand;  // rows and columns of a warp's sums; also the columns that it adds up at a time
constexpr int kLaneSums = 32;    // of a tile, in each lane
constexpr int kMostRows = gram::kMostRows;
constexpr int kLow = 1 << 14;    // bytes from hi to lo
constexpr int kSlab = 2 * kLow;  // of both
constexpr int kBlockBarrier = 1, kTileBarrier = 2;

// A slab is 128 rows of 64 columns; 256 of 32 where two panels are multiplied with each other.
template <bool two>
constexpr int kColumns = two ? 32 : 64;
template <bool two>
constexpr int kRows = two ? 2 * kMostRows : kMostRows;
template <bool two>
constexpr int kRun = two ? 8 : 12;  // increments that a lane forms, one below the other
template <bool two>
constexpr int kMostThreads = two ? 640 : 512;  // of 96 registers, 128

// How a block is cut: in warps that load, and warps that have a tile each. It takes one panel of rows, or two where
// panels are multiplied with each other. Panels of up to 64 rows leave room in a slab for groups of columns.
struct Cut {
  int panels, panel_rows;  // that the rows make; 16 or a multiple of 32
  int across;              // tiles along a panel
  int tiles;               // of a block
  int groups;              // of columns in a slab; as many warps have a tile
  int runs;                // of rows in a group
  int loaders;
  int aligned;       // whether rows can be read by four
  uint64_t jobs[2];  // a byte for each warp: its tile + tiles * group; or ~loader

  __host__ __device__ int multipliers() const { return tiles * groups; }
  int warps() const { return multipliers() + loaders; }
  __device__ int job(int warp) const { return int8_t((warp < 8 ? jobs[0] : jobs[1]) >> warp % 8 * 8); }
};

// Parts in shared memory: two slabs; scales [rows] and what they were multiplied by for each slab [2, rows]; whether a
// loader has lowered one for it [2, 8]. At the end slabs make room for what warps exchange.
template <bool two>
constexpr int kShared = 2 * kSlab + 4 * (3 * kRows<two> + 16);

template <class V, bool two>
Cut cut_for(const VelocityGramArgs& g) {
  const int64_t R = g.K - 1;
  Cut c;
  c.panels = int(ceil_div(R, kMostRows));
  c.panel_rows = R <= 16 ? 16 : int(ceil_div(ceil_div(R, c.panels), kTile) * kTile);
  c.across = int(ceil_div(c.panel_rows, kTile));
  c.tiles = two ? c.across * c.across : int(pairs(c.across));
  c.groups = two || c.panel_rows > 64 ? 1 : kMostRows / c.panel_rows;
  c.runs = int(ceil_div(c.panels > 1 ? c.panel_rows : R, kRun<two>));
  c.loaders = two ? 4 : int(ceil_div(c.runs * c.groups, 2));
  c.aligned = reinterpret_cast<uintptr_t>(g.v) % (4 * sizeof(V)) == 0 && g.v_stride % 4 == 0;

  // Each of a multiprocessor's four schedulers has every fourth warp: the same share of quarters of tiles for each,
  // the largest first.
  auto quarters = [&](int tile) {
    int j = 0;
    for (; tile > j; j++) tile -= j + 1;
    const bool narrow = c.panels == 1 && R - j * kTile <= 16;
    return tile == j ? (narrow ? 1 : 3) : narrow ? 2 : 4;
  };
  int share[4] = {}, taken[4] = {}, loader = 0;
  c.jobs[0] = c.jobs[1] = 0;
  auto give = [&](int scheduler, int job) {
    const int warp = scheduler + 4 * taken[scheduler]++;
    c.jobs[warp / 8] |= uint64_t(uint8_t(job)) << warp % 8 * 8;
  };
  auto free = [&](int scheduler) { return scheduler + 4 * taken[scheduler] < c.warps(); };
  for (int size = 4; !two && size > 0; size--)
    for (int job = 0; job < c.multipliers(); job++) {
      if (quarters(job % c.tiles) != size) continue;
      int least = -1;
      for (int k = 0; k < 4; k++)
        if (free(k) && (least < 0 || share[k] < share[least])) least = k;
      share[least] += size;
      give(least, job);
    }
  for (int k = 0; !two && k < 4; k++)
    while (free(k)) give(k, ~loader++);
  return c;
}

// Where 8 columns of a row of hi begin, a word of 16 bytes. Words are moved about so that those of eight rows are in
// different banks, and so is what the lanes of a loader store at once.
template <bool two>
__device__ __forceinline__ int word_at(int row, int word) {
  if constexpr (two)
    return row / 2 * 128 + ((row ^ row / 8) & 1) * 64 + (word ^ (row / 2 % 4)) * 16;
  else
    return row * 128 + (word ^ (row % 8)) * 16;
}
// .. that word r rows further down, from a multiple of kRun on
template <bool two>
__device__ __forceinline__ int rows_below(int at, int r) {
  return two ? (at ^ (r % 2 * 64 + r / 2 % 4 * 16)) + r / 2 * 128 : (at ^ (r % 8 * 16)) + r * 128;
}
template <bool two>
__device__ __forceinline__ void fragment(uint32_t (&f)[4], const unsigned char* at, int part) {
  ldmatrix_x4(f, at + part * 16 * 2 * kColumns<two>);
}

// 16 rows of the left, 16 of the right
__device__ __forceinline__ void multiply(float (&first)[4], float (&second)[4], const uint32_t (&left)[4],
                                         const uint32_t (&right)[4]) {
  mma_m16n8k16<half>(first, left, {right[0], right[1]});
  mma_m16n8k16<half>(second, left, {right[2], right[3]});
}

// Whether a quarter of a tile is wanted. A narrow tile has 16 columns in use, and on the diagonal 16 rows; there the
// quarter below it is left out.
struct Shape {
  bool narrow, diagonal;
  __device__ __forceinline__ bool quarter(int i, int j) const {
    return (j == 0 || !narrow) && (i == 0 || j == 1 || !diagonal);
  }
};

// hi lo, hi hi and lo hi of 16 columns of a tile
template <bool two>
__device__ __forceinline__ void step(float (&sums)[2][4][4], const unsigned char* left, const unsigned char* right,
                                     bool narrow) {
  uint32_t a[2][4], b[2][4], low[4];
#pragma unroll
  for (int i = 0; i < 2; i++) fragment<two>(a[i], left, i);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    if (j == 1 && narrow) continue;
    fragment<two>(low, right + kLow, j);
#pragma unroll
    for (int i = 0; i < 2; i++) multiply(sums[i][2 * j], sums[i][2 * j + 1], a[i], low);
  }
#pragma unroll
  for (int j = 0; j < 2; j++) {
    if (j == 1 && narrow) continue;
    fragment<two>(b[j], right, j);
#pragma unroll
    for (int i = 0; i < 2; i++) multiply(sums[i][2 * j], sums[i][2 * j + 1], a[i], b[j]);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    fragment<two>(low, left + kLow, i);
#pragma unroll
    for (int j = 0; j < 2; j++)
      if (j == 0 || !narrow) multiply(sums[i][2 * j], sums[i][2 * j + 1], low, b[j]);
  }
}

// The same of a tile on the diagonal, whose rows are read once: a right operand has a left one's words in another
// order.
template <bool two>
__device__ __forceinline__ void step(float (&sums)[2][4][4], const unsigned char* rows, bool narrow) {
  uint32_t a[2][4], low[2][4];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (i == 1 && narrow) continue;
    fragment<two>(a[i], rows, i);
    fragment<two>(low[i], rows + kLow, i);
    auto add = [&](const uint32_t (&l)[2][4], const uint32_t (&r)[4]) {
#pragma unroll
      for (int k = 0; k <= i; k++) multiply(sums[k][2 * i], sums[k][2 * i + 1], l[k], {r[0], r[2], r[1], r[3]});
    };
    add(a, low[i]), add(a, a[i]), add(low, a[i]);
  }
}

// s that makes an increment of this size 2^9 to 2^10; 2^126 at most. An infinity stays one and leaves no number in lo.
__device__ __forceinline__ float scale_for(float most) {
  return __uint_as_float((263u - max(__float_as_uint(most) >> 23, 10u)) << 23);
}
__device__ __forceinline__ float inverse(float scale) {
  return __uint_as_float((254u << 23) - __float_as_uint(scale));
}
constexpr float kTooLarge = 32768, kFirstScale = 0x1p126f;

// Grid: the splits of the columns x the panels, or pairs of different panels.
template <class V, bool two>
__global__ void __launch_bounds__(kMostThreads<two>, 1)
    velocity_gram_increments_kernel(const V* __restrict__ v,  // [K, M], rows `stride` apart
                                    int64_t stride, int K, int64_t M, Cut c,
                                    float* __restrict__ partial) {  // [splits, tiles, 32 sums, 32 lanes]
  constexpr int columns = kColumns<two>, rows = kRows<two>;
  FK_DYNAMIC_SHARED(unsigned char, parts);
  float* scales = reinterpret_cast<float*>(parts + 2 * kSlab);
  float* ratios = scales + rows;
  unsigned* lowered = reinterpret_cast<unsigned*>(ratios + 2 * rows);
  const int R = K - 1, threads = 32 * (c.tiles * c.groups + c.loaders),
            warp = __shfl_sync(~0u, int(threadIdx.x / 32), 0),
            job = !two             ? c.job(warp)
                  : warp < c.tiles ? warp
                                   : ~(warp - c.tiles);
  // Both kinds of warps find this out for themselves, which leaves them the registers.
  struct Share {
    int first_i, first_j, slabs, columns;
    int64_t begin;
  };
  auto share = [&] {
    Share s;
    s.first_i = s.first_j = blockIdx.y * c.panel_rows;
    if constexpr (two) {
      pair_of(blockIdx.y, s.first_i, s.first_j);
      s.first_i *= c.panel_rows, s.first_j = (s.first_j + 1) * c.panel_rows;
    }
    const unsigned bands = unsigned((M + kTile - 1) / kTile), each = bands / gridDim.x, more = bands % gridDim.x;
    s.begin = int64_t(blockIdx.x * each + min(blockIdx.x, more)) * kTile;
    const int64_t left = M - s.begin;
    s.columns = int(min(left, int64_t(each + (blockIdx.x < more)) * kTile));
    s.slabs = (s.columns + columns * c.groups - 1) / (columns * c.groups);
    return s;
  };

  // also for rows that no loader has, and loaders that there are not
  for (int i = threadIdx.x; i < 2 * kSlab / 16; i += threads) reinterpret_cast<uint4*>(parts)[i] = {};
  for (int i = threadIdx.x; i < 3 * rows; i += threads) scales[i] = i < rows ? kFirstScale : 1;
  if (threadIdx.x < 16) lowered[threadIdx.x] = 0;
  __syncthreads();

  if (job < 0) {  // a loader: its lanes have four columns each of a run of rows, of two runs where there are two panels
    constexpr int run = kRun<two>, lanes = columns / 4, passes = two ? 2 : 1;
    V raw[run + 1][4] = {};
    const Share own = share();
    const int lane = threadIdx.x % 32, loader = ~job, place = loader * (32 / lanes) + lane / lanes,
              group = place / c.runs, row = place % c.runs * run, at = group * c.panel_rows + row;  // in a slab
    auto first_of = [&](int pass) { return two && pass ? own.first_j : own.first_i; };
    auto rows_of = [&](int pass) {  // that there are
      return group < c.groups ? min(R - first_of(pass) - row, min(run, c.panel_rows - row)) : 0;
    };
    // An item's rows into registers. No thread is the 1,024th: that adds nothing to n, but nothing that follows from n
    // is kept from item to item.
    auto load = [&](int item) {
      const int slab = item / passes, pass = item % passes, n = rows_of(pass) + (thread_again() >> 10);
      const int m = slab * (columns * c.groups) + group * columns + thread_again() % lanes * 4;
      if (slab >= own.slabs || n <= 0) return;
      const V* from = v + (first_of(pass) + row) * stride + own.begin + m;
      if (c.aligned && m + 4 <= own.columns) {
#pragma unroll
        for (int r = 0; r <= run; r++) {
          load_vector(raw[r], from);
          from += r < n ? stride : 0;  // the last row over and over: increments of zero
        }
      } else {
#pragma unroll
        for (int r = 0; r <= run; r++) {
#pragma unroll
          for (int e = 0; e < 4; e++) raw[r][e] = m + e < own.columns ? from[e] : convert<V>(0.f);
          from += r < n ? stride : 0;
        }
      }
    };
    using Increments = float[run][4];
    // for rows with an increment that is too large
    auto lower = [&](const Increments& a, float* scale, float* ratio, int n) {
      __syncwarp();
#pragma unroll
      for (int r = 0; r < run; r++) {
        float most = fmaxf(fmaxf(fabsf(a[r][0]), fabsf(a[r][1])), fmaxf(fabsf(a[r][2]), fabsf(a[r][3])));
#pragma unroll
        for (int other = 1; other < lanes; other *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, other));
        if (lane % lanes == 0 && r < n) {
          const float before = scale[r], s = most * before >= kTooLarge ? scale_for(most) : before;
          scale[r] = s;
          ratio[r] = s * inverse(before);
        }
      }
      __syncwarp();
    };
    // into hi and lo
    auto split = [&](const Increments& increments, const float* scale, int n, int to) {
#pragma unroll
      for (int r = 0; r < run; r++) {
        const float s = r < n ? scale[r] : 0;
        float a[4];
#pragma unroll
        for (int e = 0; e < 4; e++) a[e] = increments[r][e] * s;
        const uint64_t hi = half_pair(a[0], a[1]) | uint64_t(half_pair(a[2], a[3])) << 32;
        half h[4];
        memcpy(h, &hi, sizeof(h));
#pragma unroll
        for (int e = 0; e < 4; e++) a[e] -= widen(h[e]);
        const uint64_t lo = half_pair(a[0], a[1]) | uint64_t(half_pair(a[2], a[3])) << 32;
        unsigned char* p = parts + rows_below<two>(to, r);
        if (r < n) {
          *reinterpret_cast<uint64_t*>(p) = hi;
          *reinterpret_cast<uint64_t*>(p + kLow) = lo;
        }
      }
    };

    unsigned stale = 0;  // ratios that are not 1, a bit for each pass and slab
    bool some = false;
    auto produce = [&](int item) {
      const int pass = item % passes, buffer = item / passes & 1, first = pass * kMostRows + at, n = rows_of(pass);
      const unsigned bit = 1u << (2 * pass + buffer);
      float *scale = scales + first, *ratio = ratios + buffer * rows + first;
      float a[run][4], most = 0;
#pragma unroll
      for (int r = 0; r < run; r++) {
        float of_row = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) {
          a[r][e] = convert<float>(raw[r + 1][e]) - convert<float>(raw[r][e]);
          of_row = fmaxf(of_row, fabsf(a[r][e]));
        }
        most = fmaxf(most, of_row * (r < n ? scale[r] : 0));
      }
      const bool change = __any_sync(~0u, most >= kTooLarge) || item < passes;  // first there is no scale yet
      if (change) lower(a, scale, ratio, n);
      split(a, scale, n, buffer * kSlab + word_at<two>(first, lane % lanes / 2) + lane % 2 * 8);
      if (!change && (stale & bit) && lane % lanes == 0)
#pragma unroll 1
        for (int r = 0; r < n; r++) ratio[r] = 1;
      stale = change ? stale | bit : stale & ~bit;
      some |= change;
      load(item + 1);
      if (pass < passes - 1) return;
      if (lane == 0) lowered[8 * buffer + loader] = some;
      some = false;
      named_barrier(kBlockBarrier, threads);
    };
    load(0);
#pragma unroll 1
    for (int item = 0; item < own.slabs * passes; item++) produce(item);
    named_barrier(kBlockBarrier, threads);
    return;
  }

  const Share own = share();
  const int lane = thread_again() % 32, tile = job % c.tiles, group = job / c.tiles;
  int ti = tile / c.across, tj = tile % c.across;
  if constexpr (!two) pair_of(tile, ti, tj);
  const int left = group * c.panel_rows + ti * kTile, right = (two ? kMostRows : group * c.panel_rows) + tj * kTile;
  const int rest = R - own.first_j - tj * kTile;
  const Shape shape = {rest <= 16, !two && ti == tj};
  float sums[2][4][4] = {};
  auto scale_sums = [&](auto factor) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (shape.quarter(i, j / 2))
#pragma unroll
          for (int e = 0; e < 4; e++)
            sums[i][j][e] = sums[i][j][e] * factor(left + 16 * i + 8 * (e / 2) + lane / 4) *
                            factor(right + 8 * j + e % 2 + 2 * (lane % 4));
  };
  // In a left operand the second 8x8 matrix is the first one's other 8 rows; in a right one, its other 8 columns.
  const int a = word_at<two>(left + lane % 16, lane / 16),
            b = word_at<two>(right + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll 1
  for (int slab = 0; slab < own.slabs; slab++) {
    named_barrier(kBlockBarrier, threads);
    if (rest <= 0) continue;
    const int buffer = slab & 1;
    unsigned any[8];
    load_vector(any, lowered + 8 * buffer);
    if (any[0] | any[1] | any[2] | any[3] | any[4] | any[5] | any[6] | any[7])
      scale_sums([&](int row) { return ratios[buffer * rows + row]; });
    constexpr int steps = two ? 1 : 2;  // at a time, for registers
#pragma unroll 1
    for (int band = 0; band < columns / kTile; band++) {
      float products[2][4][4] = {};
#pragma unroll steps
      for (int k = 0; k < 2; k++) {
        const unsigned char* from = parts + buffer * kSlab;
        const int moved = 64 * band + 32 * k;  // 16 columns on
        if (shape.diagonal)
          step<two>(products, from + (a ^ moved), shape.narrow);
        else
          step<two>(products, from + (a ^ moved), from + (b ^ moved), shape.narrow);
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) sums[i][j][e] += products[i][j][e];
    }
  }
  named_barrier(kBlockBarrier, threads);
  if (rest > 0) scale_sums([&](int row) { return inverse(scales[row]); });

  if (!two && c.groups > 1) {  // the warps that share a tile, in their order
    float* exchange = reinterpret_cast<float*>(parts) + job * kLaneSums * 32 + lane;
#pragma unroll
    for (int k = 0; k < kLaneSums; k++) exchange[k * 32] = sums[k / 16][k / 4 % 4][k % 4];
    named_barrier(kTileBarrier, 32 * c.multipliers());
    if (group) return;
#pragma unroll 1
    for (int other = 1; other < c.groups; other++) {
      exchange += c.tiles * kLaneSums * 32;
#pragma unroll
      for (int k = 0; k < kLaneSums; k++) sums[k / 16][k / 4 % 4][k % 4] += exchange[k * 32];
    }
  }
  if (rest <= 0) return;
  const int across = (R + kTile - 1) / kTile, i = own.first_i / kTile + ti, j = own.first_j / kTile + tj;
  const int64_t to = int64_t(blockIdx.x) * index_of(0, across) + index_of(i, j);
#pragma unroll
  for (int k = 0; k < kLaneSums; k++) partial[(to * kLaneSums + k) * 32 + lane] = sums[k / 16][k / 4 % 4][k % 4];
}

struct IncrementSums {  // where a lane's sums belong
  static constexpr int kSize = kTile, kThreads = 32;
  static __device__ __forceinline__ void place(int k, int lane, int& row, int& column) {
    row = k / 16 * 16 + k / 2 % 2 * 8 + lane / 4;
    column = k / 4 % 4 * 8 + lane % 4 * 2 + k % 2;
  }
};

// ---- float64, and rows from states ----

constexpr int kRowTile = 64;  // rows and columns of a block's sums
constexpr int kRowThreads = 256, kRowSums = 16;  // in each thread: 4 x 4, 16 rows and columns apart
constexpr int kKnots = 256;

struct Knots {  // some of the times, by value
  double t[kKnots];
};
__global__ void velocity_gram_knots_kernel(Knots knots, double* to, int n) {
  const int i = threadIdx.x;
  if (i < n) to[i] = knots.t[i];
}

template <class T>
struct alignas(16) TileRow {
  static constexpr int kWord = 16 / sizeof(T), kColumns = 128 / sizeof(T);
  T c[kColumns + kWord];  // the words of eight rows in different banks
};

// Grid: the splits of the columns x the pairs of tiles of rows.
template <class T, class V>
__global__ void __launch_bounds__(kRowThreads)
    velocity_gram_rows_kernel(const V* __restrict__ v, int64_t v_stride,  // [K, M]
                              const T* __restrict__ x, int64_t x_stride,  // [K+1, M] states, or null
                              const double* __restrict__ t,  // [K+1], with x
                              int K, int64_t M,
                              T* __restrict__ partial) {  // [splits, pairs of tiles, 16 sums, 256 threads]
  using Row = TileRow<T>;
  constexpr int C = Row::kColumns, W = Row::kWord;
  FK_SHARED(Row, rows_i, [kRowTile]);
  FK_SHARED(Row, rows_j, [kRowTile]);
  int I, J;
  pair_of(blockIdx.y, I, J);
  const int thread = threadIdx.x, R = x ? 2 * K - 1 : K - 1;

  auto secant = [&](int i, int64_t m) {
    const T* here = x + i * x_stride + m;
    return (static_cast<double>(here[x_stride]) - static_cast<double>(*here)) / (t[i + 1] - t[i]);
  };
  auto element = [&](int r, int64_t m) {
    if (r >= R || m >= M) return T(0);
    if (!x) return convert<T>(v[(r + 1) * v_stride + m]) - convert<T>(v[r * v_stride + m]);
    if (r < K - 1) return T(secant(r + 1, m) - secant(r, m));
    return T(secant(r - K + 1, m) - convert<double>(v[(r - K + 1) * v_stride + m]));
  };
  auto fill = [&](Row* rows, int first, int64_t m) {
    for (int i = thread; i < kRowTile * C; i += kRowThreads) rows[i / C].c[i % C] = element(first + i / C, m + i % C);
  };

  const int ty = thread / 16, tx = thread % 16;
  const Row *left = rows_i + ty, *right = (I == J ? rows_i : rows_j) + tx;
  T sums[4][4] = {};
  for (int64_t m = int64_t(blockIdx.x) * C; m < M; m += int64_t(gridDim.x) * C) {
    __syncthreads();
    fill(rows_i, I * kRowTile, m);
    if (I != J) fill(rows_j, J * kRowTile, m);
    __syncthreads();
    T products[4][4] = {};
#pragma unroll 1
    for (int c = 0; c < C; c += W) {
      T a[4][W], b[4][W];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        load_vector(a[k], left[16 * k].c + c);
        load_vector(b[k], right[16 * k].c + c);
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int w = 0; w < W; w++) products[i][j] += a[i][w] * b[j][w];
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums[i][j] += products[i][j];
  }
  const int64_t at = (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * kRowSums * kRowThreads + thread;
#pragma unroll
  for (int k = 0; k < kRowSums; k++) partial[at + k * kRowThreads] = sums[k / 4][k % 4];
}

struct RowSums {
  static constexpr int kSize = kRowTile, kThreads = kRowThreads;
  static __device__ __forceinline__ void place(int k, int thread, int& row, int& column) {
    row = thread / 16 + k / 4 * 16;
    column = thread % 16 + k % 4 * 16;
  }
};

// ---- the sum over blocks ----

constexpr int kSumGroups = 8;

// A block takes 32 entries; each of its warps adds up every eighth split.
template <class Sums, class T>
__global__ void __launch_bounds__(32 * kSumGroups)
    velocity_gram_sum_kernel(const T* __restrict__ partial,  // [splits, entries]
                             int own, int other, int panel,  // splits on a panel's diagonal, off it; tiles of a panel
                             int64_t entries, int R,
                             double* __restrict__ gram) {  // [R, R]
  FK_SHARED(double, groups, [kSumGroups][32]);
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t entry = int64_t(blockIdx.x) * 32 + lane;
  constexpr int size = Sums::kSize;
  int I, J, row, column;
  pair_of(int(entry / (size * size)), I, J);
  const int splits = I / panel == J / panel ? own : other;
  double sum = 0;
#pragma unroll 8
  for (int s = group; s < splits; s += kSumGroups) sum += static_cast<double>(partial[s * entries + entry]);
  groups[group][lane] = sum;
  __syncthreads();
  if (group > 0) return;
  for (int g = 1; g < kSumGroups; g++) sum += groups[g][lane];
  Sums::place(int(entry % (size * size)) / Sums::kThreads, int(entry % Sums::kThreads), row, column);
  const int64_t i = I * size + row, j = J * size + column;
  if (i <= j && j < R) gram[i * R + j] = gram[j * R + i] = sum;
}

template <class Sums, class T>
int sum_blocks(const T* partial, int64_t own, int64_t other, int panel, int64_t R, double* gram, void* stream) {
  const int64_t entries = pairs(ceil_div(R, Sums::kSize)) * Sums::kSize * Sums::kSize;
  FK_LAUNCH((velocity_gram_sum_kernel<Sums, T>), dim3(unsigned(entries / 32)), dim3(32 * kSumGroups), 0, stream,
            partial, int(own), int(other), panel, entries, int(R), gram);
  return launched();
}

// ---- launchers ----

int64_t increments_workspace(const VelocityGramArgs& g) {
  const gram::Grids grids = gram::grids_for(g.K, g.M, multiprocessors());
  const int64_t splits = grids.own > grids.other ? grids.own : grids.other;
  return splits * pairs(ceil_div(g.K - 1, kTile)) * kTile * kTile * 4;
}

template <class V>
int launch_increments(const VelocityGramArgs& g, void* stream) {
  const gram::Grids grids = gram::grids_for(g.K, g.M, multiprocessors());
  auto* partial = static_cast<float*>(g.workspace);
  auto run = [&](auto kernel, const Cut& c, int shared, int64_t splits, int64_t blocks) {
    allow_shared(kernel, shared);
    FK_LAUNCH(kernel, dim3(unsigned(splits), unsigned(blocks)), dim3(32 * c.warps()), shared, stream,
              static_cast<const V*>(g.v), g.v_stride, int(g.K), g.M, c, partial);
  };
  const Cut one = cut_for<V, false>(g);
  run(velocity_gram_increments_kernel<V, false>, one, kShared<false>, grids.own, grids.panels);
  if (grids.pairs)
    run(velocity_gram_increments_kernel<V, true>, cut_for<V, true>(g), kShared<true>, grids.other, grids.pairs);
  return sum_blocks<IncrementSums>(partial, grids.own, grids.other, one.across, g.K - 1, g.gram, stream);
}

template <class T>
struct Rows {
  int64_t R, splits, pairs, knots, bytes;  // knots: bytes before the partial sums
};
template <class T>
Rows<T> plan_rows(const VelocityGramArgs& g) {
  Rows<T> p;
  p.R = g.x ? 2 * g.K - 1 : g.K - 1;
  p.pairs = pairs(ceil_div(p.R, kRowTile));
  p.splits = gram::splits_for(g.M, TileRow<T>::kColumns, 2 * multiprocessors(), p.pairs);
  p.knots = g.x ? ceil_div(g.K + 1, 2) * 16 : 0;
  p.bytes = p.knots + p.splits * p.pairs * kRowSums * kRowThreads * int64_t(sizeof(T));
  return p;
}

template <class T, class V>
int launch_rows(const VelocityGramArgs& g, void* stream) {
  const Rows<T> p = plan_rows<T>(g);
  auto* t = static_cast<double*>(g.workspace);
  auto* partial = reinterpret_cast<T*>(static_cast<char*>(g.workspace) + p.knots);
  for (int64_t i = 0; g.x && i <= g.K; i += kKnots) {
    const int n = int(g.K + 1 - i < kKnots ? g.K + 1 - i : kKnots);
    Knots knots = {};
    memcpy(knots.t, g.times + i, size_t(n) * 8);
    FK_LAUNCH(velocity_gram_knots_kernel, dim3(1), dim3(kKnots), 0, stream, knots, t + i, n);
  }
  FK_LAUNCH((velocity_gram_rows_kernel<T, V>), dim3(unsigned(p.splits), unsigned(p.pairs)), dim3(kRowThreads), 0,
            stream, static_cast<const V*>(g.v), g.v_stride, static_cast<const T*>(g.x), g.x_stride, t, int(g.K), g.M,
            partial);
  return sum_blocks<RowSums>(partial, p.splits, p.splits, 1, p.R, g.gram, stream);
}

}  // namespace

int64_t velocity_gram_workspace(const VelocityGramArgs& g) {
  if (g.v_type == Dtype::f64) return plan_rows<double>(g).bytes;
  return g.x ? plan_rows<float>(g).bytes : increments_workspace(g);
}

int velocity_gram(const VelocityGramArgs& g, void* stream) {
  if (g.v_type == Dtype::f64) return launch_rows<double, double>(g, stream);
  return with_type(g.v_type, [&](auto v) {
    using V = typename decltype(v)::type;
    if constexpr (std::is_same_v<V, double>)
      return 0;
    else
      return g.x ? launch_rows<float, V>(g, stream) : launch_increments<V>(g, stream);
  });
}

}  // namespace cuda
}  // namespace fk

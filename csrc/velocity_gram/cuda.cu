// Two kernels, and the sum of what their blocks leave.
//
// Increments alone, of float32 or shorter velocities, go through the tensor cores. A block takes slabs of columns, all
// rows of them: each byte is read once. Every increment, taken in float32, is split into two halves of 11 bits,
// s a = hi + lo, where the power of two s brings the largest of a row's 32 columns near the end of half's range: the
// two parts hold what float32 does, whatever the size of the row. <a_i, a_j> is summed from three products,
// hi hi + hi lo + lo hi; lo lo is below 2^-24 |a_i| |a_j|. The unit adds in float32 and truncates, so that its sums
// move on after 32 columns, to ordinary float32.
//
//   v [K, M] --cp.async--> slab [K, columns] --differences, split--> hi, lo [rows, 32] --tiles of 32 x 32 sums, upper
//   triangle, in registers--> a partial sum for each block --in float64, in a fixed order--> gram
//
// float64 velocities, and rows from states (secants differ in few digits: float64 until they have been subtracted), go
// through a kernel without tensor cores. With more than 128 rows, both multiply pairs of panels of rows.
#include "common/cuda.h"
#include "velocity_gram/velocity_gram.h"

namespace fk {
namespace cuda {
namespace {

constexpr int64_t kMostColumns = 32768;  // that a block adds up in float32

int64_t ceil_div(int64_t n, int64_t d) {
  return (n + d - 1) / d;
}
int64_t pairs(int64_t n) {  // i <= j < n
  return n * (n + 1) / 2;
}
// The p-th of (0, 0), (0, 1), (1, 1), (0, 2), ..
__device__ __forceinline__ void pair_of(int p, int& i, int& j) {
  for (j = 0; p > j; j++) p -= j + 1;
  i = p;
}
__device__ __forceinline__ int index_of(int i, int j) {
  return j * (j + 1) / 2 + i;
}

// ---- increments on tensor cores ----

constexpr int kTile = 32;             // rows and columns of a warp's sums; also the columns that share a scale
constexpr int kLaneSums = 32;         // of a tile, in each lane
constexpr int kMostRows = 128;        // of a panel
constexpr int kMostWarps = 16;        // of a block
constexpr int kRowBytes = 2 * kTile;  // of hi or lo, 32 columns: four words of 16 bytes

// How a block is cut. It takes one panel of rows, or two where panels are multiplied with each other. A slab has
// 128 rows by bands of 32 columns, of either panel.
struct Cut {
  int panels, panel_rows;  // that the rows make; 16 or a multiple of 32
  int across;              // tiles along a panel
  int tiles;               // of a block
  int band_bits;           // log2 of a slab's bands
  int shared_bands;        // whether two warps share a tile and a band, 16 columns each
  int raw_rows, pitch;     // of a slab of velocities, in elements
  int stages;              // slabs in flight or at work
  int aligned;             // whether rows can be copied by 16 bytes
  int slabs;               // no device holds the 2^36 columns that an int could not count

  __host__ __device__ int group_bits() const { return 7 - band_bits; }          // log2 of the rows of hi for a band
  __host__ __device__ int units() const { return 1 << (band_bits + shared_bands); }  // warps on a tile
  int threads() const { return 32 * tiles * units(); }
  __host__ __device__ int columns() const { return kTile << band_bits; }
};

// Parts in shared memory: hi, lo [group, row, 32 columns], scales [group, row], the warps' shares; then the stages,
// or at the end what warps exchange.
template <bool two>
constexpr int kGroupRows = two ? 2 * kMostRows : kMostRows;
template <bool two>
constexpr int kLow = kGroupRows<two> * kRowBytes;  // from hi to lo
template <bool two>
constexpr int kParts = 2 * kLow<two> + 4 * (kGroupRows<two> + kMostWarps);
// Two blocks of 320 on a multiprocessor leave a thread 96 registers; one of 512, 128.
template <bool two>
constexpr int kMostThreads = two ? 512 : 640;

template <class V, bool two>
int shared_bytes(const Cut& c) {
  const int work = kParts<two> + c.stages * c.raw_rows * c.pitch * int(sizeof(V));
  const int exchange = c.units() > 1 ? c.threads() * kLaneSums * 4 : 0;
  return work > exchange ? work : exchange;
}

template <class V, bool two>
Cut cut_for(const VelocityGramArgs& g) {
  const int64_t R = g.K - 1;
  Cut c;
  c.panels = int(ceil_div(R, kMostRows));
  c.panel_rows = R <= 16 ? 16 : int(ceil_div(ceil_div(R, c.panels), kTile) * kTile);
  c.across = int(ceil_div(c.panel_rows, kTile));
  c.tiles = two ? c.across * c.across : int(pairs(c.across));
  c.band_bits = c.panel_rows == 16 ? 3 : c.panel_rows == 32 ? 2 : c.panel_rows == 64 ? 1 : 0;
  c.shared_bands = c.panel_rows == 32;
  c.raw_rows = c.panels == 1 ? int(g.K) : (two ? 2 : 1) * (c.panel_rows + 1);
  // neighbouring rows of 32 short velocities are in different banks
  c.pitch = c.columns() + (sizeof(V) == 2 && c.band_bits ? kTile : 0);
  c.slabs = int(ceil_div(g.M, c.columns()));
  c.aligned = reinterpret_cast<uintptr_t>(g.v) % 16 == 0 && g.v_stride * sizeof(V) % 16 == 0;
  // as many slabs in flight as leave room for the blocks that registers allow
  const int blocks = kMostThreads<two> / c.threads(), room = (shared_limit() + 1024) / blocks - 1024;
  for (c.stages = 4; c.stages > 2 && shared_bytes<V, two>(c) > room;) c.stages--;
  return c;
}

// Where a lane's row of hi begins that it gives to ldmatrix for 16 rows and the k-th 16 columns. The words of 16 bytes
// are moved about in a row, so that those of eight rows are in different banks. In a left operand the second 8x8 matrix
// is the first one's other 8 rows; in a right one, its other 8 columns.
__device__ __forceinline__ int word_at(int row, int word) {
  return row * kRowBytes + (word ^ (row / 2 % 4)) * 16;
}
__device__ __forceinline__ int left_at(int lane, int k) {
  return word_at(lane % 16, 2 * k + lane / 16);
}
__device__ __forceinline__ int right_at(int lane, int k) {
  return word_at(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
}
__device__ __forceinline__ void fragment(uint32_t (&f)[4], const unsigned char* at, int part) {
  ldmatrix_x4(f, at + part * 16 * kRowBytes);
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
  __device__ __forceinline__ bool row(int i) const { return i == 0 || !narrow || !diagonal; }
  __device__ __forceinline__ bool column(int j) const { return j == 0 || !narrow; }
  __device__ __forceinline__ bool quarter(int i, int j) const { return column(j) && (i == 0 || j == 1 || !diagonal); }
};

// hi lo, hi hi and lo hi of 16 columns of a tile
template <int low>
__device__ __forceinline__ void step(float (&sums)[2][4][4], const unsigned char* left, const unsigned char* right,
                                     Shape shape) {
  uint32_t a[2][4], b[2][4], lo[4];
  auto add = [&](int i, int j, const uint32_t (&l)[4], const uint32_t (&r)[4]) {
    if (shape.quarter(i, j)) multiply(sums[i][2 * j], sums[i][2 * j + 1], l, r);
  };
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (shape.row(i)) fragment(a[i], left, i);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    if (shape.column(j)) fragment(lo, right + low, j);
#pragma unroll
    for (int i = 0; i < 2; i++) add(i, j, a[i], lo);
  }
#pragma unroll
  for (int j = 0; j < 2; j++) {
    if (shape.column(j)) fragment(b[j], right, j);
#pragma unroll
    for (int i = 0; i < 2; i++) add(i, j, a[i], b[j]);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (shape.row(i)) fragment(lo, left + low, i);
#pragma unroll
    for (int j = 0; j < 2; j++) add(i, j, lo, b[j]);
  }
}

// Four increments into their parts; eight lanes have the row's 32 columns. Returns 1 / s.
__device__ __forceinline__ float split(const float (&a)[4], uint64_t& hi, uint64_t& lo) {
  float most = fmaxf(fmaxf(fabsf(a[0]), fabsf(a[1])), fmaxf(fabsf(a[2]), fabsf(a[3])));
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
  // s = 2^(14 - exponent of the largest), 2^127 at most; an infinity stays one and leaves no number in lo
  const unsigned exponent = max(__float_as_uint(most) >> 23, 15u);
  const float s = __uint_as_float((268u - exponent) << 23);
  float rest[4];
#pragma unroll
  for (int c = 0; c < 4; c++) rest[c] = a[c] * s;
  hi = half_pair(rest[0], rest[1]) | uint64_t(half_pair(rest[2], rest[3])) << 32;
  half h[4];
  memcpy(h, &hi, sizeof(h));
#pragma unroll
  for (int c = 0; c < 4; c++) rest[c] -= widen(h[c]);
  lo = half_pair(rest[0], rest[1]) | uint64_t(half_pair(rest[2], rest[3])) << 32;
  return __uint_as_float((exponent - 14u) << 23);
}

// Grid: the splits of the columns x the panels, or pairs of different panels.
template <class V, bool two>
__global__ void __launch_bounds__(kMostThreads<two>)
    velocity_gram_increments_kernel(const V* __restrict__ v,  // [K, M], rows `stride` apart
                                    int64_t stride, int K, int64_t M, Cut c,
                                    float* __restrict__ partial) {  // [splits, tiles, 32 sums, 32 lanes]
  constexpr int low = kLow<two>;
  FK_DYNAMIC_SHARED(unsigned char, parts);
  float* scales = reinterpret_cast<float*>(parts + 2 * low);
  int* shares = reinterpret_cast<int*>(scales + kGroupRows<two>);
  V* raw = reinterpret_cast<V*>(parts + kParts<two>);
  const int R = K - 1;
  int first_i = blockIdx.y * c.panel_rows, first_j = first_i;
  if constexpr (two) {
    pair_of(blockIdx.y, first_i, first_j);
    first_i *= c.panel_rows, first_j = (first_j + 1) * c.panel_rows;
  }

  // a slab's velocities on their way into a stage; beyond the last column they are zero
  auto fetch = [&](int slab, int stage) {
    const int64_t m = int64_t(slab) * c.columns();
    const int thread = thread_again(), threads = blockDim.x;
    V* to = raw + stage * (c.raw_rows * c.pitch);
    auto row_of = [&](int r) { return two && r > c.panel_rows ? first_j + r - c.panel_rows - 1 : first_i + r; };
    if (c.aligned) {
      constexpr int E = 16 / sizeof(V);
      const int bits = c.band_bits + (E == 4 ? 3 : 2);  // log2 of a row's words of 16 bytes
#pragma unroll 1
      for (int i = thread; i < c.raw_rows << bits; i += threads) {
        const int r = i >> bits, row = row_of(r), at = E * (i & ((1 << bits) - 1));
        const int64_t left = M - m - at;
        if (row < K)
          cp_async16(to + r * c.pitch + at, left > 0 ? v + row * stride + m + at : v,
                     left >= E  ? 16
                     : left > 0 ? left * sizeof(V)
                                : 0);
      }
    } else {
      const int bits = c.band_bits + 5;
#pragma unroll 4
      for (int i = thread; i < c.raw_rows << bits; i += threads) {
        const int r = i >> bits, row = row_of(r), at = i & ((1 << bits) - 1);
        if (row < K) to[r * c.pitch + at] = at < M - m ? v[row * stride + m + at] : convert<V>(0.f);
      }
    }
  };

  // its increments into hi, lo and scales; rows that do not exist are zero
  auto take = [&](int stage) {
    const int thread = thread_again(), threads = blockDim.x, lane = thread % 32;
    const V* from = raw + stage * (c.raw_rows * c.pitch) + 4 * (lane % 8);
    const int items = two ? kMostRows + c.panel_rows : c.band_bits ? kMostRows : c.panel_rows;
#pragma unroll 1
    for (int i = thread / 8; i < items; i += threads / 8) {
      const int group = i >> c.group_bits(), row = i & ((1 << c.group_bits()) - 1);
      float a[4] = {};
      if (row < c.panel_rows && (two && group ? first_j : first_i) + row < R) {
        const V* at = from + (two ? row + group * (c.panel_rows + 1) : row) * c.pitch + (two ? 0 : group * kTile);
        V last[4], next[4];
        load_vector(last, at);
        load_vector(next, at + c.pitch);
#pragma unroll
        for (int e = 0; e < 4; e++) a[e] = convert<float>(next[e]) - convert<float>(last[e]);
      }
      uint64_t hi, lo;
      const float scale = split(a, hi, lo);
      unsigned char* to = parts + (i - row) * kRowBytes + word_at(row, lane % 8 / 2) + lane % 2 * 8;
      *reinterpret_cast<uint64_t*>(to) = hi;
      *reinterpret_cast<uint64_t*>(to + low) = lo;
      if (lane % 8 == 0) scales[i] = scale;
    }
  };

  // a warp's tile and its share of a slab, in one word that it reads again for every slab: rows of hi to the left and
  // to the right; columns, all 32 or the first or last 16; whether the tile is used, is narrow, is on the diagonal
  auto share_of = [&](int warp) {
    const int unit = warp / c.tiles, tile = warp % c.tiles;
    int ti = tile / c.across, tj = tile % c.across;
    if constexpr (!two) pair_of(tile, ti, tj);
    const int band = two ? 0 : (unit >> c.shared_bands) << c.group_bits(), rest = R - first_j - tj * kTile;
    return (band + ti * kTile) | ((two ? kMostRows : band) + tj * kTile) << 8 |
           (c.shared_bands ? 1 + unit % 2 : 0) << 16 | (rest > 0) << 18 | (rest <= 16) << 19 | (!two && ti == tj) << 20;
  };
  if (threadIdx.x < kMostWarps) shares[threadIdx.x] = share_of(threadIdx.x);
  float sums[2][4][4] = {};
  auto add_products = [&] {
    const int thread = thread_again(), lane = thread % 32, mine = shares[thread / 32], left = mine & 255,
              right = mine >> 8 & 255;
    if (!(mine >> 18 & 1)) return;
    float products[2][4][4] = {};
    const int columns = mine >> 16 & 3;
    const Shape shape = {bool(mine >> 19 & 1), bool(mine >> 20)};
    int a = left * kRowBytes + left_at(lane, columns / 2), b = right * kRowBytes + right_at(lane, columns / 2);
#pragma unroll 1
    for (int k = columns ? 1 : 2; k > 0; k--) {
      step<low>(products, parts + a, parts + b, shape);
      a ^= 32, b ^= 32;  // the other 16 columns
    }
    // with panels of 16 rows, the last scales are the 16 words after them, for products that nobody wants
    const float *row_scales = scales + left + lane / 4, *column_scales = scales + right + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          sums[i][j][e] += products[i][j][e] * row_scales[16 * i + 8 * (e / 2)] * column_scales[8 * j + e % 2];
  };

  const int splits = gridDim.x, ahead = c.stages - 1;
  int slab = blockIdx.x, stage = 0;
#pragma unroll 1
  for (int s = 0; s < ahead; s++) {
    if (slab + s * splits < c.slabs) fetch(slab + s * splits, s);
    cp_async_commit();
  }
#pragma unroll 1
  for (; slab < c.slabs; slab += splits) {
    if (ahead == 1)
      cp_async_wait<0>();
    else if (ahead == 2)
      cp_async_wait<1>();
    else
      cp_async_wait<2>();
    __syncthreads();  // this slab is there; the parts of the one before have been used, and its stage
    if (slab + ahead * splits < c.slabs) fetch(slab + ahead * splits, stage == 0 ? ahead : stage - 1);
    cp_async_commit();
    take(stage);
    stage = stage == ahead ? 0 : stage + 1;
    __syncthreads();
    add_products();
  }

  const int warp = thread_again() / 32, lane = thread_again() % 32;
  if (!two && c.units() > 1) {  // the warps that share a tile, in their order
    float* exchange = reinterpret_cast<float*>(parts) + warp * kLaneSums * 32 + lane;
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kLaneSums; k++) exchange[k * 32] = sums[k / 16][k / 4 % 4][k % 4];
    __syncthreads();
    if (warp >= c.tiles) return;
#pragma unroll 1
    for (int other = 1; other < c.units(); other++) {
      exchange += c.tiles * kLaneSums * 32;
#pragma unroll
      for (int k = 0; k < kLaneSums; k++) sums[k / 16][k / 4 % 4][k % 4] += exchange[k * 32];
    }
  }
  const int mine = share_of(warp);
  if (!(mine >> 18 & 1)) return;
  const int across = (R + kTile - 1) / kTile;
  const int i = (first_i + (mine & 127)) / kTile, j = (first_j + (mine >> 8 & 127)) / kTile;
  const int64_t at = int64_t(blockIdx.x) * index_of(0, across) + index_of(i, j);
#pragma unroll
  for (int k = 0; k < kLaneSums; k++) partial[(at * kLaneSums + k) * 32 + lane] = sums[k / 16][k / 4 % 4][k % 4];
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
                             int splits, int64_t entries, int R,
                             double* __restrict__ gram) {  // [R, R]
  FK_SHARED(double, groups, [kSumGroups][32]);
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t entry = int64_t(blockIdx.x) * 32 + lane;
  double sum = 0;
#pragma unroll 8
  for (int s = group; s < splits; s += kSumGroups) sum += static_cast<double>(partial[s * entries + entry]);
  groups[group][lane] = sum;
  __syncthreads();
  if (group > 0) return;
  for (int g = 1; g < kSumGroups; g++) sum += groups[g][lane];
  constexpr int size = Sums::kSize;
  int I, J, row, column;
  pair_of(int(entry / (size * size)), I, J);
  Sums::place(int(entry % (size * size)) / Sums::kThreads, int(entry % Sums::kThreads), row, column);
  const int64_t i = I * size + row, j = J * size + column;
  if (i <= j && j < R) gram[i * R + j] = gram[j * R + i] = sum;
}

template <class Sums, class T>
int sum_blocks(const T* partial, int64_t splits, int64_t R, double* gram, void* stream) {
  const int64_t entries = pairs(ceil_div(R, Sums::kSize)) * Sums::kSize * Sums::kSize;
  FK_LAUNCH((velocity_gram_sum_kernel<Sums, T>), dim3(unsigned(entries / 32)), dim3(32 * kSumGroups), 0, stream,
            partial, int(splits), entries, int(R), gram);
  return launched();
}

// ---- launchers ----

// As many as fill the device once, if each has a slab; more where one would add up too many columns.
int64_t splits_for(int64_t M, int64_t slab, int64_t blocks, int64_t blocks_of_split) {
  const int64_t slabs = ceil_div(M, slab), fill = ceil_div(blocks, blocks_of_split), least = ceil_div(M, kMostColumns);
  const int64_t splits = fill > least ? fill : least;
  return splits < slabs ? splits : slabs;
}

template <class V>
struct Increments {
  Cut one, two;
  int64_t splits, bytes;
};
template <class V>
Increments<V> plan_increments(const VelocityGramArgs& g) {
  const auto kernel = velocity_gram_increments_kernel<V, false>;
  Increments<V> p;
  p.one = cut_for<V, false>(g), p.two = cut_for<V, true>(g);
  const int shared = shared_bytes<V, false>(p.one);
  allow_shared(kernel, shared);
  const int blocks = multiprocessors() * resident_blocks(kernel, p.one.threads(), shared);
  p.splits = splits_for(g.M, p.one.columns(), blocks, pairs(p.one.panels));
  p.bytes = p.splits * pairs(ceil_div(g.K - 1, kTile)) * kTile * kTile * 4;
  return p;
}

template <class V>
int launch_increments(const VelocityGramArgs& g, void* stream) {
  const Increments<V> p = plan_increments<V>(g);
  auto* partial = static_cast<float*>(g.workspace);
  auto run = [&](auto kernel, const Cut& c, int shared, int64_t y) {
    allow_shared(kernel, shared);
    FK_LAUNCH(kernel, dim3(unsigned(p.splits), unsigned(y)), dim3(c.threads()), shared, stream,
              static_cast<const V*>(g.v), g.v_stride, int(g.K), g.M, c, partial);
  };
  run(velocity_gram_increments_kernel<V, false>, p.one, shared_bytes<V, false>(p.one), p.one.panels);
  if (p.one.panels > 1)
    run(velocity_gram_increments_kernel<V, true>, p.two, shared_bytes<V, true>(p.two), pairs(p.one.panels - 1));
  return sum_blocks<IncrementSums>(partial, p.splits, g.K - 1, g.gram, stream);
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
  p.splits = splits_for(g.M, TileRow<T>::kColumns, 2 * multiprocessors(), p.pairs);
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
  return sum_blocks<RowSums>(partial, p.splits, p.R, g.gram, stream);
}

}  // namespace

int64_t velocity_gram_workspace(const VelocityGramArgs& g) {
  if (g.v_type == Dtype::f64) return plan_rows<double>(g).bytes;
  if (g.x) return plan_rows<float>(g).bytes;
  if (g.v_type == Dtype::f32) return plan_increments<float>(g).bytes;
  return g.v_type == Dtype::bf16 ? plan_increments<bf16>(g).bytes : plan_increments<half>(g).bytes;
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

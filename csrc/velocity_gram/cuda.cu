// Two kernels, and the sum of what their blocks leave.
//
// Increments alone, of float32 or shorter velocities, go through the tensor cores. A block takes slabs of columns, all
// rows of them: each byte is read once. Every increment, taken in float32, is split into two halves of 11 bits,
// s a = hi + lo, where the power of two s brings the largest of a row's 32 columns near the end of half's range: the
// two parts hold what float32 does, whatever the size of the row. <a_i, a_j> is summed from three products, hi hi + hi
// lo + lo hi; lo lo is below 2^-24 |a_i| |a_j|. The unit adds in float32 and truncates, so that its sums move on after
// 32 columns, to ordinary float32.
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

constexpr int kTile = 32;           // rows and columns of a warp's sums; also the columns that share a scale
constexpr int kLaneSums = 32;       // of a tile, in each lane
constexpr int kMostRows = 128;      // of a panel
constexpr int kRowBytes = 2 * kTile;  // of hi or lo, 32 columns: four words of 16 bytes
constexpr int kMostThreads = 640;  // blocks have up to 512; it keeps threads to 96 registers, and so two blocks of 320
                                   // on a multiprocessor

// How a block is cut: one panel of rows and all pairs of its tiles, or the pairs between two panels.
struct Cut {
  int panels, panel_rows;  // that the rows make; 16 or a multiple of 32
  int across;  // tiles along a panel
  int two;  // whether blocks take two panels
  int band_bits;  // log2 of a slab's bands of 32 columns
  int group_bits;  // log2 of the rows that hi and lo have for each band, or for each of two panels
  int steps;  // of 16 columns that a warp takes of a band: both, or one where two warps share a tile
  int raw_rows, pitch;  // of a slab of velocities, in elements
  int stages;  // slabs in flight or at work
  int aligned;  // whether rows can be copied by 16 bytes

  __host__ __device__ int tiles() const { return two ? across * across : across * (across + 1) / 2; }
  __host__ __device__ int units() const { return (2 / steps) << band_bits; }  // warps on a tile
  __host__ __device__ int threads() const { return 32 * tiles() * units(); }
  __host__ __device__ int columns() const { return kTile << band_bits; }
  __host__ __device__ int group_rows() const { return (two ? 2 : 1 << band_bits) << group_bits; }
};

// Bytes of shared memory
template <class V>
int raw_bytes(const Cut& c) {
  return c.raw_rows * c.pitch * int(sizeof(V));
}
template <class V>
int shared_bytes(const Cut& c) {
  const int work = c.stages * raw_bytes<V>(c) + c.group_rows() * (2 * kRowBytes + 4);
  const int exchange = c.units() > 1 ? c.tiles() * c.units() * kTile * kTile * 4 : 0;
  return work > exchange ? work : exchange;
}

template <class V>
Cut cut_for(const VelocityGramArgs& g, bool two) {
  const int64_t R = g.K - 1;
  Cut c;
  c.panels = int(ceil_div(R, kMostRows));
  c.panel_rows = R <= 16 ? 16 : int(ceil_div(ceil_div(R, c.panels), kTile) * kTile);
  c.across = int(ceil_div(c.panel_rows, kTile));
  c.two = two;
  c.group_bits = c.panel_rows == 16 ? 4 : c.panel_rows == 32 ? 5 : c.panel_rows == 64 ? 6 : 7;
  c.band_bits = two ? 0 : 7 - c.group_bits;
  c.steps = c.panel_rows == 32 ? 1 : 2;
  c.raw_rows = c.panels == 1 ? int(g.K) : (two ? 2 : 1) * (c.panel_rows + 1);
  // two rows of 32 short velocities side by side in all banks
  c.pitch = c.columns() + (sizeof(V) == 2 && c.band_bits ? kTile : 0);
  c.aligned = reinterpret_cast<uintptr_t>(g.v) % 16 == 0 && g.v_stride * sizeof(V) % 16 == 0;
  // as many slabs in flight as leave room for the blocks that registers allow
  const int blocks = 65536 / 96 / c.threads(), room = (shared_limit() + 1024) / blocks - 1024;
  for (c.stages = 4; c.stages > 2 && shared_bytes<V>(c) > room;) c.stages--;
  return c;
}

// hi or lo of rows [16 r, 16 r + 16), 16 columns, as an operand; `at` is the lane's own row and word. What the left
// operand has in words 0..3, the right one has for its first 8 rows in words 0, 2 and for the others in 1, 3.
__device__ __forceinline__ void fragment(uint32_t (&f)[4], const unsigned char* at, int r) {
  ldmatrix_x4(f, at + r * 16 * kRowBytes);
}

// sums[i][j] += left_i right_j for 16-row parts of the left and 8-row parts of the right
template <int I, int J, bool diagonal>
__device__ __forceinline__ void multiply(float (&sums)[2][4][4], const uint32_t (&left)[I][4],
                                         const uint32_t (&right)[J][4]) {
#pragma unroll
  for (int i = 0; i < I; i++)
#pragma unroll
    for (int j = diagonal ? 2 * i : 0; j < 2 * J; j++) {
      const uint32_t pair[2] = {right[j / 2][j % 2], right[j / 2][2 + j % 2]};
      mma_m16n8k16<half>(sums[i][j], left[i], pair);
    }
}

// 16 columns of I x J parts of 16 rows; on the diagonal, left and right are the same.
template <int I, int J, bool diagonal>
__device__ __forceinline__ void step(float (&sums)[2][4][4], const unsigned char* left, const unsigned char* right,
                                     int low) {
  uint32_t hi[I][4], lo[I][4];
#pragma unroll
  for (int i = 0; i < I; i++) fragment(hi[i], left + 0, i);
  if constexpr (diagonal) {
#pragma unroll
    for (int i = 0; i < I; i++) fragment(lo[i], left + low, i);
    multiply<I, J, true>(sums, hi, lo);
    multiply<I, J, true>(sums, lo, hi);
    multiply<I, J, true>(sums, hi, hi);
  } else {
    uint32_t other[J][4];
#pragma unroll
    for (int j = 0; j < J; j++) fragment(other[j], right + low, j);
    multiply<I, J, false>(sums, hi, other);
#pragma unroll
    for (int j = 0; j < J; j++) fragment(other[j], right, j);
    multiply<I, J, false>(sums, hi, other);
#pragma unroll
    for (int i = 0; i < I; i++) fragment(lo[i], left + low, i);
    multiply<I, J, false>(sums, lo, other);
  }
}

// Four increments into their parts; eight lanes have the row's 32 columns. Returns 1 / s.
__device__ __forceinline__ float split(const float (&a)[4], uint2& hi, uint2& lo) {
  float most = fmaxf(fmaxf(fabsf(a[0]), fabsf(a[1])), fmaxf(fabsf(a[2]), fabsf(a[3])));
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
  // s = 2^(14 - exponent of the largest), 2^127 at most; an infinity stays one and leaves no number in lo
  const unsigned exponent = max(__float_as_uint(most) >> 23, 15u);
  const float s = __uint_as_float((268u - exponent) << 23);
  float rest[4];
#pragma unroll
  for (int c = 0; c < 4; c++) rest[c] = a[c] * s;
  hi = make_uint2(half_pair(rest[0], rest[1]), half_pair(rest[2], rest[3]));
  half h[4];
  memcpy(h, &hi, sizeof(h));
#pragma unroll
  for (int c = 0; c < 4; c++) rest[c] -= widen(h[c]);
  lo = make_uint2(half_pair(rest[0], rest[1]), half_pair(rest[2], rest[3]));
  return __uint_as_float((exponent - 14u) << 23);
}

// Grid: the splits of the columns x the panels, or pairs of panels.
template <class V>
__global__ void __launch_bounds__(kMostThreads)
    velocity_gram_increments_kernel(const V* __restrict__ v,  // [K, M], rows `stride` apart
                                    int64_t stride, int K, int64_t M, Cut c,
                                    float* __restrict__ partial) {  // [splits, tiles, 32 sums, 32 lanes]
  FK_DYNAMIC_SHARED(unsigned char, shared);
  const int thread = threadIdx.x, threads = c.threads(), lane = thread % 32, warp = thread / 32;
  const int stage_elements = c.raw_rows * c.pitch, low = c.group_rows() * kRowBytes;
  V* raw = reinterpret_cast<V*>(shared);
  unsigned char* parts = shared + c.stages * stage_elements * sizeof(V);  // hi, then lo: [group, row, 32 columns]
  float* scales = reinterpret_cast<float*>(parts + 2 * low);  // [group, row]
  int panel[2] = {int(blockIdx.y), int(blockIdx.y)};
  if (c.two) {
    pair_of(blockIdx.y, panel[0], panel[1]);
    panel[1]++;
  }
  const int first[2] = {panel[0] * c.panel_rows, panel[1] * c.panel_rows};

  // a slab's velocities on their way into a stage; beyond the last column they are zero
  auto fetch = [&](int64_t slab, int stage) {
    const int64_t m = slab * c.columns();
    V* to = raw + stage * stage_elements;
    auto row_of = [&](int r) { return r <= c.panel_rows ? first[0] + r : first[1] + r - c.panel_rows - 1; };
    if (c.aligned) {
      constexpr int E = 16 / sizeof(V), bits = E == 4 ? 3 : 2;  // words of 16 bytes in 32 columns
      for (int i = thread; i < c.raw_rows << (c.band_bits + bits); i += threads) {
        const int r = i >> (c.band_bits + bits), at = E * (i & ((1 << (c.band_bits + bits)) - 1)), row = row_of(r);
        const int64_t left = M - m - at;
        const V* from = v + row * stride + m + at;
        if (row < K)
          cp_async16(to + r * c.pitch + at, left > 0 ? from : v, left >= E ? 16 : left > 0 ? left * sizeof(V) : 0);
      }
    } else {
#pragma unroll 4
      for (int i = thread; i < c.raw_rows << (c.band_bits + 5); i += threads) {
        const int r = i >> (c.band_bits + 5), at = i & (c.columns() - 1), row = row_of(r);
        if (row < K) to[r * c.pitch + at] = at < M - m ? v[row * stride + m + at] : convert<V>(0.f);
      }
    }
  };

  // its increments into hi, lo and scales; rows that do not exist are zero
  auto take = [&](int stage) {
    const V* from = raw + stage * stage_elements + 4 * (lane % 8);
    const int items = c.group_rows() - (1 << c.group_bits) + c.panel_rows;
    for (int i = thread / 8; i < items; i += threads / 8) {
      const int group = i >> c.group_bits, row = i & ((1 << c.group_bits) - 1);
      const bool second = c.two && group;
      float a[4] = {};
      if (row < c.panel_rows && first[second] + row < K - 1) {
        const V* at = from + (second ? c.panel_rows + 1 + row : row) * c.pitch + (c.two ? 0 : group * kTile);
        V last[4], next[4];
        load_vector(last, at);
        load_vector(next, at + c.pitch);
#pragma unroll
        for (int e = 0; e < 4; e++) a[e] = convert<float>(next[e]) - convert<float>(last[e]);
      }
      uint2 hi, lo;
      const float scale = split(a, hi, lo);
      // the word of 16 bytes is moved by the row, so that eight rows' words are in different banks
      unsigned char* to = parts + i * kRowBytes + ((lane % 8 / 2) ^ (row / 2 % 4)) * 16 + lane % 2 * 8;
      *reinterpret_cast<uint2*>(to) = hi;
      *reinterpret_cast<uint2*>(to + low) = lo;
      if (lane % 8 == 0) scales[i] = scale;
    }
  };

  // this warp's tile, and its share of a slab
  const int unit = warp / c.tiles(), tile = warp % c.tiles(), band = c.steps == 2 ? unit : unit / 2;
  int ti = tile / c.across, tj = tile % c.across;
  if (!c.two) pair_of(tile, ti, tj);
  const int R = K - 1, i0 = first[0] + ti * kTile, j0 = first[1] + tj * kTile;  // of all rows
  const bool small = R - j0 <= 16, used = j0 < R;
  const int left_row = ((c.two ? 0 : band) << c.group_bits) + ti * kTile;
  const int right_row = ((c.two ? 1 : band) << c.group_bits) + tj * kTile;
  const unsigned char *left = parts + (left_row + lane % 16) * kRowBytes,
                      *right = parts + (right_row + lane % 16) * kRowBytes;

  float sums[2][4][4] = {};
  auto add_products = [&] {
    float products[2][4][4] = {};
    const int last = c.steps == 2 ? 2 : unit % 2 + 1;
#pragma unroll 1
    for (int k = c.steps == 2 ? 0 : unit % 2; k < last; k++) {
      const int word = ((2 * k + lane / 16) ^ (lane / 2 % 4)) * 16;
      if (i0 == j0)
        small ? step<1, 1, true>(products, left + word, right + word, low)
              : step<2, 2, true>(products, left + word, right + word, low);
      else
        small ? step<2, 1, false>(products, left + word, right + word, low)
              : step<2, 2, false>(products, left + word, right + word, low);
    }
    const float *row_scales = scales + left_row + lane / 4, *column_scales = scales + right_row + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          sums[i][j][e] += products[i][j][e] * row_scales[16 * i + 8 * (e / 2)] * column_scales[8 * j + e % 2];
  };

  const int64_t slabs = (M + c.columns() - 1) / c.columns(), splits = gridDim.x;
  int64_t ahead = blockIdx.x;  // the next slab to fetch
  int stage = 0, stage_ahead = 0;
  auto fetch_next = [&] {
    if (ahead < slabs) fetch(ahead, stage_ahead);
    cp_async_commit();
    ahead += splits;
    stage_ahead = stage_ahead + 1 == c.stages ? 0 : stage_ahead + 1;
  };
  for (int s = 1; s < c.stages; s++) fetch_next();
  for (int64_t slab = blockIdx.x; slab < slabs; slab += splits) {
    if (c.stages == 2)
      cp_async_wait<0>();
    else if (c.stages == 3)
      cp_async_wait<1>();
    else
      cp_async_wait<2>();
    __syncthreads();  // this slab is there; the parts of the one before are used, and its stage too
    fetch_next();
    take(stage);
    stage = stage + 1 == c.stages ? 0 : stage + 1;
    __syncthreads();
    if (used) add_products();
  }
  cp_async_wait<0>();

  if (c.units() > 1) {  // the warps that share a tile, in their order
    float* exchange = reinterpret_cast<float*>(shared) + warp * kLaneSums * 32 + lane;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kLaneSums; k++) exchange[k * 32] = sums[k / 16][k / 4 % 4][k % 4];
    __syncthreads();
    if (unit > 0) return;
    for (int other = 1; other < c.units(); other++)
#pragma unroll
      for (int k = 0; k < kLaneSums; k++)
        sums[k / 16][k / 4 % 4][k % 4] += exchange[(other * c.tiles() * kLaneSums + k) * 32];
  }
  if (!used) return;
  const int across = (R + kTile - 1) / kTile;
  const int64_t at = int64_t(blockIdx.x) * (across * (across + 1) / 2) + index_of(i0 / kTile, j0 / kTile);
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

// The kernels' work as `workspace` and the launcher both see it
template <class V>
struct Increments {
  Cut one, two;
  int64_t splits, tiles, bytes;
};
template <class V>
Increments<V> plan_increments(const VelocityGramArgs& g) {
  Increments<V> p;
  p.one = cut_for<V>(g, false), p.two = cut_for<V>(g, true);
  allow_shared(velocity_gram_increments_kernel<V>, shared_limit());
  const int blocks =
      multiprocessors() * resident_blocks(velocity_gram_increments_kernel<V>, p.one.threads(), shared_bytes<V>(p.one));
  p.splits = splits_for(g.M, p.one.columns(), blocks, pairs(p.one.panels));
  p.tiles = pairs(ceil_div(g.K - 1, kTile));
  p.bytes = p.splits * p.tiles * kTile * kTile * 4;
  return p;
}

template <class V>
int launch_increments(const VelocityGramArgs& g, void* stream) {
  const Increments<V> p = plan_increments<V>(g);
  auto* partial = static_cast<float*>(g.workspace);
  auto run = [&](const Cut& c, int64_t y) {
    FK_LAUNCH(velocity_gram_increments_kernel<V>, dim3(unsigned(p.splits), unsigned(y)), dim3(c.threads()),
              shared_bytes<V>(c), stream, static_cast<const V*>(g.v), g.v_stride, int(g.K), g.M, c, partial);
  };
  run(p.one, p.one.panels);
  if (p.one.panels > 1) run(p.two, pairs(p.one.panels - 1));
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

// The Gram matrix on the matrix unit of recent Xeons (AMX). Every increment is split into two bfloat16 parts,
// a = hi + lo to 16 bits, and <a_i, a_j> is summed from three products, hi hi + hi lo + lo hi, in float32. The fourth,
// lo lo, is added on the diagonal. Elsewhere its terms cancel, except between rows that agree to 8 bits, where a third
// of 2^-16 |a_i| |a_j| is lost at most in the mean.
//
//   v [K, M]  --chunk of columns-->  tiles of 16 rows x 32 columns, hi and lo, as they are and transposed
//             --2 x 2 tiles of sums in registers-->  G[i, j] += <a_i, a_j>, i <= j
#include <immintrin.h>

#include "common/memory.h"
#include "common/simd.h"
#include "common/threads.h"
#include "velocity_gram/velocity_gram.h"

namespace fk {
namespace FK_ISA {
namespace {

constexpr int64_t kTileRows = 16, kTileCols = 32;  // of bfloat16: 1 KiB
constexpr int64_t kTile = kTileRows * kTileCols;
constexpr int64_t kMostColumns = 1024;  // of a chunk: what float32 sums before they move to double
// With fewer rows, splitting costs more than the unit saves; with fewer columns, what is dropped need not cancel.
constexpr int64_t kFewestRows = 64, kFewestColumns = 4096;

// The four tiles of 16 rows x 32 columns. As a left operand: rows of 32 columns. As a right one: rows of 16 pairs of
// columns, each row's pair beside the next row's, which is the transpose of the former in units of two.
struct Block {
  uint16_t left_hi[kTile], left_lo[kTile], right_hi[kTile], right_lo[kTile];
};

// The compiler does not know that tile instructions touch memory.
FK_INLINE void fence(const void* p) {
  asm volatile("" ::"r"(p) : "memory");
}

FK_INLINE __m512 widen(__m256i bf16s) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16s), 16));
}

// One row of a block: 32 increments into their high and low parts. Adds the squares of the low ones to `squares`.
FK_INLINE void split(vf a, vf b, uint16_t* hi, uint16_t* lo, vf& squares) {
  const __m512i h = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  const vf rest_a = a - (vf)widen(_mm512_castsi512_si256(h)), rest_b = b - (vf)widen(_mm512_extracti64x4_epi64(h, 1));
  _mm512_store_si512(hi, h);
  _mm512_store_si512(lo, (__m512i)_mm512_cvtne2ps_pbh((__m512)rest_b, (__m512)rest_a));
  squares += rest_a * rest_a + rest_b * rest_b;
}

// 16 x 16 transpose of 32-bit elements
FK_INLINE void transpose(const uint16_t* from, uint16_t* to) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(from + 32 * i);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    _mm512_store_si512(to + 32 * i, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_store_si512(to + 32 * (i + 4), _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_store_si512(to + 32 * (i + 8), _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_store_si512(to + 32 * (i + 12), _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

// Increments of rows [16 b, 16 b + rows) over n columns from m, into blocks[0 .. ceil(n / 32)); the squares of what the
// products leave out to the diagonal
template <class V>
void pack(const VelocityGramArgs& g, int64_t b, int64_t rows, int64_t m, int64_t n, Block* blocks,
          double* diagonal,  // entries `step` apart
          int64_t step) {
  vf squares[kTileRows] = {};
  for (int64_t c = 0; c < n; c += kTileCols) {
    Block& block = blocks[c / kTileCols];
    const V* v = static_cast<const V*>(g.v) + b * kTileRows * g.v_stride + m + c;
    const int64_t count = n - c < kTileCols ? n - c : kTileCols;
    V padded[kTileCols] = {};
    auto row = [&](int64_t r) {
      const V* p = v + r * g.v_stride;
      if (count == kTileCols) return p;
      memcpy(static_cast<void*>(padded), p, count * sizeof(V));
      return static_cast<const V*>(padded);
    };
    const V* p = row(0);
    vf last_a = load(p), last_b = load(p + 16);
    for (int64_t r = 0; r < rows; r++) {
      p = row(r + 1);
      const vf a = load(p), b = load(p + 16);
      split(a - last_a, b - last_b, block.left_hi + r * kTileCols, block.left_lo + r * kTileCols, squares[r]);
      last_a = a, last_b = b;
    }
    transpose(block.left_hi, block.right_hi);
    transpose(block.left_lo, block.right_lo);
  }
  for (int64_t r = 0; r < rows; r++) {
    double parts[4] = {};
    add_lane_sums(parts, squares[r], vf{}, vf{}, vf{});
    diagonal[r * step] += parts[0];
  }
}

// Sums in tiles 0..3, [i][j] in tile 2 i + j; operands of the left in 4, 5, of the right in 6, 7.
// On the diagonal (I == J) the tile below it is left out.
template <int NI, int NJ, bool diagonal>
FK_INLINE void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (NJ > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (NI > 1 && !diagonal) _tile_dpbf16ps(2, 5, 6);
  if constexpr (NI > 1 && NJ > 1) _tile_dpbf16ps(3, 5, 7);
}

template <int NI, int NJ, bool diagonal>
void gram_of_blocks(const Block* I,  // NI rows of blocks, `pitch` apart
                    const Block* J,  // NJ rows of blocks
                    int64_t pitch, int64_t steps, float sums[4][256]) {
  fence(I);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; s++) {
    _tile_loadd(6, J[s].right_hi, 64);
    if constexpr (NJ > 1) _tile_loadd(7, J[pitch + s].right_hi, 64);
    _tile_loadd(4, I[s].left_lo, 64);
    if constexpr (NI > 1) _tile_loadd(5, I[pitch + s].left_lo, 64);
    multiply<NI, NJ, diagonal>();
    _tile_loadd(4, I[s].left_hi, 64);
    if constexpr (NI > 1) _tile_loadd(5, I[pitch + s].left_hi, 64);
    multiply<NI, NJ, diagonal>();
    _tile_loadd(6, J[s].right_lo, 64);
    if constexpr (NJ > 1) _tile_loadd(7, J[pitch + s].right_lo, 64);
    multiply<NI, NJ, diagonal>();
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  fence(sums);
}

FK_INLINE void add(double* G, int64_t ldg, const float* sums) {
  for (int64_t r = 0; r < kTileRows; r++)
    for (int64_t c = 0; c < 16; c += 8) {
      double* at = G + r * ldg + c;
      _mm512_storeu_pd(at, _mm512_loadu_pd(at) + _mm512_cvtps_pd(_mm256_load_ps(sums + r * 16 + c)));
    }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

int64_t chunk_columns(int64_t rows, int64_t M, int threads) {
  const int64_t fits = level2_bytes() * 5 / 8 / (rows / kTileRows * int64_t(sizeof(Block)));  // steps of 32 columns
  const int64_t share = ((M + threads - 1) / threads + kTileCols - 1) / kTileCols, most = kMostColumns / kTileCols;
  const int64_t steps = fits < 4 ? 4 : fits < most ? fits : most;
  return (steps < share ? steps : share) * kTileCols;
}

template <class V>
void run(const VelocityGramArgs& g) {
  const int64_t R = g.K - 1, bands = (R + kTileRows - 1) / kTileRows, rows = bands * kTileRows;
  const int64_t chunk = chunk_columns(rows, g.M, g.threads), pitch = chunk / kTileCols;
  const int64_t chunks = (g.M + chunk - 1) / chunk;
  const int parts = int(g.threads < chunks ? g.threads : chunks);
  const size_t block_bytes = size_t(bands * pitch) * sizeof(Block), gram_bytes = size_t(rows * rows) * 8;
  char* scratch = static_cast<char*>(allocate((block_bytes + gram_bytes) * size_t(parts)));
  auto part_gram = [&](int p) {
    return reinterpret_cast<double*>(scratch + (block_bytes + gram_bytes) * p + block_bytes);
  };

  parallel(parts, [&](int p) {
    Block* blocks = reinterpret_cast<Block*>(scratch + (block_bytes + gram_bytes) * p);
    double* G = part_gram(p);
    memset(static_cast<void*>(blocks), 0, block_bytes + gram_bytes);  // rows from R on stay zero
    const TileConfig config;
    fence(&config);
    _tile_loadconfig(&config);
    alignas(64) float sums[4][256];
    const int64_t end = chunks * (p + 1) / parts;
    for (int64_t b = chunks * p / parts; b < end; b++) {
      const int64_t m = b * chunk, n = chunk < g.M - m ? chunk : g.M - m, steps = (n + kTileCols - 1) / kTileCols;
      for (int64_t i = 0; i < bands; i++) {
        const int64_t first = i * kTileRows, here = R - first < kTileRows ? R - first : kTileRows;
        pack<V>(g, i, here, m, n, blocks + i * pitch, G + first * (rows + 1), rows + 1);
      }
      for (int64_t i = 0; i < bands; i += 2)
        for (int64_t j = i; j < bands; j += 2) {
          const Block *I = blocks + i * pitch, *J = blocks + j * pitch;
          const bool two = j + 1 < bands;
          if (i == j)
            two ? gram_of_blocks<2, 2, true>(I, J, pitch, steps, sums)
                : gram_of_blocks<1, 1, true>(I, J, pitch, steps, sums);
          else
            two ? gram_of_blocks<2, 2, false>(I, J, pitch, steps, sums)
                : gram_of_blocks<2, 1, false>(I, J, pitch, steps, sums);
          double* at = G + i * kTileRows * rows + j * kTileRows;
          add(at, rows, sums[0]);
          if (two) add(at + kTileRows, rows, sums[1]);
          if (i + 1 < bands && i != j) add(at + kTileRows * rows, rows, sums[2]);
          if (i + 1 < bands && two) add(at + kTileRows * rows + kTileRows, rows, sums[3]);
        }
    }
    _tile_release();
  });

  for (int64_t i = 0; i < R; i++)
    for (int64_t j = i; j < R; j++) {
      double s = 0;
      for (int p = 0; p < parts; p++) s += part_gram(p)[i * rows + j];
      g.gram[i * R + j] = g.gram[j * R + i] = s;
    }
  release(scratch);
}

// The unit flushes what is below 2^-126, so that a row's square may be zero though the row is not; and the low part of
// an infinity is not a number.
bool in_range(const VelocityGramArgs& g) {
  const int64_t R = g.K - 1;
  for (int64_t i = 0; i < R * R; i++)
    if (!(__builtin_fabs(g.gram[i]) < __builtin_inf())) return false;
  for (int64_t i = 0; i < R; i++)
    if (g.gram[i * (R + 1)] < 1e-30 * double(g.M)) return false;
  return true;
}

}  // namespace

void velocity_gram(const VelocityGramArgs& g) {
  if (!g.x && g.v_type != Dtype::f64 && g.K > kFewestRows && g.M >= kFewestColumns) {
    switch (g.v_type) {
      case Dtype::bf16: run<bf16>(g); break;
      case Dtype::f16: run<f16>(g); break;
      default: run<float>(g);
    }
    if (in_range(g)) return;
  }
  avx512::velocity_gram(g);
}

}  // namespace FK_ISA
}  // namespace fk

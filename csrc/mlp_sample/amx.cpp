// Products of linear layers on the matrix unit of recent Xeons (AMX): weights and inputs in bfloat16, sums in float32.
// Four tiles of sums at once, 32 samples x 32 outputs or 16 x 64, are written straight into the samples' rows.
#include "mlp_sample/run.h"

namespace fk {
namespace FK_ISA {
namespace {

constexpr int64_t kSide = 16, kDepth = 32;     // a tile: 16 rows x 32 bfloat16, 1 KiB
constexpr int64_t kWide = 4;                  // tiles of a panel; the last one of a layer may have fewer
constexpr int64_t kWeights = kSide * kDepth;   // of a tile: 16 pairs of inputs x 16 outputs x 2

// The compiler does not know that tile instructions touch memory.
FK_INLINE void fence(const void* p) {
  asm volatile("" ::"r"(p) : "memory");
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// y = x w for 32 samples and NJ tiles of outputs. Inputs in 4, 5, weights in 6, 7, sums [i][j] in 2 i + j.
template <int NJ>
void product_of_32(const uint16_t* x, int64_t x_pitch, const uint16_t* w, int64_t w_pitch, int64_t steps, float* y,
                   int64_t y_pitch) {
  fence(x);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; s++) {
    _tile_loadd(4, x + s * kDepth, x_pitch * 2);
    _tile_loadd(6, w + s * w_pitch, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, x + kSide * x_pitch + s * kDepth, x_pitch * 2);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (NJ > 1) {
      _tile_loadd(7, w + s * w_pitch + kWeights, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  const int64_t pitch = y_pitch * int64_t(sizeof(float));
  _tile_stored(0, y, pitch);
  _tile_stored(2, y + kSide * y_pitch, pitch);
  if constexpr (NJ > 1) {
    _tile_stored(1, y + kSide, pitch);
    _tile_stored(3, y + kSide * y_pitch + kSide, pitch);
  }
  fence(y);
}

// The same for 16 samples and NJ = 1..4: inputs in 4, weights in 5, 6, 7, sums in 0..3.
template <int NJ>
void product_of_16(const uint16_t* x, int64_t x_pitch, const uint16_t* w, int64_t w_pitch, int64_t steps, float* y,
                   int64_t y_pitch) {
  fence(x);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; s++, w += w_pitch) {
    _tile_loadd(4, x + s * kDepth, x_pitch * 2);
    _tile_loadd(5, w, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (NJ > 1) {
      _tile_loadd(6, w + kWeights, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (NJ > 2) {
      _tile_loadd(7, w + 2 * kWeights, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (NJ > 3) {
      _tile_loadd(5, w + 3 * kWeights, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  const int64_t pitch = y_pitch * int64_t(sizeof(float));
  _tile_stored(0, y, pitch);
  if constexpr (NJ > 1) _tile_stored(1, y + kSide, pitch);
  if constexpr (NJ > 2) _tile_stored(2, y + 2 * kSide, pitch);
  if constexpr (NJ > 3) _tile_stored(3, y + 3 * kSide, pitch);
  fence(y);
}

struct Tiles {
  static constexpr int64_t kRows = 32, kFew = 16, kTile = 64, kPanel = kWide * kSide;

  // rows an odd number of cache lines apart
  static int64_t input_pitch(int64_t in) {
    return round_up(in, kDepth) + (round_up(in, kDepth) / kDepth % 2 ? 0 : kDepth);
  }
  static int64_t input_bytes(int64_t samples, int64_t in) {
    return samples * input_pitch(in) * int64_t(sizeof(uint16_t));
  }
  static int64_t panel_bytes(int64_t) { return 0; }

  static void prepare(const MlpLayer& l, const Tile& t) {
    const int64_t pitch = input_pitch(l.in_width), whole = l.in_width / kDepth * kDepth, rest = l.in_width - whole;
    for (int64_t i = 0; i < t.n; i++) {
      const float* in = t.rows + i * t.pitch + l.in;
      uint16_t* to = static_cast<uint16_t*>(t.input) + i * pitch;
      for (int64_t k = 0; k < whole; k += kDepth)
        _mm512_store_si512(to + k, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(in + k + 16), _mm512_loadu_ps(in + k)));
      if (rest == 0) continue;
      float part[kDepth] = {};
      memcpy(part, in + whole, size_t(rest) * sizeof(float));
      _mm512_store_si512(to + whole, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(part + 16), _mm512_loadu_ps(part)));
    }
  }

  static void multiply(const MlpLayer& l, const Tile& t, int64_t first, int64_t last) {
    TileConfig config;
    if (t.n < kSide)  // the unit's time goes with the rows
      for (int i = 0; i < 5; i++) config.rows[i] = uint8_t(t.n);
    fence(&config);
    _tile_loadconfig(&config);
    const int64_t pitch = input_pitch(l.in_width), steps = round_up(l.in_width, kDepth) / kDepth;
    const uint16_t* x = static_cast<const uint16_t*>(t.input);
    for (int64_t p = first; p < last; p++) {  // a panel stays in the cache for all samples
      const uint16_t* w = static_cast<const uint16_t*>(l.weight) + p * steps * kWide * kWeights;
      float* y = t.rows + l.out + p * kPanel;
      const int64_t tiles = smaller((l.out_width - p * kPanel + kSide - 1) / kSide, kWide), w_pitch = tiles * kWeights;
      int64_t r = 0;
      for (; t.n - r > kSide; r += 2 * kSide)
        for (int64_t j = 0; j < tiles; j += 2)
          (tiles - j > 1 ? product_of_32<2> : product_of_32<1>)(x + r * pitch, pitch, w + j * kWeights, w_pitch, steps,
                                                                y + r * t.pitch + j * kSide, t.pitch);
      if (r >= t.n) continue;
      auto* run = tiles == 1   ? product_of_16<1>
                  : tiles == 2 ? product_of_16<2>
                  : tiles == 3 ? product_of_16<3>
                               : product_of_16<4>;
      run(x + r * pitch, pitch, w, w_pitch, steps, y + r * t.pitch, t.pitch);
    }
    _tile_release();
  }
};

}  // namespace

int64_t mlp_sample(const MlpSampleArgs& a) {
  return a.low ? run_sampler<Tiles>(a) : avx512::mlp_sample(a);
}

int64_t mlp_pack(const MlpPackArgs& a) {
  if (a.type != Dtype::bf16) return avx512::mlp_pack(a);
  const int64_t tiles = (a.out + kSide - 1) / kSide, steps = round_up(a.in, kDepth) / kDepth;
  const int64_t bytes = tiles * steps * kWeights * int64_t(sizeof(uint16_t));
  if (!a.packed) return bytes;
  uint16_t* to = static_cast<uint16_t*>(a.packed);
  for (int64_t p = 0; p < tiles; p += kWide)  // [panel][step][tile][pair of inputs][output][input]
    for (int64_t s = 0; s < steps; s++)
      for (int64_t o = p * kSide; o < smaller(p + kWide, tiles) * kSide; o += kSide)
        for (int64_t k = s * kDepth; k < (s + 1) * kDepth; k += 2)
          for (int64_t c = o; c < o + kSide; c++)
            for (int64_t i = k; i < k + 2; i++) {
              bf16 rounded[kFloats];
              store(rounded, splat(c < a.out && i < a.in ? a.weight[c * a.in + i] : 0.0f));
              *to++ = rounded[0].bits;
            }
  return bytes;
}

}  // namespace FK_ISA
}  // namespace fk

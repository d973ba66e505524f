// Products of linear layers on the matrix unit of recent Xeons (AMX): weights and inputs in bfloat16, sums in float32.
// Four tiles of sums at once, 32 samples x 32 outputs or 16 x 64, are written straight into the samples' rows.
#include "mlp_sample/run.h"

namespace fk {
namespace FK_ISA {
namespace {

constexpr int64_t kSide = 16, kDepth = 32;     // a tile: 16 rows x 32 bfloat16, 1 KiB
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
void product_of_32(const uint16_t* x, int64_t x_pitch, const uint16_t* w, int64_t panel, int64_t steps, float* y,
                   int64_t y_pitch) {
  fence(x);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; s++) {
    _tile_loadd(4, x + s * kDepth, x_pitch * 2);
    _tile_loadd(6, w + s * kWeights, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, x + kSide * x_pitch + s * kDepth, x_pitch * 2);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (NJ > 1) {
      _tile_loadd(7, w + panel + s * kWeights, 64);
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
void product_of_16(const uint16_t* x, int64_t x_pitch, const uint16_t* w, int64_t panel, int64_t steps, float* y,
                   int64_t y_pitch) {
  fence(x);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; s++, w += kWeights) {
    _tile_loadd(4, x + s * kDepth, x_pitch * 2);
    _tile_loadd(5, w, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (NJ > 1) {
      _tile_loadd(6, w + panel, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (NJ > 2) {
      _tile_loadd(7, w + 2 * panel, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (NJ > 3) {
      _tile_loadd(5, w + 3 * panel, 64);
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
  static constexpr int64_t kRows = 16, kFew = 16, kPanel = kSide;

  // rows an odd number of cache lines apart
  static int64_t input_pitch(int64_t in) {
    return round_up(in, kDepth) + (round_up(in, kDepth) / kDepth % 2 ? 0 : kDepth);
  }
  static int64_t input_bytes(int64_t samples, int64_t in) {
    return samples * input_pitch(in) * int64_t(sizeof(uint16_t));
  }

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
    const TileConfig config;
    fence(&config);
    _tile_loadconfig(&config);
    const int64_t pitch = input_pitch(l.in_width), steps = round_up(l.in_width, kDepth) / kDepth;
    const int64_t panel = steps * kWeights;
    const uint16_t* x = static_cast<const uint16_t*>(t.input);
    for (int64_t p = first; p < last; p += 4) {  // four panels stay in the cache for all samples
      const uint16_t* w = static_cast<const uint16_t*>(l.weight) + p * panel;
      float* y = t.rows + l.out + p * kPanel;
      const int64_t here = smaller(4, last - p);
      int64_t r = 0;
      for (; t.n - r > kSide; r += 2 * kSide)
        for (int64_t j = 0; j < here; j += 2)
          (here - j > 1 ? product_of_32<2> : product_of_32<1>)(x + r * pitch, pitch, w + j * panel, panel, steps,
                                                               y + r * t.pitch + j * kPanel, t.pitch);
      if (r >= t.n) continue;
      auto* run = here == 1   ? product_of_16<1>
                  : here == 2 ? product_of_16<2>
                  : here == 3 ? product_of_16<3>
                              : product_of_16<4>;
      run(x + r * pitch, pitch, w, panel, steps, y + r * t.pitch, t.pitch);
    }
    _tile_release();
  }
};

}  // namespace

int64_t mlp_sample(const MlpSampleArgs& a) {
  return a.weight_type == Dtype::bf16 ? run_sampler<Tiles>(a) : avx512::mlp_sample(a);
}

int64_t mlp_pack(const MlpPackArgs& a) {
  if (a.type != Dtype::bf16) return avx512::mlp_pack(a);
  const int64_t panels = (a.out + kSide - 1) / kSide, steps = round_up(a.in, kDepth) / kDepth;
  const int64_t bytes = panels * steps * kWeights * int64_t(sizeof(uint16_t));
  if (!a.packed) return bytes;
  uint16_t* to = static_cast<uint16_t*>(a.packed);
  for (int64_t p = 0; p < panels; p++)
    for (int64_t k = 0; k < steps * kDepth; k += 2)
      for (int64_t o = p * kSide; o < (p + 1) * kSide; o++, to += 2)
        for (int64_t i = 0; i < 2; i++) {
          const bool inside = o < a.out && k + i < a.in;
          bf16 rounded[kFloats];
          store(rounded, splat(inside ? a.weight[o * a.in + k + i] : 0.0f));
          to[i] = rounded[0].bits;
        }
  return bytes;
}

}  // namespace FK_ISA
}  // namespace fk

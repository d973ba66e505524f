// The sampler around the products of linear layers, which is all that mlp_sample/cpu.cpp and amx.cpp differ in. They
// have a struct Linear of
//
//   kRows          samples that products are best done with; they may write rows up to a multiple of it
//   kFew           samples that one product takes, or as good as
//   kTile          samples of a tile at most
//   kPanel         outputs whose weights lie together
//   input_bytes    what `prepare` needs for some samples of a layer's input
//   panel_bytes    what `multiply` needs for a panel of a layer
//   prepare        brings a layer's input into the form that the products take
//   multiply       the products for a range of panels, into the layer's output
//
// A thread takes a tile of samples through every layer and every step. The tile's rows stay in the second-level cache,
// where the weights of small networks are as well. Few samples are all threads' work: a thread takes the same columns
// of every layer in every step, so that its weights stay in its own caches, and waits for the others after each layer.
#pragma once

#include <atomic>

#include "common/activations.h"
#include "common/memory.h"
#include "common/threads.h"
#include "common/tiles.h"
#include "mlp_sample/mlp_sample.h"

namespace fk {
namespace FK_ISA {
namespace {

constexpr int64_t kPlace = 16;                 // values begin at a multiple of it
constexpr double kGrain = 4e6;        // multiply-adds a thread must have for a second one to pay
constexpr double kSharedGrain = 2e4;  // ... in each layer, where threads wait for one another after it
constexpr int64_t kFewOnLarge = 16;   // samples that share out layers of weights past the second-level cache

template <Activation A>
FK_INLINE vf activate(vf x, float alpha) {
  if constexpr (A == Activation::relu) return at_least(x, 0.0f);
  if constexpr (A == Activation::leaky_relu) return x < 0.0f ? alpha * x : x;
  if constexpr (A == Activation::silu) return silu(x);
  if constexpr (A == Activation::gelu) return gelu(x);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (A == Activation::elu) return elu(x, alpha);
  if constexpr (A == Activation::tanh) return tanh(x);
  if constexpr (A == Activation::sigmoid) return sigmoid(x);
  if constexpr (A == Activation::mish) return mish(x);
  if constexpr (A == Activation::softplus) return softplus(x);
  if constexpr (A == Activation::at_least) return at_least(x, alpha);
  if constexpr (A == Activation::at_most) return at_most(x, alpha);
  return x;
}

// The greater one; NaN if either is NaN
FK_INLINE vf greater_of(vf a, vf b) {
  return a != a || a > b ? a : b;
}

// One row of what follows a layer's map; absent tables and an absent `other` are null.
struct Finish {
  const float *scale, *shift, *shift_each, *other;
  MlpCombine combine;
  float alpha, gain;
};

// Biased: a shift is all there is, as after most linear layers. Then nothing is asked of every vector.
template <Activation A, bool biased>
void finish(const float* in, float* out, int64_t n, const Finish& f) {
  for (int64_t i = 0; i < n; i += kFloats) {
    vf y = load(in + i);
    if (!biased && f.scale) y *= load(f.scale + i);
    if (biased || f.shift) y += load(f.shift + i);
    if (!biased && f.shift_each) y += load(f.shift_each + i);
    y = activate<A>(y, f.alpha);
    if (!biased) {
      y *= f.gain;
      if (f.combine == MlpCombine::add) y += load(f.other + i);
      if (f.combine == MlpCombine::multiply) y *= load(f.other + i);
      if (f.combine == MlpCombine::maximum) y = greater_of(load(f.other + i), y);
      if (f.combine == MlpCombine::minimum) y = -greater_of(-load(f.other + i), -y);
    }
    store(out + i, y);
  }
}

typedef void FinishRow(const float* in, float* out, int64_t n, const Finish&);

template <bool biased>
FinishRow* finish_of(Activation a) {
  switch (a) {
    case Activation::relu: return finish<Activation::relu, biased>;
    case Activation::leaky_relu: return finish<Activation::leaky_relu, biased>;
    case Activation::silu: return finish<Activation::silu, biased>;
    case Activation::gelu: return finish<Activation::gelu, biased>;
    case Activation::gelu_tanh: return finish<Activation::gelu_tanh, biased>;
    case Activation::elu: return finish<Activation::elu, biased>;
    case Activation::tanh: return finish<Activation::tanh, biased>;
    case Activation::sigmoid: return finish<Activation::sigmoid, biased>;
    case Activation::mish: return finish<Activation::mish, biased>;
    case Activation::softplus: return finish<Activation::softplus, biased>;
    case Activation::at_least: return finish<Activation::at_least, biased>;
    case Activation::at_most: return finish<Activation::at_most, biased>;
    default: return finish<Activation::none, biased>;
  }
}

// Samples [sample, sample + n) of the batch: row i of scratch belongs to sample + i.
struct Tile {
  float* rows;
  int64_t pitch, n, sample;
  void* input;   // what the products make of a layer's input
  float* panel;  // ... and of a panel of its weights
};

FK_INLINE const float* table_row(const MlpTable* tables, int64_t table, int64_t step, int64_t sample, int64_t column) {
  if (table < 0) return nullptr;
  const MlpTable& t = tables[table];
  return t.data + step * t.step_stride + sample * t.sample_stride + column;
}

// Columns [c, c + count) of a layer's output, from what its map left in place `in` of the rows
FK_INLINE void finish_columns(const MlpLayer& l, const MlpTable* tables, int64_t step, const Tile& t, int64_t in,
                              int64_t c, int64_t count) {
  const bool biased = l.scale < 0 && l.shift >= 0 && l.shift_each < 0 && l.gain == 1 && l.combine == MlpCombine::none;
  FinishRow* run = biased ? finish_of<true>(l.activation) : finish_of<false>(l.activation);
  for (int64_t i = 0; i < t.n; i++) {
    float* row = t.rows + i * t.pitch;
    const int64_t sample = t.sample + i;
    const Finish f = {table_row(tables, l.scale, step, sample, c),
                      table_row(tables, l.shift, step, sample, c),
                      table_row(tables, l.shift_each, step, sample, c),
                      row + l.other + c,
                      l.combine,
                      float(l.alpha),
                      float(l.gain)};
    run(row + in + c, row + l.out + c, count, f);
  }
}

// ---- norms: two passes over a row that is in the first-level cache ----
FK_INLINE vf load_part(const float* p, int64_t count) {
  float part[kFloats] = {};
  memcpy(part, p, count * sizeof(float));
  return load(part);
}
FK_INLINE float sum_lanes(vf v) {
  float s = 0;
  for (int l = 0; l < kFloats; l++) s += v[l];
  return s;
}
inline void normalise(const float* in, float* out, int64_t n, float eps, bool centred) {
  const int64_t whole = n / kFloats * kFloats, rest = n - whole;
  vf sum = {};
  for (int64_t i = 0; i < whole; i += kFloats) sum += load(in + i);
  if (rest) sum += load_part(in + whole, rest);
  const float mean = centred ? sum_lanes(sum) / float(n) : 0.0f;
  vf squares = {};
  for (int64_t i = 0; i < whole; i += kFloats) {
    const vf d = load(in + i) - mean;
    squares += d * d;
  }
  float variance = sum_lanes(squares);
  for (int64_t i = whole; i < n; i++) variance += (in[i] - mean) * (in[i] - mean);
  const float inverse = 1.0f / __builtin_sqrtf(variance / float(n) + eps);
  for (int64_t i = 0; i < n; i += kFloats) store(out + i, (load(in + i) - mean) * inverse);
}

// The threads at work on one tile: one alone, or a team that meets
struct Team {
  int part = 0, parts = 1;
  Meeting* meeting = nullptr;
  unsigned round = 0;

  void meet() {
    if (parts > 1) meeting->wait(parts, &round);
  }
};
struct Range {
  int64_t first, last;
};
FK_INLINE Range share_of(const Team& team, int64_t whole) {
  return {whole * team.part / team.parts, whole * (team.part + 1) / team.parts};
}
// Columns of a value, in whole panels of the products: the same for every value of a width
template <class Linear>
FK_INLINE Range columns_of(const Team& team, int64_t width) {
  const Range panels = share_of(team, (width + Linear::kPanel - 1) / Linear::kPanel);
  return {panels.first * Linear::kPanel, smaller(panels.last * Linear::kPanel, width)};
}

// Lines that other threads have written or read last come from their caches, or leave them: all of them at once, before
// the first is waited for.
FK_INLINE void fetch_line(const float* p, bool to_write) {
#if defined(__x86_64__)
  if (to_write) {
    asm volatile("prefetchw %0" ::"m"(*p));
    return;
  }
#endif
  (void)to_write;
  __builtin_prefetch(p);
}
inline void fetch_columns(const Tile& t, int64_t first, int64_t last, bool to_write) {
  for (int64_t i = 0; i < t.n; i++)
    for (int64_t c = first; c < last; c += kPlace) fetch_line(t.rows + i * t.pitch + c, to_write);
}

// ---- one layer on one tile: this thread's part of it ----
template <class Linear>
void run_layer(const MlpLayer& l, const MlpTable* tables, int64_t step, const Tile& t, const Team& team) {
  if (l.map >= MlpMap::layer_norm) {  // whole rows
    const Range rows = share_of(team, t.n);
    const Tile own = {t.rows + rows.first * t.pitch, t.pitch, rows.last - rows.first,
                      t.sample + rows.first,         nullptr, nullptr};
    for (int64_t i = 0; i < own.n; i++) {
      float* row = own.rows + i * t.pitch;
      normalise(row + l.in, row + l.out, l.in_width, float(l.eps), l.map == MlpMap::layer_norm);
    }
    return finish_columns(l, tables, step, own, l.out, 0, l.out_width);
  }
  const Range own = columns_of<Linear>(team, l.out_width);
  if (own.first >= own.last) return;
  if (team.parts > 1) {
    if (l.map == MlpMap::linear) fetch_columns(t, l.in, l.in + l.in_width, false);
    fetch_columns(t, l.out + own.first, l.out + own.last, true);
  }
  if (l.map == MlpMap::linear) {
    Linear::prepare(l, t);
    Linear::multiply(l, t, own.first / Linear::kPanel, (own.last + Linear::kPanel - 1) / Linear::kPanel);
  }
  finish_columns(l, tables, step, t, l.map == MlpMap::linear ? l.out : l.in, own.first, own.last - own.first);
}

// ---- all steps of one tile: this thread's columns of the state ----
template <class Linear>
int64_t run_tile(const MlpSampleArgs& a, const Tile& t, Team team) {
  const int64_t D = a.D, kept = round_up(a.row, kPlace);
  const Range own = columns_of<Linear>(team, D);
  const size_t own_bytes = own.first < own.last ? size_t(own.last - own.first) * sizeof(float) : 0;
  auto record = [&](float* to, int64_t from) {  // [n, D] of one step
    for (int64_t i = 0; i < t.n; i++)
      memcpy(to + (t.sample + i) * D + own.first, t.rows + i * t.pitch + from + own.first, own_bytes);
  };
  // Whether the velocity's columns are their thread's own until the state is updated, which no other thread reads then
  const MlpLayer& last = a.layers[a.layer_count - 1];
  const bool apart = last.map < MlpMap::layer_norm && last.out == a.velocity && last.out_width == D && last.in >= D &&
                     (last.combine == MlpCombine::none || last.other >= D);
  auto evaluate = [&](const MlpTable* tables, int64_t step) {
    for (int64_t l = 0; l < a.layer_count; l++) {
      run_layer<Linear>(a.layers[l], tables, step, t, team);
      if (l + 1 < a.layer_count || !apart) team.meet();
    }
  };
  const int64_t room = round_up(D, kPlace), start = kept + (a.tables_uncond ? room : 0), past = start + room;
  const float w = float(a.guidance);
  auto velocity = [&](float* row, int64_t c) {
    vf v = load(row + a.velocity + c);
    if (a.tables_uncond) {
      const vf base = load(row + kept + c);
      v = base + w * (v - base);
      store(row + a.velocity + c, v);
    }
    return v;
  };
  for (int64_t i = 0; i < t.n; i++) {
    float* row = t.rows + i * t.pitch;
    memcpy(row + own.first, a.x + (t.sample + i) * D + own.first, own_bytes);
    if (a.updates) memcpy(row + start + own.first, row + own.first, own_bytes);
  }
  team.meet();
  if (a.states) record(a.states, 0);
  const MlpTerm* terms = a.terms;
  for (int64_t s = 0; s < a.steps; s++) {
    if (a.tables_uncond) {
      evaluate(a.tables_uncond, s);
      for (int64_t i = 0; i < t.n; i++) {
        float* row = t.rows + i * t.pitch;
        memcpy(row + kept + own.first, row + a.velocity + own.first, own_bytes);
      }
      team.meet();
    }
    evaluate(a.tables, s);
    if (a.updates) {
      const MlpUpdate& u = a.updates[s];
      const float scale = a.scales ? float(a.scales[s]) : 1.0f;
      for (int64_t i = 0; i < t.n; i++) {
        float *x = t.rows + i * t.pitch, *from = u.from_start ? x + start : x;
        for (int64_t c = own.first; c < own.last; c += kFloats) {
          const vf v = velocity(x, c);
          vf sum = rounded(scale * load(from + c));
          for (int64_t k = 0; k < u.terms; k++)
            sum += float(terms[k].factor) * (terms[k].place < 0 ? v : load(x + past + terms[k].place * room + c));
          store(x + c, sum);
          if (u.kept >= 0) store(x + past + u.kept * room + c, v);
        }
      }
      terms += u.terms;
    } else {
      const float h = float(a.h[s]);
      for (int64_t i = 0; i < t.n; i++) {
        float* x = t.rows + i * t.pitch;
        for (int64_t c = own.first; c < own.last; c += kFloats) {
          const vf v = velocity(x, c);
          store(x + c, load(x + c) + h * v);
        }
      }
    }
    if (a.velocities) record(a.velocities + s * a.n * D, a.velocity);
    if (a.states) record(a.states + (s + 1) * a.n * D, 0);
    team.meet();
  }
  record(a.out, 0);
  for (int64_t i = 0; i < t.n; i++)
    for (int64_t c = own.first; c < own.last; c++)
      if (!(__builtin_fabsf(t.rows[i * t.pitch + c]) < __builtin_inff())) return t.sample + i;
  return -1;
}

template <class Linear>
int64_t run_sampler(const MlpSampleArgs& a) {
  double work = 0;  // multiply-adds of a sample's velocity
  int64_t widest = 0, heaviest = 0;
  for (int64_t l = 0; l < a.layer_count; l++)
    if (a.layers[l].map == MlpMap::linear) {
      const int64_t weights = a.layers[l].in_width * a.layers[l].out_width;
      work += double(weights);
      widest = larger(widest, a.layers[l].in_width);
      heaviest = larger(heaviest, weights * int64_t(a.low ? sizeof(bf16) : sizeof(float)));
    }
  // few samples, and more of them where weights that no cache keeps would be read once a thread
  const bool share = a.n <= Linear::kFew || (a.n <= kFewOnLarge && heaviest > level2_bytes());
  const double each = work * double(a.n), all = each * double(a.steps) * (a.tables_uncond ? 2 : 1);
  const double pay = share ? each / double(larger(a.layer_count, 1)) / kSharedGrain : all / kGrain;
  const int threads = int(larger(1, smaller(a.threads, int64_t(pay))));

  // an odd number of cache lines, so that rows do not fall on one another in the first-level cache
  const int64_t more = (a.tables_uncond ? 1 : 0) + (a.updates ? 1 + a.places : 0);  // velocities, and x_0
  int64_t pitch = round_up(a.row, kPlace) + more * round_up(a.D, kPlace) + kPlace;
  if (pitch / kPlace % 2 == 0) pitch += kPlace;
  const int64_t sample_bytes = pitch * int64_t(sizeof(float)) + Linear::input_bytes(1, widest);
  const int64_t fit = smaller(level2_bytes() / 2 / sample_bytes, Linear::kTile) / Linear::kRows * Linear::kRows;
  const int64_t most = larger(fit, Linear::kRows);
  const int64_t tiles = share ? smaller(a.n, 1) : smaller(round_up((a.n + most - 1) / most, threads), a.n);
  const int workers = share ? 1 : int(smaller(threads, tiles));

  // where there are many tiles they are whole groups of rows, else as even as can be
  const int64_t unit = tiles > threads ? Linear::kRows : 1, units = (a.n + unit - 1) / unit;
  auto begin = [&](int64_t tile) { return smaller(units * tile / tiles * unit, a.n); };
  const int64_t room = round_up(tiles ? (units + tiles - 1) / tiles * unit : 0, Linear::kRows);
  const int64_t row_bytes = round_up((room * pitch + kPlace) * int64_t(sizeof(float)), 64);
  const int64_t input_bytes = round_up(Linear::input_bytes(room, widest), 64);
  const int64_t panel_bytes = round_up(Linear::panel_bytes(widest), 64), own_bytes = input_bytes + panel_bytes;
  std::atomic<int64_t> next{0}, bad{a.n};
  auto run = [&](const Tile& t, const Team& team) {
    const int64_t found = run_tile<Linear>(a, t, team);
    for (int64_t least = bad; found >= 0 && found < least && !bad.compare_exchange_weak(least, found);) {
    }
  };
  if (share && threads > 1) {  // one row of scratch for each sample, and the rest for each thread
    const int64_t bytes = row_bytes + own_bytes * threads;
    char* scratch = static_cast<char*>(allocate(size_t(bytes)));
    memset(scratch, 0, size_t(bytes));
    Meeting meeting;
    team(threads, [&](int part, int parts) {
      char* own = scratch + row_bytes + own_bytes * part;
      run({reinterpret_cast<float*>(scratch), pitch, a.n, 0, own, reinterpret_cast<float*>(own + input_bytes)},
          {part, parts, &meeting});
    });
    release(scratch);
    return bad < a.n ? int64_t(bad) : -1;
  }
  const int64_t bytes = row_bytes + own_bytes;
  char* scratch = static_cast<char*>(allocate(size_t(bytes * workers)));
  parallel(workers, [&](int p) {
    char *mine = scratch + bytes * p, *own = mine + row_bytes;
    memset(mine, 0, size_t(bytes));
    for (int64_t i; (i = next.fetch_add(1)) < tiles;) {
      const int64_t first = begin(i), n = begin(i + 1) - first;
      run({reinterpret_cast<float*>(mine), pitch, n, first, own, reinterpret_cast<float*>(own + input_bytes)}, {});
    }
  });
  release(scratch);
  return bad < a.n ? int64_t(bad) : -1;
}

}  // namespace
}  // namespace FK_ISA
}  // namespace fk

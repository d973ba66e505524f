// How the CUDA kernels cut their work into blocks; needs no GPU, so that it can be tested without one.
#pragma once

#include <stdint.h>

namespace fk {
namespace gram {

constexpr int64_t kMostColumns = 32768;  // that a block adds up in float32
constexpr int64_t kMostRows = 128;       // of a panel
constexpr int64_t kBand = 32;            // columns of increments, which no two blocks share

inline int64_t ceil_div(int64_t n, int64_t d) {
  return (n + d - 1) / d;
}
inline int64_t pairs(int64_t n) {  // i <= j < n
  return n * (n + 1) / 2;
}

// Into how many parts of whole units the columns are cut, if a part takes `each` blocks and the device runs `room` at
// once: so that the grid fills the device a whole number of times, or nearly, and no block adds up too many columns.
inline int64_t splits_for(int64_t M, int64_t unit, int64_t room, int64_t each) {
  const int64_t units = ceil_div(M, unit), least = ceil_div(units * unit, kMostColumns);
  const int64_t waves = ceil_div(least * each, room);
  int64_t best = least;
  double filled = 0;
  for (int64_t w = waves; w < waves + 8 && filled < 0.97; w++) {
    const int64_t splits = w * room / each;
    const double fills = double(splits * each) / double(w * room);
    if (splits >= least && fills > filled + 0.01) best = splits, filled = fills;
  }
  return best < units ? best : units;
}

// The grids of increments: panels of rows by themselves, and pairs of different ones.
struct Grids {
  int64_t panels, pairs;
  int64_t own, other;  // splits of either
};
inline Grids grids_for(int64_t K, int64_t M, int64_t multiprocessors) {
  Grids g = {ceil_div(K - 1, kMostRows), 0, 0, 0};
  g.pairs = pairs(g.panels - 1);
  g.own = splits_for(M, kBand, multiprocessors, g.panels);
  if (g.pairs) g.other = splits_for(M, kBand, multiprocessors, g.pairs);
  return g;
}

}  // namespace gram
}  // namespace fk

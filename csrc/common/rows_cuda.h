// For kernels on rows of one length, some of them gathered by index: how a row is cut in words and shared by threads.
// A block is (threads of a row, rows), so that threads of one row are neighbours.
#pragma once

#include "common/cuda.h"

namespace fk {
namespace cuda {

constexpr int kRowBlock = 256;  // threads

// f(std::integral_constant<int, E>) with the most neighbours E of N, N / 2, ..., 1 in which rows of D elements that
// begin at these places can be taken. Null pointers do not count.
template <int N, class F, class... T>
int with_words(int64_t D, F&& f, const T*... p) {
  if constexpr (N > 1)
    if (D % N || aligned_head<N>(D, p...)) return with_words<N / 2>(D, f, p...);
  return f(std::integral_constant<int, N>{});
}

// Some lanes of a warp, a power of two, or a whole block for each row of so many words.
inline dim3 row_block(int64_t words) {
  unsigned lanes = 1;
  while (lanes < 32 && lanes < words) lanes *= 2;
  if (words > 4 * 32) lanes = kRowBlock;
  return {lanes, kRowBlock / lanes};
}
inline unsigned row_blocks(int64_t rows, dim3 block) {
  return static_cast<unsigned>((rows + block.y - 1) / block.y);
}

// Whether there is such a place in a bank of [knots, samples] rows and one at the next knot; negative ones are large.
__device__ __forceinline__ bool in_bank(int64_t interval, int64_t sample, int64_t knots, int64_t samples) {
  return uint64_t(interval) < uint64_t(knots - 1) && uint64_t(sample) < uint64_t(samples);
}

}  // namespace cuda
}  // namespace fk

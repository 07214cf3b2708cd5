// Samples cut into chunks, chunks into tiles.
//
// A chunk (4096 elements of ONE sample) is the unit of parallel work and of partial sums; a tile (256 elements) is what
// fits the innermost cache beside its noise and its copies in float32. Both are constants of the definition of a sum,
// not of the machine: the same bits come out for any number of threads, batch size and instruction set.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/macros.h"

namespace lfm_fast {

constexpr int64_t kTile = 256;
constexpr int64_t kChunk = 16 * kTile;

// The flat range of work items (sample, chunk) of a batch.
struct Chunks {
  int64_t samples, elements, per_sample;

  Chunks(int64_t samples_, int64_t elements_)
      : samples(samples_), elements(elements_), per_sample((elements_ + kChunk - 1) / kChunk) {}

  int64_t count() const { return samples * per_sample; }

  // Items that hold about `elements_per_thread` elements: less is not worth waking a thread for.
  int64_t grain(int64_t elements_per_thread) const {
    return std::max<int64_t>(1, elements_per_thread / std::max<int64_t>(1, std::min(elements, kChunk)));
  }

  LFM_HD int64_t sample(int64_t item) const { return item / per_sample; }
  LFM_HD int64_t begin(int64_t item) const { return (item % per_sample) * kChunk; }
  LFM_HD int64_t end(int64_t item) const {
    const int64_t stop = begin(item) + kChunk;
    return stop < elements ? stop : elements;
  }
};

// Sum of a chunk in float32: one accumulator per element of a tile, folded in halves at the end.
struct TileSum {
  alignas(64) float lanes[kTile];
  int64_t width;

  LFM_HD explicit TileSum(int64_t elements) : width(1) {
    while (width < elements && width < kTile) width *= 2;
    for (int64_t j = 0; j < width; ++j) lanes[j] = 0.0f;
  }

  LFM_HD float total() {
    for (int64_t half = width / 2; half >= 16; half /= 2)
      for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    for (int64_t half = (width < 16 ? width : 16) / 2; half >= 1; half /= 2)
      for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return lanes[0];
  }
};

// Mean over a sample's elements from its chunks' sums, in double and in order. 0 for a sample without elements.
inline double mean_of_chunks(const std::vector<float>& sums, int64_t sample, const Chunks& chunks) {
  double total = 0.0;
  for (int64_t c = 0; c < chunks.per_sample; ++c) total += sums[static_cast<size_t>(sample * chunks.per_sample + c)];
  return total / static_cast<double>(std::max<int64_t>(chunks.elements, 1));
}

}  // namespace lfm_fast

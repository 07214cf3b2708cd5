// Samples cut into chunks, chunks into tiles: how work is shared out and sums are ordered, on every device.
//
// A chunk (4096 elements of ONE sample) is the unit of parallel work and of partial sums; a tile (256 elements) is the
// number of accumulators a chunk's sum has. Both are constants of the definition of a sum, not of the machine: the same
// bits come out for any number of threads, batch size, instruction set, and on a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

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

// Mean over a sample's elements from its chunks' sums, in double and in order. 0 for a sample without elements.
LFM_HD double mean_of_total(double total, int64_t elements) {
  return total / static_cast<double>(elements > 1 ? elements : 1);
}

LFM_HD double mean_of_chunks(const float* sums, int64_t sample, const Chunks& chunks) {
  double total = 0.0;
  for (int64_t c = 0; c < chunks.per_sample; ++c) total += sums[sample * chunks.per_sample + c];
  return mean_of_total(total, chunks.elements);
}

}  // namespace lfm_fast

// The sum of a chunk on the CPU; a tile is also what fits the innermost cache beside its noise and its float32 copies.
#pragma once

#include <cstdint>

#include "common/chunks.h"
#include "common/macros.h"

namespace lfm_fast {

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

}  // namespace lfm_fast

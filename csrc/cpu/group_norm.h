// What the kernels of group_norm_silu have in common: where things lie, and the statistics of a group from those of its
// chunks.
#pragma once

#include "cpu/groups.h"

namespace lfm_fast {

// Bytes by which memory is asked for ahead: the processor asks for too little by itself, and anew in each page.
constexpr int64_t kAhead = 2048;

// Sum of a chunk and of the squared distances from its own mean.
struct ChunkMoments {
  double sum, squares;
};

struct GroupNorm {
  GroupShape shape;
  const void* x;
  void* y;
  std::vector<float> weight, bias;  // (C,)
  double eps;
  float *mean, *rstd;       // (B, G)
  ChunkMoments* moments;    // positions innermost: (slab, chunk); channels innermost: (slab, chunk, group)
  float *scales, *offsets;  // channels innermost: (B, C), by what x is multiplied and what is taken off or added

  // Of a chunk where channels are innermost: what is done once for each takes a tenth of its time on small maps, which
  // have to be enough for the threads all the same.
  int64_t chunk_positions() const { return shape.positions < 4096 ? kPositions : 4 * kPositions; }

  int64_t chunks() const {  // of a slab
    const int64_t elements = shape.channels_innermost ? shape.positions : shape.group_elements();
    const int64_t chunk = shape.channels_innermost ? chunk_positions() : kChunk;
    return shape.group_size() > 0 ? (elements + chunk - 1) / chunk : 0;
  }

  // Positions of a chunk where channels are innermost, and where it begins.
  int64_t rows(int64_t chunk) const {
    return std::min(chunk_positions(), shape.positions - chunk * chunk_positions());
  }
  int64_t place(int64_t slab, int64_t chunk) const {
    return (slab * shape.positions + chunk * chunk_positions()) * shape.channels;
  }

  // From the moments of a group's chunks, in order; `step` entries apart, chunk k of `elements(k)` elements.
  template <typename Elements>
  void write_statistics(int64_t group, const ChunkMoments* first, int64_t step, const Elements& elements) const {
    double sum = 0.0, squares = 0.0;
    for (int64_t k = 0; k < chunks(); ++k) sum += first[k * step].sum;
    const double centre_of_group = sum / shape.count();
    for (int64_t k = 0; k < chunks(); ++k) {
      const ChunkMoments& chunk = first[k * step];
      const double n = static_cast<double>(elements(k)), distance = chunk.sum / n - centre_of_group;
      squares += chunk.squares + n * distance * distance;
    }
    mean[group] = static_cast<float>(centre_of_group);
    rstd[group] = static_cast<float>(1.0 / std::sqrt(squares / shape.count() + eps));
  }

  // The same of a sample's groups where channels are innermost.
  void write_statistics_of_sample(int64_t slab) const {
    for (int64_t g = 0; g < shape.groups; ++g)
      write_statistics(slab * shape.groups + g, moments + slab * chunks() * shape.groups + g, shape.groups,
                       [this](int64_t chunk) { return rows(chunk) * shape.group_size(); });
  }

  // The moments of a chunk where channels are innermost, from each channel's sums of distances from `origins` and of
  // their squares.
  LFM_HD void write_moments(int64_t slab, int64_t chunk, const float* origins, const float* sums,
                            const float* squares) const {
    const int64_t size = shape.group_size();
    const double n = static_cast<double>(rows(chunk) * size);
    ChunkMoments* out = moments + (slab * chunks() + chunk) * shape.groups;
    for (int64_t g = 0; g < shape.groups; ++g) {
      const double sum = sum_of(sums + g * size, size);
      out[g].sum = sum + n * origins[g * size];
      out[g].squares = sum_of(squares + g * size, size) - sum * sum / n;
    }
  }

  // The numbers that a chunk's sums are of distances from, near its mean, so that one pass over memory gives both sums:
  // the mean of its first row, `row`, over the channels of a group. For any numbers, its own distance from the mean is
  // at most 16 standard deviations of the chunk, so that no more than 8 of 24 bits cancel.
  LFM_HD void write_origins(const float* row, float* origins) const {
    const int64_t size = shape.group_size();
    for (int64_t g = 0; g < shape.groups; ++g) {
      const float origin = sum_of(row + g * size, size) / static_cast<float>(size);
      for (int64_t c = g * size; c < (g + 1) * size; ++c) origins[c] = origin;
    }
  }

  static LFM_HD float sum_of(const float* values, int64_t n) {
    float total = 0.0f;
    for (int64_t j = 0; j < n; ++j) total += values[j];
    return total;
  }
};

}  // namespace lfm_fast

// The modulated layer norm of one row: what modulated_layer_norm and gated_residual_norm have in common.
//
// A row is read from memory once; the second and third pass find it in the innermost cache. The variance is that of the
// differences from the mean, which a large mean does not spoil.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/channel_vectors.h"

namespace lfm_fast {

// Pairs in a block.
template <Level level>
constexpr int kPairs = kBlock / (2 * Vectors<level>::width);

// What one row needs beside its data.
struct NormShape {
  TailMask mask;
  float channels, eps;
};

struct Statistics {
  float mean, rstd;
};

template <Level level, Order order, Element X, typename Row>
LFM_HD float row_sum(Row& x, const NormShape& shape) {
  constexpr int width = Vectors<level>::width;
  LaneSum<level, order> sum;
  for (int64_t block = 0; block < shape.mask.blocks; ++block) {
LFM_UNROLL_PAIRS
    for (int p = 0; p < kPairs<level>; ++p) {
      Pair<level> v;
      load<level, order, X>(x.place(block, 2 * p * width), v);
      sum.lanes[2 * p] += v.a;
      sum.lanes[2 * p + 1] += v.b;
    }
  }
  return sum.total();
}

template <Level level, Order order, Element X, typename Row>
LFM_HD Statistics row_statistics(Row& x, float sum_of_row, const NormShape& shape) {
  constexpr int width = Vectors<level>::width;
  const float mean = sum_of_row / shape.channels;
  LaneSum<level, order> squares;
  for (int64_t block = 0; block < shape.mask.blocks; ++block) {
LFM_UNROLL_PAIRS
    for (int p = 0; p < kPairs<level>; ++p) {
      Pair<level> v;
      load<level, order, X>(x.place(block, 2 * p * width), v);
      v.a -= mean;
      v.b -= mean;
      shape.mask.apply<level, order>(block, 2 * p * width, v);
      squares.lanes[2 * p] += v.a * v.a;
      squares.lanes[2 * p + 1] += v.b * v.b;
    }
  }
  const float variance = squares.total() / shape.channels;
  return {mean, 1.0f / std::sqrt(variance + shape.eps)};
}

// y = (x - mean) rstd factor + shift with factor = 1 + scale. `ahead`: rows to fetch meanwhile.
template <Level level, Order order, Element X, Element M, typename Row, typename... Ahead>
LFM_HD void modulate_row(Row& x, const char* shift, const char* factor, const Statistics& s, RowOut<M>& y,
                         const NormShape& shape, const Ahead&... ahead) {
  constexpr int width = Vectors<level>::width;
  for (int64_t block = 0; block < shape.mask.blocks; ++block) {
    (ahead.fetch(block), ...);
LFM_UNROLL_PAIRS
    for (int p = 0; p < kPairs<level>; ++p) {
      const int64_t at = 2 * p * width;
      Pair<level> v, times, plus;
      load<level, order, X>(x.place(block, at), v);
      load_channels<level>(factor, block * kBlock + at, times);
      load_channels<level>(shift, block * kBlock + at, plus);
      v.a = (v.a - s.mean) * s.rstd * times.a + plus.a;
      v.b = (v.b - s.mean) * s.rstd * times.b + plus.b;
      store<level, order, M, nan_of(X, M)>(y.place(block, at), v);
    }
  }
  y.finish();
}

// mean and rstd of a row as they were saved. Any NaN among them becomes the one that arithmetic makes.
LFM_HD Statistics saved_statistics(const float* mean, const float* rstd, int64_t at) {
  const float m = mean[at], r = rstd[at];
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  return {m == m ? m : nan, r == r ? r : nan};
}

// The row's means of d = grad_y factor and of d n, n = (x - mean) rstd; grad_y and grad_y n are added to the columns'
// sums.
struct RowMeans {
  float along_ones, along_n;
};

template <Level level, Order order, Element X, Element M>
LFM_HD RowMeans add_row(const RowIn<M>& grad_y, const RowIn<X>& x, const char* factor, const Statistics& s,
                        char* grad_shift, char* grad_scale, const NormShape& shape) {
  constexpr int width = Vectors<level>::width;
  LaneSum<level, order> ones, along;
  for (int64_t block = 0; block < shape.mask.blocks; ++block) {
LFM_UNROLL_PAIRS
    for (int p = 0; p < kPairs<level>; ++p) {
      const int64_t at = 2 * p * width, channel = block * kBlock + at;
      Pair<level> g, n, times;
      load<level, order, M>(grad_y.place(block, at), g);
      load<level, order, X>(x.place(block, at), n);
      load_channels<level>(factor, channel, times);
      n.a = (n.a - s.mean) * s.rstd;
      n.b = (n.b - s.mean) * s.rstd;
      shape.mask.apply<level, order>(block, at, n);
      add_to<level>(grad_shift, channel, g);
      const Pair<level> product{g.a * n.a, g.b * n.b};
      add_to<level>(grad_scale, channel, product);
      const Pair<level> d{g.a * times.a, g.b * times.b};
      ones.lanes[2 * p] += d.a;
      ones.lanes[2 * p + 1] += d.b;
      along.lanes[2 * p] += d.a * n.a;
      along.lanes[2 * p + 1] += d.b * n.b;
    }
  }
  return {ones.total() / shape.channels, along.total() / shape.channels};
}

// The norm's gradient in a pair of x: rstd ((d - mean of d) - n mean of d n)
template <Level level>
LFM_HD void norm_gradient(const Pair<level>& g, const Pair<level>& x, const Pair<level>& factor, const Statistics& s,
                          const RowMeans& means, Pair<level>& out) {
  const Pair<level> n{(x.a - s.mean) * s.rstd, (x.b - s.mean) * s.rstd};
  out.a = (g.a * factor.a - means.along_ones - n.a * means.along_n) * s.rstd;
  out.b = (g.b * factor.b - means.along_ones - n.b * means.along_n) * s.rstd;
}

}  // namespace lfm_fast

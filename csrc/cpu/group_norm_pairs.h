// group_norm_silu of bfloat16 on pairs of vectors (cpu/vectors.h): widening and narrowing then cost an operation each.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "common/activations.h"
#include "cpu/group_norm.h"
#include "cpu/silu_vectors.h"

namespace lfm_fast {

// y = act(scale x + offset): one product and one sum, for bfloat16 has no digits that they could cost. Where SiLU
// follows, both are divided by log 2 as well.
struct ScaleAndOffset {
  float scale, offset;

  LFM_HD ScaleAndOffset(float mean, float rstd, float weight, float bias, bool silu_follows) {
    const double unit = silu_follows ? kLog2E : 1.0f;
    scale = number(static_cast<float>(unit * rstd * weight));
    offset = number(static_cast<float>(unit * bias - static_cast<double>(mean) * scale));
  }

  // Any NaN becomes the one that arithmetic makes, which rounding cannot carry over into a number.
  static LFM_HD float number(float x) { return x == x ? x : std::numeric_limits<float>::quiet_NaN(); }
};

template <Level level, bool silu_follows>
LFM_HD void normalise_pair(const char* from, char* to, const Pair<level>& scale, const Pair<level>& offset) {
  Pair<level> v;
  load<level, Order::split, Element::bfloat16>(from, v);
  v.a = v.a * scale.a + offset.a;
  v.b = v.b * scale.b + offset.b;
  if constexpr (silu_follows) {
    Pair<level> silu;
    silu_of_exponent<level>(v.a, silu.a);
    silu_of_exponent<level>(v.b, silu.b);
    store_rounded_up<level>(to, silu);
  } else {
    store<level, Order::split, Element::bfloat16, Nan::short_payload>(to, v);
  }
}

// The same of the first `n` elements of a pair.
template <Level level, bool silu_follows>
LFM_HD void normalise_part(const char* from, char* to, int64_t n, const Pair<level>& scale,
                           const Pair<level>& offset) {
  char in[4 * Vectors<level>::width] = {}, out[4 * Vectors<level>::width];
  std::memcpy(in, from, static_cast<size_t>(2 * n));
  normalise_pair<level, silu_follows>(in, out, scale, offset);
  std::memcpy(to, out, static_cast<size_t>(2 * n));
}

// `n` elements of one channel.
template <Level level, bool silu_follows>
LFM_HD void normalise_run(const uint16_t* from, uint16_t* to, int64_t n, const ScaleAndOffset& channel) {
  constexpr int64_t step = 2 * Vectors<level>::width;
  const char* in = reinterpret_cast<const char*>(from);
  char* out = reinterpret_cast<char*>(to);
  const typename Vectors<level>::Float zero{}, times = zero + channel.scale, plus = zero + channel.offset;
  const Pair<level> scale{times, times}, offset{plus, plus};
  int64_t at = 0;
  for (; at + step <= n; at += step) normalise_pair<level, silu_follows>(in + 2 * at, out + 2 * at, scale, offset);
  if (at < n) normalise_part<level, silu_follows>(in + 2 * at, out + 2 * at, n - at, scale, offset);
}

// Channels innermost. A position's channels need not be whole pairs, so as many positions are taken for one row, a
// period, as make pairs of the widest vectors. Tables are of a period, pairs as they lie in registers.
template <bool silu_follows>
struct PairsOfChannels : GroupNorm {
  static constexpr int64_t kWidest = 2 * Vectors<Level::avx512>::width;
  static int64_t positions_of_period(const GroupShape& shape) { return kWidest / std::gcd(kWidest, shape.channels); }

  struct Scratch {
    int64_t positions, period;
    std::vector<float> origins, table, other_table, sums, squares;
    Scratch(const GroupShape& shape, bool)
        : positions(positions_of_period(shape)),
          period(positions * shape.channels),
          origins(static_cast<size_t>(shape.channels)),
          table(static_cast<size_t>(period)),
          other_table(table),
          sums(table),
          squares(table) {}
  };

  template <Level level>
  static LFM_HD void load_table(const std::vector<float>& table, int64_t at, Pair<level>& out) {
    load<level, Order::natural, Element::float32>(reinterpret_cast<const char*>(table.data() + at), out);
  }

  template <Level level>
  static LFM_HD void store_table(std::vector<float>& table, int64_t at, const Pair<level>& in) {
    store<level, Order::natural, Element::float32>(reinterpret_cast<char*>(table.data() + at), in);
  }

  // A table from one number per channel.
  template <Level level>
  LFM_HD void fill_table(const float* of_channel, const Scratch& scratch, std::vector<float>& table) const {
    for (int64_t r = 0; r < scratch.positions; ++r)
      std::copy_n(of_channel, shape.channels, table.data() + r * shape.channels);
    for (int64_t at = 0; at < scratch.period; at += 2 * Vectors<level>::width) {
      Pair<level> v;
      load<level, Order::split, Element::float32>(reinterpret_cast<const char*>(table.data() + at), v);
      store_table<level>(table, at, v);
    }
  }

  // Numbers of a table in their channels' order, those of a period's positions added up in the first.
  template <Level level>
  LFM_HD void fold_table(const Scratch& scratch, std::vector<float>& table) const {
    for (int64_t at = 0; at < scratch.period; at += 2 * Vectors<level>::width) {
      Pair<level> v;
      load_table<level>(table, at, v);
      store<level, Order::split, Element::float32>(reinterpret_cast<char*>(table.data() + at), v);
    }
    float* __restrict total = table.data();
    for (int64_t r = 1; r < scratch.positions; ++r)
      for (int64_t c = 0; c < shape.channels; ++c) total[c] += total[r * shape.channels + c];
  }

  template <Level level>
  LFM_HD void measure(int64_t slab, int64_t chunk, Scratch& scratch) const {
    const uint16_t* from = static_cast<const uint16_t*>(x) + place(slab, chunk);
    float *origins = scratch.origins.data(), *sums = scratch.sums.data(), *squares = scratch.squares.data();
    widen_tile<Element::bfloat16>(sums, from, shape.channels);
    write_origins(sums, origins);
    fill_table<level>(origins, scratch, scratch.table);
    std::fill_n(sums, scratch.period, 0.0f);
    std::fill_n(squares, scratch.period, 0.0f);
    const int64_t periods = rows(chunk) / scratch.positions;
    int64_t k = 0;
    for (; k + 4 <= periods; k += 4) add_periods<level, 4>(from + k * scratch.period, scratch);
    for (; k < periods; ++k) add_periods<level, 1>(from + k * scratch.period, scratch);
    fold_table<level>(scratch, scratch.sums);
    fold_table<level>(scratch, scratch.squares);
    for (int64_t row = periods * scratch.positions; row < rows(chunk); ++row) {
      for (int64_t c = 0; c < shape.channels; ++c) {
        const float distance = bfloat16_to_float(from[row * shape.channels + c]) - origins[c];
        sums[c] += distance;
        squares[c] += distance * distance;
      }
    }
    write_moments(slab, chunk, origins, sums, squares);
  }

  // What `count` periods add to their elements' sums: several, so that the sums travel to the cache less often.
  template <Level level, int count>
  LFM_HD void add_periods(const uint16_t* from, Scratch& scratch) const {
    const char* first = reinterpret_cast<const char*>(from);
    const int64_t period = scratch.period;
    for (int64_t at = 0; at < period; at += 2 * Vectors<level>::width) {
      Pair<level> origin, sum, square, d;
      load_table<level>(scratch.table, at, origin);
      load_table<level>(scratch.sums, at, sum);
      load_table<level>(scratch.squares, at, square);
#pragma GCC unroll 4
      for (int k = 0; k < count; ++k) {
        __builtin_prefetch(first + 2 * (k * period + at) + kAhead);
        load<level, Order::split, Element::bfloat16>(first + 2 * (k * period + at), d);
        d.a -= origin.a;
        d.b -= origin.b;
        sum.a += d.a;
        sum.b += d.b;
        square.a += d.a * d.a;
        square.b += d.b * d.b;
      }
      store_table<level>(scratch.sums, at, sum);
      store_table<level>(scratch.squares, at, square);
    }
  }

  void finish(int64_t slab) const {
    write_statistics_of_sample(slab);
    for (int64_t c = 0; c < shape.channels; ++c) {
      const size_t at = static_cast<size_t>(c);
      const int64_t group = slab * shape.groups + c / shape.group_size();
      const ScaleAndOffset channel(mean[group], rstd[group], weight[at], bias[at], silu_follows);
      scales[slab * shape.channels + c] = channel.scale;
      offsets[slab * shape.channels + c] = channel.offset;
    }
  }

  template <Level level>
  LFM_HD void apply(int64_t slab, int64_t chunk, Scratch& scratch) const {
    constexpr int64_t step = 2 * Vectors<level>::width;
    const int64_t start = place(slab, chunk), count = rows(chunk) * shape.channels, period = scratch.period;
    const char* from = reinterpret_cast<const char*>(static_cast<const uint16_t*>(x) + start);
    char* to = reinterpret_cast<char*>(static_cast<uint16_t*>(y) + start);
    fill_table<level>(scales + slab * shape.channels, scratch, scratch.table);
    fill_table<level>(offsets + slab * shape.channels, scratch, scratch.other_table);
    for (int64_t first = 0; first < count; first += period) {
      const int64_t n = std::min(period, count - first);
      for (int64_t at = 0; at < n; at += step) {
        const int64_t place = 2 * (first + at);
        __builtin_prefetch(from + place + kAhead);
        __builtin_prefetch(to + place + kAhead, 1);
        Pair<level> scale, offset;
        load_table<level>(scratch.table, at, scale);
        load_table<level>(scratch.other_table, at, offset);
        if (at + step <= n)
          normalise_pair<level, silu_follows>(from + place, to + place, scale, offset);
        else
          normalise_part<level, silu_follows>(from + place, to + place, n - at, scale, offset);
      }
    }
  }
};

}  // namespace lfm_fast

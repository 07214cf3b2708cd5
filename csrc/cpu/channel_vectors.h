// Per-sample vectors (B, D) beside tokens: read into float32 tables before the work, and summed over tokens after it.
#pragma once

#include "cpu/tokens.h"

namespace lfm_fast {

// gate, shift or 1 + scale of every sample in float32, pairs as they lie in registers: no row converts them again.
struct VectorTable {
  int64_t kinds, width;
  std::vector<float> values;

  VectorTable(const TokenItems& items, int64_t kinds_)
      : kinds(kinds_), width(items.padded_width()), values(static_cast<size_t>(items.samples * kinds * width)) {}

  LFM_HD const char* row(int64_t sample, int64_t kind) const {
    return reinterpret_cast<const char*>(values.data() + (sample * kinds + kind) * width);
  }
  LFM_HD char* row(int64_t sample, int64_t kind) {
    return reinterpret_cast<char*>(values.data() + (sample * kinds + kind) * width);
  }
};

struct VectorSource {
  TokenRows rows;
  float plus;  // 1 for scale
};

template <Order order, Element M>
struct FillTable {
  const TokenItems& items;
  VectorTable& table;
  std::vector<VectorSource> sources;  // one per kind

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    constexpr int step = 2 * Vectors<level>::width;
    for (int64_t task = first; task < last; ++task) {
      const int64_t sample = task / table.kinds, kind = task % table.kinds;
      const VectorSource& source = sources[static_cast<size_t>(kind)];
      const RowIn<M> row(source.rows.row(sample, 0), items.width);
      char* out = table.row(sample, kind);
      for (int64_t channel = 0; channel < table.width; channel += step) {
        Pair<level> v;
        load<level, order, M>(row.place(channel / kBlock, channel % kBlock), v);
        v.a += source.plus;
        v.b += source.plus;
        store<level, Order::natural, Element::float32>(out + channel * size_of(Element::float32), v);
      }
    }
  }

  void run_all() const {
    run_kernel(*this, items.samples * table.kinds, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, table.width)));
  }
};

// A pair of a table or of a part.
template <Level level>
LFM_HD void load_channels(const char* row, int64_t channel, Pair<level>& out) {
  load<level, Order::natural, Element::float32>(row + channel * size_of(Element::float32), out);
}

// Sums over a sample's tokens of `kinds` quantities per channel: an item adds up its rows in a part of its own, the
// parts of a sample are then added in order. In a part, pairs lie as they lay in registers.
struct ColumnSums {
  int64_t kinds, width;
  std::vector<float> parts;

  ColumnSums(const TokenItems& items, int64_t kinds_)
      : kinds(kinds_), width(items.padded_width()), parts(static_cast<size_t>(items.count() * kinds * width)) {}

  LFM_HD const char* part(int64_t item, int64_t kind) const {
    return reinterpret_cast<const char*>(parts.data() + (item * kinds + kind) * width);
  }
  LFM_HD char* part(int64_t item, int64_t kind) {
    return reinterpret_cast<char*>(parts.data() + (item * kinds + kind) * width);
  }
};

// One element pair of a part grows by `value`.
template <Level level>
LFM_HD void add_to(char* row, int64_t channel, const Pair<level>& value) {
  Pair<level> sum;
  load_channels<level>(row, channel, sum);
  sum.a += value.a;
  sum.b += value.b;
  store<level, Order::natural, Element::float32>(row + channel * size_of(Element::float32), sum);
}

// The parts of each sample and kind added up, to outputs (B, D) of element type M.
template <Order order, Element M>
struct AddParts {
  const TokenItems& items;
  const ColumnSums& sums;
  std::vector<OutputTokens> outputs;  // one per kind

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    constexpr int step = 2 * Vectors<level>::width;
    for (int64_t task = first; task < last; ++task) {
      const int64_t sample = task / sums.kinds, kind = task % sums.kinds;
      RowOut<M> out(outputs[static_cast<size_t>(kind)].row(sample, 0), items.width);
      for (int64_t channel = 0; channel < sums.width; channel += step) {
        Pair<level> total{};
        for (int64_t k = 0; k < items.per_sample; ++k) {
          Pair<level> part;
          load_channels<level>(sums.part(sample * items.per_sample + k, kind), channel, part);
          total.a += part.a;
          total.b += part.b;
        }
        store<level, order, M>(out.place(channel / kBlock, channel % kBlock), total);
      }
      out.finish();
    }
  }

  void run_all() const {
    const int64_t work = std::max<int64_t>(1, items.per_sample * sums.width);
    run_kernel(*this, items.samples * sums.kinds, std::max<int64_t>(1, (1 << 15) / work));
  }
};

}  // namespace lfm_fast

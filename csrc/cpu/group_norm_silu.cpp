// group_norm_silu: statistics of each group, then h = weight (x - mean) rstd + bias and y = silu(h), x read from memory
// once.
#include <tuple>

#include "common/activations.h"
#include "common/registration.h"
#include "cpu/group_norm.h"
#include "cpu/group_norm_pairs.h"

namespace lfm_fast {
namespace {

template <Element element, bool silu_follows>
LFM_HD float normalised(float x, float centre, float scale, float bias) {
  const float h = (x - centre) * scale + bias;
  if constexpr (!silu_follows) return h;
  return element == Element::float32 ? silu(h) : silu_to_float16(h);
}

template <Element element, bool silu_follows>
struct PositionsInnermost : GroupNorm {
  using Type = typename Stored<element>::Type;

  struct Scratch {
    alignas(64) float values[kChunk];
    Scratch(const GroupShape&, bool) {}
  };

  int64_t chunk_elements(int64_t chunk) const { return std::min(kChunk, shape.group_elements() - chunk * kChunk); }

  template <Level>
  LFM_HD void measure(int64_t slab, int64_t chunk, Scratch& scratch) const {
    const int64_t n = chunk_elements(chunk);
    const Type* from = static_cast<const Type*>(x) + slab * shape.group_elements() + chunk * kChunk;
    const float* __restrict values = as_float<element>(from, scratch.values, n);
    TileSum sum(n), squares(n);
    for (int64_t start = 0; start < n; start += kTile) {
      const int64_t width = std::min(kTile, n - start);
      for (int64_t j = 0; j < width; ++j) sum.lanes[j] += values[start + j];
    }
    const float total = sum.total(), centre_of_chunk = total / static_cast<float>(n);
    for (int64_t start = 0; start < n; start += kTile) {
      const int64_t width = std::min(kTile, n - start);
      for (int64_t j = 0; j < width; ++j) {
        const float distance = values[start + j] - centre_of_chunk;
        squares.lanes[j] += distance * distance;
      }
    }
    moments[slab * chunks() + chunk] = {total, squares.total()};
  }

  void finish(int64_t slab) const {
    write_statistics(slab, moments + slab * chunks(), 1,
                     [this](int64_t chunk) { return chunk_elements(chunk); });
  }

  template <Level level>
  LFM_HD void apply(int64_t slab, int64_t chunk, Scratch&) const {
    const int64_t positions = shape.positions, end = chunk * kChunk + chunk_elements(chunk);
    const int64_t first_channel = slab % shape.groups * shape.group_size();
    for (int64_t at = chunk * kChunk; at < end;) {
      const int64_t channel = at / positions, stop = std::min(end, (channel + 1) * positions);
      const size_t c = static_cast<size_t>(first_channel + channel);
      run<level>(slab * shape.group_elements() + at, stop - at, mean[slab], rstd[slab], weight[c], bias[c]);
      at = stop;
    }
  }

  // `n` elements of one channel.
  template <Level level>
  LFM_HD void run(int64_t start, int64_t n, float centre, float deviation, float w, float b) const {
    const Type* from = static_cast<const Type*>(x) + start;
    Type* to = static_cast<Type*>(y) + start;
    if constexpr (element == Element::bfloat16) {
      normalise_run<level, silu_follows>(from, to, n, ScaleAndOffset(centre, deviation, w, b, silu_follows));
    } else {
      const float scale = deviation * w;
      for (int64_t at = 0; at < n; at += kTile) tile(from + at, to + at, std::min(kTile, n - at), centre, scale, b);
    }
  }

  LFM_HD void tile(const Type* in, Type* out, int64_t n, float centre, float scale, float b) const {
    TileBuffer values, results;
    const float* __restrict from = as_float<element>(in, values.values, n);
    float* __restrict to = results.values;
    if constexpr (element == Element::float32) to = out;
    for (int64_t j = 0; j < n; ++j) to[j] = normalised<element, silu_follows>(from[j], centre, scale, b);
    if constexpr (element != Element::float32) narrow_tile<element>(out, results.values, n);
  }
};

template <Element element, bool silu_follows>
struct ChannelsInnermost : GroupNorm {
  using Type = typename Stored<element>::Type;

  struct Scratch {
    std::vector<float> origins, sums, squares;
    Scratch(const GroupShape& shape, bool)
        : origins(static_cast<size_t>(shape.channels)), sums(origins), squares(origins) {}
  };

  template <Level>
  LFM_HD void measure(int64_t slab, int64_t chunk, Scratch& scratch) const {
    const Type* from = static_cast<const Type*>(x) + place(slab, chunk);
    float *origins = scratch.origins.data(), *sums = scratch.sums.data(), *squares = scratch.squares.data();
    widen_tile<element>(sums, from, shape.channels);
    write_origins(sums, origins);
    add_rows(from, rows(chunk), origins, sums, squares);
    write_moments(slab, chunk, origins, sums, squares);
  }

  // What comes as far ahead as `count` elements reach.
  static LFM_HD void ask_ahead(const Type* row, int64_t count) {
    const char* first = reinterpret_cast<const char*>(row) + kAhead;
    for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof(Type)); at += 64) __builtin_prefetch(first + at);
  }

  // What rows add to their channels' sums. Four at a time, so that the sums travel to the cache and back less often.
  LFM_HD void add_rows(const Type* __restrict from, int64_t count, const float* __restrict origins,
                       float* __restrict sums, float* __restrict squares) const {
    const int64_t channels = shape.channels;
    for (int64_t c = 0; c < channels; ++c) sums[c] = squares[c] = 0.0f;
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
      const Type* __restrict row = from + r * channels;
      ask_ahead(row, 4 * channels);
      for (int64_t c = 0; c < channels; ++c) {
        const float origin = origins[c];
        const float d0 = Stored<element>::load(row[c]) - origin;
        const float d1 = Stored<element>::load(row[channels + c]) - origin;
        const float d2 = Stored<element>::load(row[2 * channels + c]) - origin;
        const float d3 = Stored<element>::load(row[3 * channels + c]) - origin;
        sums[c] += (d0 + d1) + (d2 + d3);
        squares[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
      }
    }
    for (; r < count; ++r) {
      for (int64_t c = 0; c < channels; ++c) {
        const float distance = Stored<element>::load(from[r * channels + c]) - origins[c];
        sums[c] += distance;
        squares[c] += distance * distance;
      }
    }
  }

  void finish(int64_t slab) const {
    write_statistics_of_sample(slab);
    for (int64_t c = 0; c < shape.channels; ++c) {
      const int64_t group = slab * shape.groups + c / shape.group_size();
      offsets[slab * shape.channels + c] = mean[group];
      scales[slab * shape.channels + c] = rstd[group] * weight[static_cast<size_t>(c)];
    }
  }

  template <Level>
  LFM_HD void apply(int64_t slab, int64_t chunk, Scratch&) const {
    const int64_t channels = shape.channels;
    const float* __restrict centre = offsets + slab * channels;
    const float* __restrict scale = scales + slab * channels;
    const float* __restrict b = bias.data();
    for (int64_t r = 0; r < rows(chunk); ++r) {
      const int64_t at = place(slab, chunk) + r * channels;
      const Type* __restrict row = static_cast<const Type*>(x) + at;
      Type* __restrict out = static_cast<Type*>(y) + at;
      ask_ahead(row, channels);
      for (int64_t c = 0; c < channels; ++c) {
        const float value = Stored<element>::load(row[c]);
        out[c] = Stored<element>::store(normalised<element, silu_follows>(value, centre[c], scale[c], b[c]));
      }
    }
  }
};

template <Element element, bool silu_follows>
void run_layout(GroupNorm&& norm) {
  const GroupShape& shape = norm.shape;
  const int64_t per_slab = norm.chunks() * (shape.channels_innermost ? shape.groups : 1);
  std::vector<ChunkMoments> moments(static_cast<size_t>(shape.slabs() * per_slab));
  norm.moments = moments.data();
  if (!shape.channels_innermost) return run_stages(PositionsInnermost<element, silu_follows>{std::move(norm)});
  std::vector<float> scales(static_cast<size_t>(shape.samples * shape.channels)), offsets(scales);
  norm.scales = scales.data();
  norm.offsets = offsets.data();
  if constexpr (element == Element::bfloat16)
    run_stages(PairsOfChannels<silu_follows>{std::move(norm)});
  else
    run_stages(ChannelsInnermost<element, silu_follows>{std::move(norm)});
}

template <Element element>
void run_element(GroupNorm&& norm, bool silu_follows) {
  if (silu_follows)
    run_layout<element, true>(std::move(norm));
  else
    run_layout<element, false>(std::move(norm));
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, int64_t num_groups,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, double eps, bool silu_follows) {
  check_on_cpu(x, "x");
  const Element element = element_of(x, "x");
  const Tensor input = in_group_layout(x);
  const GroupShape shape = group_shape(input, num_groups);
  GroupNorm norm{shape, nullptr, nullptr, channel_values(weight, "weight", shape.channels, 1.0f),
                 channel_values(bias, "bias", shape.channels, 0.0f), eps, nullptr, nullptr, nullptr, nullptr, nullptr};
  Tensor y = empty_in_layout_of(input);
  Tensor mean = new_tensor({shape.samples, num_groups}, ScalarType::Float);
  Tensor rstd = new_tensor({shape.samples, num_groups}, ScalarType::Float);
  norm.x = input.const_data_ptr();
  norm.y = y.mutable_data_ptr();
  norm.mean = static_cast<float*>(mean.mutable_data_ptr());
  norm.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  switch (element) {
    case Element::float32: run_element<Element::float32>(std::move(norm), silu_follows); break;
    case Element::bfloat16: run_element<Element::bfloat16>(std::move(norm), silu_follows); break;
    case Element::float16: run_element<Element::float16>(std::move(norm), silu_follows); break;
  }
  return {y, mean, rstd};
}

}  // namespace

LFM_REGISTER(CPU, group_norm_silu, group_norm_silu);

}  // namespace lfm_fast

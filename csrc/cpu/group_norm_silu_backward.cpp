// group_norm_silu_backward: with n = (x - mean) rstd, h = weight n + bias and g = grad_y silu'(h), the gradient in x
// is rstd (weight g - mean(weight g) - n mean(weight g n)), the means over each group; those in weight and bias are the
// sums of g n and g.
#include <tuple>

#include "common/activations.h"
#include "common/registration.h"
#include "cpu/groups.h"

namespace lfm_fast {
namespace {

// Sums over a channel's positions, or a part of them.
struct ChannelSums {
  float g, gn;
};

// What the gradient in x takes off weight g: mean(weight g) and mean(weight g n) of a group.
struct Means {
  float g, gn;
};

struct GroupNormBackward {
  GroupShape shape;
  const void *grad_y, *x;
  void* grad_x;
  std::vector<float> weight, bias;  // (C,)
  std::vector<float> mean, rstd;    // (B, G)
  ChannelSums* parts;  // positions innermost: (B, C, part of a channel); channels innermost: (B, chunk, C)
  ChannelSums* sums;   // (B, C)
  Means* means;        // (B, G)

  // Of 4096 positions of one channel, or of 64 positions of all.
  int64_t chunks_of_channel() const {
    const int64_t chunk = shape.channels_innermost ? kPositions : kChunk;
    return (shape.positions + chunk - 1) / chunk;
  }
  int64_t chunks() const {  // of a slab
    return shape.channels_innermost ? chunks_of_channel() : shape.group_size() * chunks_of_channel();
  }

  // From the parts of a channel, in order, `step` entries apart.
  static ChannelSums total(const ChannelSums* first, int64_t count, int64_t step) {
    double g = 0.0, gn = 0.0;
    for (int64_t k = 0; k < count; ++k) {
      g += first[k * step].g;
      gn += first[k * step].gn;
    }
    return {static_cast<float>(g), static_cast<float>(gn)};
  }

  // Once its channels' sums are there.
  void finish_group(int64_t group) const {
    const int64_t sample = group / shape.groups, first = group % shape.groups * shape.group_size();
    double g = 0.0, gn = 0.0;
    for (int64_t c = first; c < first + shape.group_size(); ++c) {
      const ChannelSums& of_channel = sums[sample * shape.channels + c];
      const double w = weight[static_cast<size_t>(c)];
      g += w * of_channel.g;
      gn += w * of_channel.gn;
    }
    means[group] = {static_cast<float>(g / shape.count()), static_cast<float>(gn / shape.count())};
  }
};

template <bool silu_follows>
LFM_HD float gradient_before_silu(float grad_y, float n, float w, float b) {
  return silu_follows ? grad_y * silu_derivative(n * w + b) : grad_y;
}

LFM_HD float gradient_before_norm(float g, float n, float w, float rstd, float mean_g, float mean_gn) {
  return rstd * ((w * g - mean_g) - n * mean_gn);
}

// g costs an exponential and a division, so it is kept from measuring to applying: in the output itself, if that holds
// float32.
template <Element element, bool silu_follows>
constexpr bool keep_in_output = element == Element::float32 && silu_follows;

template <Element element, bool silu_follows>
struct PositionsInnermost : GroupNormBackward {
  using Type = typename Stored<element>::Type;
  static constexpr bool kKeepInOutput = keep_in_output<element, silu_follows>;
  static constexpr int64_t kMostKept = 1 << 17;  // half a megabyte: a part of a core's own cache

  // For 16-bit outputs, where whole slabs are done at a time and are not too large, g is kept here.
  struct Scratch {
    std::vector<float> kept;
    Scratch(const GroupShape& shape, bool whole_slabs) {
      if (silu_follows && !kKeepInOutput && whole_slabs && shape.group_elements() <= kMostKept)
        kept.resize(static_cast<size_t>(shape.group_elements()));
    }
  };

  // Where a chunk lies.
  struct Piece {
    int64_t channel, row, begin, end;  // channel of the group; channel of all samples; positions
    float mean, rstd, w, b;
    int64_t start(int64_t position, int64_t positions) const { return row * positions + position; }
  };

  LFM_HD Piece piece(int64_t slab, int64_t chunk) const {
    const int64_t channel = chunk / chunks_of_channel(), begin = chunk % chunks_of_channel() * kChunk;
    const int64_t of_sample = slab % shape.groups * shape.group_size() + channel;
    const size_t group = static_cast<size_t>(slab), c = static_cast<size_t>(of_sample);
    return {channel, slab / shape.groups * shape.channels + of_sample, begin, std::min(begin + kChunk, shape.positions),
            mean[group], rstd[group], weight[c], bias[c]};
  }

  template <Level>
  LFM_HD void measure(int64_t slab, int64_t chunk, Scratch& scratch) const {
    const Piece at = piece(slab, chunk);
    TileSum sum_g(at.end - at.begin), sum_gn(at.end - at.begin);
    for (int64_t position = at.begin; position < at.end; position += kTile) {
      const int64_t n = std::min(kTile, at.end - position), start = at.start(position, shape.positions);
      TileBuffer x_buffer, grad_buffer, g_buffer;
      const float* __restrict from = as_float<element>(static_cast<const Type*>(x) + start, x_buffer.values, n);
      const float* __restrict grad = as_float<element>(static_cast<const Type*>(grad_y) + start, grad_buffer.values, n);
      float* kept = g_buffer.values;
      if constexpr (kKeepInOutput) kept = static_cast<Type*>(grad_x) + start;
      if (!scratch.kept.empty()) kept = scratch.kept.data() + at.channel * shape.positions + position;
      float* __restrict g = kept;
      float* __restrict lanes_g = sum_g.lanes;
      float* __restrict lanes_gn = sum_gn.lanes;
      for (int64_t j = 0; j < n; ++j) {
        const float normal = (from[j] - at.mean) * at.rstd;
        const float gradient = gradient_before_silu<silu_follows>(grad[j], normal, at.w, at.b);
        g[j] = gradient;
        lanes_g[j] += gradient;
        lanes_gn[j] += gradient * normal;
      }
    }
    parts[at.row * chunks_of_channel() + chunk % chunks_of_channel()] = {sum_g.total(), sum_gn.total()};
  }

  void finish(int64_t slab) const {
    const int64_t first = slab / shape.groups * shape.channels + slab % shape.groups * shape.group_size();
    for (int64_t row = first; row < first + shape.group_size(); ++row)
      sums[row] = total(parts + row * chunks_of_channel(), chunks_of_channel(), 1);
    finish_group(slab);
  }

  template <Level>
  LFM_HD void apply(int64_t slab, int64_t chunk, Scratch& scratch) const {
    const Piece at = piece(slab, chunk);
    const Means of_group = means[slab];
    for (int64_t position = at.begin; position < at.end; position += kTile) {
      const int64_t n = std::min(kTile, at.end - position), start = at.start(position, shape.positions);
      TileBuffer x_buffer, g_buffer, results;
      const float* __restrict from = as_float<element>(static_cast<const Type*>(x) + start, x_buffer.values, n);
      Type* out = static_cast<Type*>(grad_x) + start;
      float* __restrict to = results.values;
      if constexpr (element == Element::float32) to = out;
      if constexpr (kKeepInOutput) {
        for (int64_t j = 0; j < n; ++j) {
          const float normal = (from[j] - at.mean) * at.rstd;
          to[j] = gradient_before_norm(to[j], normal, at.w, at.rstd, of_group.g, of_group.gn);
        }
      } else if (!scratch.kept.empty()) {
        const float* __restrict g = scratch.kept.data() + at.channel * shape.positions + position;
        for (int64_t j = 0; j < n; ++j) {
          const float normal = (from[j] - at.mean) * at.rstd;
          to[j] = gradient_before_norm(g[j], normal, at.w, at.rstd, of_group.g, of_group.gn);
        }
      } else {
        const float* __restrict grad = as_float<element>(static_cast<const Type*>(grad_y) + start, g_buffer.values, n);
        for (int64_t j = 0; j < n; ++j) {
          const float normal = (from[j] - at.mean) * at.rstd;
          const float g = gradient_before_silu<silu_follows>(grad[j], normal, at.w, at.b);
          to[j] = gradient_before_norm(g, normal, at.w, at.rstd, of_group.g, of_group.gn);
        }
      }
      if constexpr (element != Element::float32) narrow_tile<element>(out, results.values, n);
    }
  }
};

template <Element element, bool silu_follows>
struct ChannelsInnermost : GroupNormBackward {
  using Type = typename Stored<element>::Type;
  static constexpr bool kKeepInOutput = keep_in_output<element, silu_follows>;

  struct Scratch {
    std::vector<float> x_row, grad_row, result, mean, rstd, mean_g, mean_gn, sum_g, sum_gn;
    Scratch(const GroupShape& shape, bool)
        : x_row(static_cast<size_t>(shape.channels)), grad_row(x_row), result(x_row), mean(x_row), rstd(x_row),
          mean_g(x_row), mean_gn(x_row), sum_g(x_row), sum_gn(x_row) {}
  };

  int64_t rows(int64_t chunk) const { return std::min(kPositions, shape.positions - chunk * kPositions); }
  int64_t place(int64_t slab, int64_t chunk) const {
    return (slab * shape.positions + chunk * kPositions) * shape.channels;
  }

  // One value per group to one per channel.
  LFM_HD void spread(int64_t slab, Scratch& scratch) const {
    for (int64_t c = 0; c < shape.channels; ++c) {
      const size_t group = static_cast<size_t>(slab * shape.groups + c / shape.group_size());
      const size_t at = static_cast<size_t>(c);
      scratch.mean[at] = mean[group];
      scratch.rstd[at] = rstd[group];
      scratch.mean_g[at] = means[group].g;
      scratch.mean_gn[at] = means[group].gn;
    }
  }

  template <Level>
  LFM_HD void measure(int64_t slab, int64_t chunk, Scratch& scratch) const {
    const int64_t channels = shape.channels;
    spread(slab, scratch);
    const float* __restrict centre = scratch.mean.data();
    const float* __restrict scale = scratch.rstd.data();
    const float* __restrict w = weight.data();
    const float* __restrict b = bias.data();
    float* __restrict sum_g = scratch.sum_g.data();
    float* __restrict sum_gn = scratch.sum_gn.data();
    for (int64_t c = 0; c < channels; ++c) sum_g[c] = sum_gn[c] = 0.0f;
    for (int64_t r = 0; r < rows(chunk); ++r) {
      const int64_t at = place(slab, chunk) + r * channels;
      const float* __restrict row = as_float<element>(static_cast<const Type*>(x) + at, scratch.x_row.data(), channels);
      const float* __restrict grad =
          as_float<element>(static_cast<const Type*>(grad_y) + at, scratch.grad_row.data(), channels);
      float* __restrict kept = scratch.result.data();
      if constexpr (kKeepInOutput) kept = static_cast<Type*>(grad_x) + at;
#pragma omp simd  // one array too many for the compiler to see that none overlaps another
      for (int64_t c = 0; c < channels; ++c) {
        const float normal = (row[c] - centre[c]) * scale[c];
        const float g = gradient_before_silu<silu_follows>(grad[c], normal, w[c], b[c]);
        kept[c] = g;
        sum_g[c] += g;
        sum_gn[c] += g * normal;
      }
    }
    ChannelSums* out = parts + (slab * chunks() + chunk) * channels;
    for (int64_t c = 0; c < channels; ++c) out[c] = {sum_g[c], sum_gn[c]};
  }

  void finish(int64_t slab) const {
    for (int64_t c = 0; c < shape.channels; ++c)
      sums[slab * shape.channels + c] = total(parts + slab * chunks() * shape.channels + c, chunks(), shape.channels);
    for (int64_t g = 0; g < shape.groups; ++g) finish_group(slab * shape.groups + g);
  }

  template <Level>
  LFM_HD void apply(int64_t slab, int64_t chunk, Scratch& scratch) const {
    const int64_t channels = shape.channels;
    spread(slab, scratch);
    const float* __restrict centre = scratch.mean.data();
    const float* __restrict scale = scratch.rstd.data();
    const float* __restrict mean_g = scratch.mean_g.data();
    const float* __restrict mean_gn = scratch.mean_gn.data();
    const float* __restrict w = weight.data();
    const float* __restrict b = bias.data();
    for (int64_t r = 0; r < rows(chunk); ++r) {
      const int64_t at = place(slab, chunk) + r * channels;
      const float* __restrict row = as_float<element>(static_cast<const Type*>(x) + at, scratch.x_row.data(), channels);
      Type* out = static_cast<Type*>(grad_x) + at;
      float* __restrict to = scratch.result.data();
      if constexpr (element == Element::float32) to = out;
      if constexpr (kKeepInOutput) {
        for (int64_t c = 0; c < channels; ++c) {
          const float normal = (row[c] - centre[c]) * scale[c];
          to[c] = gradient_before_norm(to[c], normal, w[c], scale[c], mean_g[c], mean_gn[c]);
        }
      } else {
        const float* __restrict grad =
            as_float<element>(static_cast<const Type*>(grad_y) + at, scratch.grad_row.data(), channels);
        for (int64_t c = 0; c < channels; ++c) {
          const float normal = (row[c] - centre[c]) * scale[c];
          const float g = gradient_before_silu<silu_follows>(grad[c], normal, w[c], b[c]);
          to[c] = gradient_before_norm(g, normal, w[c], scale[c], mean_g[c], mean_gn[c]);
        }
      }
      if constexpr (element != Element::float32) narrow_tile<element>(out, scratch.result.data(), channels);
    }
  }
};

template <Element element>
void run_element(GroupNormBackward&& norm, bool silu_follows) {
  if (norm.shape.channels_innermost && silu_follows)
    run_stages(ChannelsInnermost<element, true>{std::move(norm)});
  else if (norm.shape.channels_innermost)
    run_stages(ChannelsInnermost<element, false>{std::move(norm)});
  else if (silu_follows)
    run_stages(PositionsInnermost<element, true>{std::move(norm)});
  else
    run_stages(PositionsInnermost<element, false>{std::move(norm)});
}

// One of the two sums over samples, in order, in the type of the parameter it belongs to.
Tensor over_samples(const std::vector<ChannelSums>& sums, const GroupShape& shape, float ChannelSums::*which,
                    const std::optional<Tensor>& parameter) {
  Tensor out = new_tensor({shape.channels}, parameter ? parameter->scalar_type() : ScalarType::Float);
  const Element element = element_of(out, "a gradient");
  for (int64_t c = 0; c < shape.channels; ++c) {
    double total = 0.0;
    for (int64_t s = 0; s < shape.samples; ++s) total += sums[static_cast<size_t>(s * shape.channels + c)].*which;
    const float value = static_cast<float>(total);
    uint16_t* low = static_cast<uint16_t*>(out.mutable_data_ptr());
    switch (element) {
      case Element::float32: static_cast<float*>(out.mutable_data_ptr())[c] = value; break;
      case Element::bfloat16: low[c] = float_to_bfloat16(value); break;
      case Element::float16: low[c] = float_to_float16(value); break;
    }
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean,
                                                            const Tensor& rstd, const std::optional<Tensor>& weight,
                                                            const std::optional<Tensor>& bias, int64_t num_groups,
                                                            bool silu_follows) {
  check_on_cpu(x, "x");
  check_on_cpu(grad_y, "grad_y");
  check_same_shape(grad_y, "grad_y", x, "x");
  check_dtype(grad_y, "grad_y", x.scalar_type());
  const Element element = element_of(x, "x");
  const Tensor input = in_group_layout(x);
  const GroupShape shape = group_shape(input, num_groups);
  Tensor grad_x = empty_in_layout_of(input);
  const bool alike = is_channels_last(input) ? is_channels_last(grad_y) : grad_y.is_contiguous();
  Tensor grad = alike ? grad_y : empty_in_layout_of(input);
  if (!alike) torch::stable::copy_(grad, grad_y);

  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<ChannelSums> sums(size(shape.samples * shape.channels)), parts;
  std::vector<Means> means(size(shape.samples * shape.groups));
  GroupNormBackward norm{shape, grad.const_data_ptr(), input.const_data_ptr(), grad_x.mutable_data_ptr(),
                         channel_values(weight, "weight", shape.channels, 1.0f),
                         channel_values(bias, "bias", shape.channels, 0.0f),
                         read_floats(mean, "mean", {shape.samples, num_groups}),
                         read_floats(rstd, "rstd", {shape.samples, num_groups}), nullptr, sums.data(), means.data()};
  parts.resize(size(shape.samples * shape.channels * norm.chunks_of_channel()));
  norm.parts = parts.data();
  switch (element) {
    case Element::float32: run_element<Element::float32>(std::move(norm), silu_follows); break;
    case Element::bfloat16: run_element<Element::bfloat16>(std::move(norm), silu_follows); break;
    case Element::float16: run_element<Element::float16>(std::move(norm), silu_follows); break;
  }
  return {grad_x, over_samples(sums, shape, &ChannelSums::gn, weight),
          over_samples(sums, shape, &ChannelSums::g, bias)};
}

}  // namespace

LFM_REGISTER(CPU, group_norm_silu_backward, group_norm_silu_backward);

}  // namespace lfm_fast

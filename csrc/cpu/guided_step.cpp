// guided_step: guidance blend, linear stage combination, noise term and embedded error in one pass over the state.
#include <tuple>

#include "common/flow_math.h"
#include "common/guided_step.h"
#include "common/registration.h"
#include "cpu/noise.h"
#include "cpu/rows.h"

namespace lfm_fast {
namespace {

struct GuidedStep {
  Chunks chunks;
  Rows z, velocity, unconditional;
  std::vector<Rows> stored;
  std::vector<float> scale;          // (B,) with unconditional
  std::vector<float> weights;        // (B, 2 + K)
  std::vector<float> error_weights;  // (B, 1 + K) or empty
  float atol, rtol;
  std::vector<float> noise_scale;  // (B,) with noise
  Noise noise;
  OutputRows z_next, blended;
  float* sums;  // one per chunk, with error_weights

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    for (int64_t item = first; item < last; ++item) {
      const int64_t sample = chunks.sample(item), begin = chunks.begin(item), end = chunks.end(item);
      TileSum sum(error_weights.empty() ? 1 : end - begin);
      for (int64_t start = begin; start < end; start += kTile)
        tile<level>(sample, start, std::min(kTile, end - start), sum);
      if (!error_weights.empty()) sums[item] = sum.total();
    }
  }

  template <Level level>
  LFM_HD void tile(int64_t sample, int64_t start, int64_t n, TileSum& sum) const {
    TileBuffer z_buffer, v_buffer, next_buffer, stored_buffer, error_buffer;
    const int64_t terms = static_cast<int64_t>(stored.size());
    const float* w = weights.data() + sample * (2 + terms);
    const float* __restrict state = z.load(sample, start, n, z_buffer);
    const float* __restrict v = blended_velocity(sample, start, n, v_buffer);
    float* __restrict next = z_next.place(sample, start, next_buffer);
    for (int64_t j = 0; j < n; ++j) next[j] = combine(w[0], state[j], w[1], v[j]);

    const bool wants_error = !error_weights.empty();
    const float* e = wants_error ? error_weights.data() + sample * (1 + terms) : nullptr;
    float* __restrict error = error_buffer.values;
    if (wants_error)
      for (int64_t j = 0; j < n; ++j) error[j] = e[0] * v[j];

    for (int64_t k = 0; k < terms; ++k) {
      const float* __restrict stage = stored[static_cast<size_t>(k)].load(sample, start, n, stored_buffer);
      for (int64_t j = 0; j < n; ++j) next[j] = add_term(next[j], w[2 + k], stage[j]);
      if (wants_error)
        for (int64_t j = 0; j < n; ++j) error[j] = add_term(error[j], e[1 + k], stage[j]);
    }
    if (noise) {
      const float* __restrict normal = noise.tile<level>(sample, start, n, stored_buffer.values);
      const float factor = noise_scale[static_cast<size_t>(sample)];
      for (int64_t j = 0; j < n; ++j) next[j] = add_term(next[j], factor, normal[j]);
    }
    if (wants_error) {
      float* __restrict lanes = sum.lanes;
      for (int64_t j = 0; j < n; ++j)
        lanes[j] = add_square(lanes[j], error_ratio(error[j], atol, rtol, state[j], next[j]));
    }
  }

  // The velocity of a tile after guidance, written to `blended` on the way where it is kept.
  LFM_HD const float* blended_velocity(int64_t sample, int64_t start, int64_t n, TileBuffer& buffer) const {
    if (!unconditional && !blended) return velocity.load(sample, start, n, buffer);
    TileBuffer conditional_buffer, unconditional_buffer;
    const float* __restrict conditional = velocity.load(sample, start, n, conditional_buffer);
    float* __restrict out = blended ? blended.place(sample, start, buffer) : buffer.values;
    if (unconditional) {
      const float* __restrict other = unconditional.load(sample, start, n, unconditional_buffer);
      const float s = scale[static_cast<size_t>(sample)], one_minus_s = 1.0f - s;
      for (int64_t j = 0; j < n; ++j) out[j] = blend(s, one_minus_s, conditional[j], other[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) out[j] = conditional[j];
    }
    return out;
  }
};

Rows rows_like(const Tensor& tensor, const char* name, const Tensor& z) {
  check_same_shape(tensor, name, z, "z");
  return Rows(tensor, name);
}

std::tuple<Tensor, Tensor, Tensor> guided_step(const Tensor& z, const Tensor& velocity,
                                               const std::optional<Tensor>& unconditional,
                                               const std::optional<Tensor>& scale, const std::vector<Tensor>& stored,
                                               const Tensor& weights, const std::optional<Tensor>& error_weights,
                                               double atol, double rtol, const std::optional<Tensor>& noise_scale,
                                               const std::optional<Tensor>& index, int64_t seed, int64_t offset,
                                               bool keep) {
  check_guided_step(z, unconditional, scale, stored, noise_scale, index);
  GuidedStep kernel{Chunks(0, 0),
                    Rows(z, "z"),
                    rows_like(velocity, "velocity", z),
                    {},
                    {},
                    {},
                    {},
                    {},
                    static_cast<float>(atol),
                    static_cast<float>(rtol),
                    {},
                    {},
                    {},
                    {},
                    nullptr};
  const int64_t samples = z.size(0), elements = elements_per_sample(z);
  const int64_t terms = static_cast<int64_t>(stored.size());
  kernel.chunks = Chunks(samples, elements);
  if (unconditional) {
    kernel.unconditional = rows_like(*unconditional, "unconditional", z);
    kernel.scale = read_floats(*scale, "scale", {samples});
  }
  for (const Tensor& stage : stored) kernel.stored.push_back(rows_like(stage, "stored", z));
  kernel.weights = read_floats(weights, "weights", {samples, 2 + terms});
  if (error_weights) kernel.error_weights = read_floats(*error_weights, "error_weights", {samples, 1 + terms});
  if (noise_scale) {
    check_counter(kNoiseStream, offset, elements);
    kernel.noise_scale = read_floats(*noise_scale, "noise_scale", {samples});
    kernel.noise = Noise{read_index(*index, samples), seed, kNoiseStream, offset};
  }

  Tensor z_next = new_tensor(shape_of(z), ScalarType::Float);
  Tensor blended = new_tensor(keep ? shape_of(z) : std::vector<int64_t>{0}, ScalarType::Float);
  Tensor error = new_tensor({error_weights ? samples : 0}, ScalarType::Float);
  kernel.z_next = OutputRows(z_next, "z_next");
  if (keep) kernel.blended = OutputRows(blended, "blended");
  std::vector<float> sums(error_weights ? static_cast<size_t>(kernel.chunks.count()) : 0);
  kernel.sums = sums.data();
  run_kernel(kernel, kernel.chunks.count(), kernel.chunks.grain(noise_scale ? 1 << 14 : 1 << 15));

  if (error_weights) {
    float* out = static_cast<float*>(error.mutable_data_ptr());
    for (int64_t b = 0; b < samples; ++b)
      out[b] = root_mean(mean_of_chunks(sums.data(), b, kernel.chunks));
  }
  return {z_next, blended, error};
}

}  // namespace

LFM_REGISTER(CPU, guided_step, guided_step);

}  // namespace lfm_fast

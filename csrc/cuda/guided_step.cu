// guided_step: guidance blend, linear stage combination, noise term and embedded error in one pass over the state.
#include <tuple>
#include <type_traits>

#include "common/flow_math.h"
#include "common/guided_step.h"
#include "cuda/device.h"
#include "cuda/rows.h"
#include "cuda/sums.h"

namespace lfm_fast {
namespace {

struct FinishError {
  float* error;

  LFM_DEVICE void operator()(int64_t sample, double mean) const { error[sample] = root_mean(mean); }
};

// What a thread holds of kInFlight quads.
struct StepQuads {
  float z[kInFlight][kQuad], v[kInFlight][kQuad], next[kInFlight][kQuad], error[kInFlight][kQuad];
};

template <bool with_error>
struct GuidedStep {
  using Shared = std::conditional_t<with_error, SumShared, NothingShared>;
  static constexpr int64_t kMostBlocks = kManyBlocks;

  SumPlan plan;
  Rows z, velocity, unconditional;
  Rows stored[kMostStored];
  int terms;
  Table<float> scale;          // (B,) with unconditional
  Table<float> weights;        // (B, 2 + K)
  Table<float> error_weights;  // (B, 1 + K) with_error
  float atol, rtol;
  Table<float> noise_scale;  // (B,) with noise
  Noise noise;
  OutputRows z_next, blended;
  FinishError finish;

  LFM_DEVICE void item(int64_t item, Shared& shared, const Threads& threads) const {
    if constexpr (with_error) {
      const auto ratios = [&](int64_t sample, int64_t begin, int n, int thread) {
        step(sample, begin, n, thread, shared);
      };
      sum_item(plan, item, shared, threads, ratios, finish);
    } else {
      const Chunks& chunks = plan.chunks;
      const int64_t sample = chunks.sample(item), begin = chunks.begin(item);
      const int n = static_cast<int>(chunks.end(item) - begin);
      threads.independently([&](int thread) { step(sample, begin, n, thread, shared); });
    }
  }

  LFM_DEVICE void step(int64_t sample, int64_t begin, int n, int thread, Shared& shared) const {
    for (int i = 0; i < kQuadsPerThread; i += kInFlight) {
      if (quad_size(quad_start(thread, i), n) == 0) return;
      StepQuads quads;
      state_and_velocity(sample, begin, n, thread, i, quads);
      stages(sample, begin, n, thread, i, quads);
      results(sample, begin, n, thread, i, quads, shared);
    }
  }

  LFM_DEVICE void state_and_velocity(int64_t sample, int64_t begin, int n, int thread, int i, StepQuads& quads) const {
    Packed state[kInFlight], slope[kInFlight], without[kInFlight] = {};
    LFM_UNROLL
    for (int u = 0; u < kInFlight; ++u) {
      const int start = quad_start(thread, i + u), count = quad_size(start, n);
      state[u] = z.fetch(sample, begin + start, count);
      slope[u] = velocity.fetch(sample, begin + start, count);
      if (unconditional.given()) without[u] = unconditional.fetch(sample, begin + start, count);
    }
    const float w_0 = weights.at(sample, 0), w_1 = weights.at(sample, 1);
    const float e_0 = with_error ? error_weights.at(sample, 0) : 0.0f;
    const float s = unconditional.given() ? scale.at(sample) : 1.0f, one_minus_s = 1.0f - s;
    LFM_UNROLL
    for (int u = 0; u < kInFlight; ++u) {
      float other[kQuad];
      z.unpack(state[u], quads.z[u]);
      velocity.unpack(slope[u], quads.v[u]);
      unconditional.unpack(without[u], other);
      LFM_UNROLL
      for (int j = 0; j < kQuad; ++j) {
        if (unconditional.given()) quads.v[u][j] = blend(s, one_minus_s, quads.v[u][j], other[j]);
        quads.next[u][j] = combine(w_0, quads.z[u][j], w_1, quads.v[u][j]);
        quads.error[u][j] = e_0 * quads.v[u][j];
      }
    }
  }

  LFM_DEVICE void stages(int64_t sample, int64_t begin, int n, int thread, int i, StepQuads& quads) const {
    for (int k = 0; k < terms; ++k) {
      const float w = weights.at(sample, 2 + k), e = with_error ? error_weights.at(sample, 1 + k) : 0.0f;
      Packed packed[kInFlight];
      LFM_UNROLL
      for (int u = 0; u < kInFlight; ++u) {
        const int start = quad_start(thread, i + u), count = quad_size(start, n);
        packed[u] = stored[k].fetch(sample, begin + start, count);
      }
      LFM_UNROLL
      for (int u = 0; u < kInFlight; ++u) {
        float stage[kQuad];
        stored[k].unpack(packed[u], stage);
        LFM_UNROLL
        for (int j = 0; j < kQuad; ++j) {
          quads.next[u][j] = add_term(quads.next[u][j], w, stage[j]);
          if (with_error) quads.error[u][j] = add_term(quads.error[u][j], e, stage[j]);
        }
      }
    }
  }

  LFM_DEVICE void results(int64_t sample, int64_t begin, int n, int thread, int i, StepQuads& quads,
                          Shared& shared) const {
    LFM_UNROLL
    for (int u = 0; u < kInFlight; ++u) {
      const int start = quad_start(thread, i + u), count = quad_size(start, n);
      if (noise.given()) {
        float normal[kQuad];
        noise.quad(noise.key(sample), begin + start, normal);
        const float factor = noise_scale.at(sample);
        LFM_UNROLL
        for (int j = 0; j < kQuad; ++j) quads.next[u][j] = add_term(quads.next[u][j], factor, normal[j]);
      }
      z_next.store(sample, begin + start, count, quads.next[u]);
      if (blended.given()) blended.store(sample, begin + start, count, quads.v[u]);
      if constexpr (with_error) {
        Quad32 ratio;
        LFM_UNROLL
        for (int j = 0; j < kQuad; ++j)
          ratio.values[j] = error_ratio(quads.error[u][j], atol, rtol, quads.z[u][j], quads.next[u][j]);
        put_terms(shared, start, ratio);
      }
    }
  }
};

Rows rows_like(Device& device, const Tensor& tensor, const char* name, const Tensor& z) {
  check_same_shape(tensor, name, z, "z");
  return rows_of(device, tensor, name);
}

template <bool with_error>
std::tuple<Tensor, Tensor, Tensor> run_step(Device& device, const Tensor& z, const Tensor& velocity,
                                            const std::optional<Tensor>& unconditional,
                                            const std::optional<Tensor>& scale, const std::vector<Tensor>& stored,
                                            const Tensor& weights, const std::optional<Tensor>& error_weights,
                                            double atol, double rtol, const std::optional<Tensor>& noise_scale,
                                            const std::optional<Tensor>& index, int64_t seed, int64_t offset,
                                            bool keep) {
  const Rows state = rows_of(device, z, "z");
  const int64_t samples = z.size(0), elements = elements_per_sample(z);
  const auto terms = static_cast<int64_t>(stored.size());
  SumPlan plan{Chunks(samples, elements), false, nullptr};
  if constexpr (with_error) plan = plan_sums(device, samples, elements);
  GuidedStep<with_error> kernel{
      plan, state, {}, {}, {}, 0, {}, {}, {}, static_cast<float>(atol), static_cast<float>(rtol), {}, {}, {}, {}, {}};
  kernel.velocity = rows_like(device, velocity, "velocity", z);
  if (unconditional) {
    kernel.unconditional = rows_like(device, *unconditional, "unconditional", z);
    kernel.scale = floats_of(device, *scale, "scale", {samples});
  }
  for (const Tensor& stage : stored) kernel.stored[kernel.terms++] = rows_like(device, stage, "stored", z);
  kernel.weights = floats_of(device, weights, "weights", {samples, 2 + terms});
  if constexpr (with_error)
    kernel.error_weights = floats_of(device, *error_weights, "error_weights", {samples, 1 + terms});
  if (noise_scale) {
    check_counter(kNoiseStream, offset, elements);
    kernel.noise_scale = floats_of(device, *noise_scale, "noise_scale", {samples});
    kernel.noise = noise_of(device, *index, samples, seed, kNoiseStream, offset);
  }
  Tensor z_next = device.empty(shape_of(z), ScalarType::Float);
  Tensor blended = device.empty(keep ? shape_of(z) : std::vector<int64_t>{0}, ScalarType::Float);
  Tensor error = device.empty({with_error ? samples : 0}, ScalarType::Float);
  kernel.z_next = output_rows(z_next, "z_next");
  if (keep) kernel.blended = output_rows(blended, "blended");
  kernel.finish.error = error.mutable_data_ptr<float>();
  device.launch(kernel, with_error ? kernel.plan.items() : kernel.plan.chunks.count());
  if constexpr (with_error) finish_sums(device, kernel.plan, kernel.finish);
  return {z_next, blended, error};
}

std::tuple<Tensor, Tensor, Tensor> guided_step(const Tensor& z, const Tensor& velocity,
                                               const std::optional<Tensor>& unconditional,
                                               const std::optional<Tensor>& scale, const std::vector<Tensor>& stored,
                                               const Tensor& weights, const std::optional<Tensor>& error_weights,
                                               double atol, double rtol, const std::optional<Tensor>& noise_scale,
                                               const std::optional<Tensor>& index, int64_t seed, int64_t offset,
                                               bool keep) {
  check_guided_step(z, unconditional, scale, stored, noise_scale, index);
  Device device("guided_step", z, "z");
  const auto run = error_weights ? &run_step<true> : &run_step<false>;
  return run(device, z, velocity, unconditional, scale, stored, weights, error_weights, atol, rtol, noise_scale, index,
             seed, offset, keep);
}

}  // namespace

LFM_REGISTER_CUDA(guided_step, guided_step);

}  // namespace lfm_fast

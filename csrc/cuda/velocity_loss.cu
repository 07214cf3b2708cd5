// velocity_loss: loss_b = weight_b mean (velocity - target)^2 and its gradient, in one pass over the velocity.
#include <tuple>

#include "common/flow_math.h"
#include "cuda/device.h"
#include "cuda/rows.h"
#include "cuda/sums.h"

namespace lfm_fast {
namespace {

struct FinishLoss {
  Table<float> weight;  // (B,) or not given
  float* loss;

  LFM_DEVICE float weight_of(int64_t sample) const { return weight.given() ? weight.at(sample) : 1.0f; }
  LFM_DEVICE void operator()(int64_t sample, double mean) const {
    loss[sample] = weighted_loss(weight_of(sample), mean);
  }
};

struct VelocityLoss {
  using Shared = SumShared;
  static constexpr int64_t kMostBlocks = kManyBlocks;

  SumPlan plan;
  Rows velocity, target;
  Rows z_0;  // with the next two: the target is rebuilt as d_alpha z_0 + d_sigma noise
  Noise noise;
  Table<float> coefficients;  // (4, B)
  OutputRows gradient;
  FinishLoss finish;

  LFM_DEVICE void item(int64_t item, Shared& shared, const Threads& threads) const {
    const auto terms = [&](int64_t sample, int64_t begin, int n, int thread) {
      differences(sample, begin, n, thread, shared);
    };
    sum_item(plan, item, shared, threads, terms, finish);
  }

  LFM_DEVICE void differences(int64_t sample, int64_t begin, int n, int thread, Shared& shared) const {
    if (quad_size(quad_start(thread, 0), n) == 0) return;
    const float slope = loss_slope(finish.weight_of(sample), plan.chunks.elements);
    const bool rebuild = noise.given();
    const PhiloxKey key = rebuild ? noise.key(sample) : PhiloxKey{};
    const float d_alpha = rebuild ? coefficients.at(2, sample) : 0.0f;
    const float d_sigma = rebuild ? coefficients.at(3, sample) : 0.0f;
    for (int i = 0; i < kQuadsPerThread; i += kInFlight) {
      Packed found[kInFlight], other[kInFlight];
      const Rows& rows = rebuild ? z_0 : target;
      LFM_UNROLL
      for (int u = 0; u < kInFlight; ++u) {
        const int start = quad_start(thread, i + u), count = quad_size(start, n);
        found[u] = velocity.fetch(sample, begin + start, count);
        other[u] = rows.fetch(sample, begin + start, count);
      }
      LFM_UNROLL
      for (int u = 0; u < kInFlight; ++u) {
        const int start = quad_start(thread, i + u), count = quad_size(start, n);
        float v[kQuad], wanted[kQuad];
        velocity.unpack(found[u], v);
        rows.unpack(other[u], wanted);
        if (rebuild) {
          float normal[kQuad];
          noise.quad(key, begin + start, normal);
          LFM_UNROLL
          for (int j = 0; j < kQuad; ++j) wanted[j] = combine(d_alpha, wanted[j], d_sigma, normal[j]);
        }
        Quad32 difference;
        float slopes[kQuad];
        LFM_UNROLL
        for (int j = 0; j < kQuad; ++j) {
          difference.values[j] = v[j] - wanted[j];
          slopes[j] = slope * difference.values[j];
        }
        gradient.store(sample, begin + start, count, slopes);
        put_terms(shared, start, difference);
      }
    }
  }
};

std::tuple<Tensor, Tensor> velocity_loss(const Tensor& velocity, const std::optional<Tensor>& target,
                                         const std::optional<Tensor>& weight, const std::optional<Tensor>& z_0,
                                         const std::optional<Tensor>& coefficients, const std::optional<Tensor>& index,
                                         int64_t seed, int64_t stream) {
  Device device("velocity_loss", velocity, "velocity");
  const Rows rows = rows_of(device, velocity, "velocity");
  const int64_t samples = velocity.size(0), elements = elements_per_sample(velocity);
  VelocityLoss kernel{plan_sums(device, samples, elements), rows, {}, {}, {}, {}, {}, {{}, nullptr}};
  if (target) {
    LFM_CHECK(!z_0 && !coefficients && !index, "pass either target, or z_0, coefficients and index, not both.");
    check_same_shape(*target, "target", velocity, "velocity");
    kernel.target = rows_of(device, *target, "target");
  } else {
    LFM_CHECK(z_0 && coefficients && index, "without target, pass all of z_0, coefficients and index.");
    check_same_shape(*z_0, "z_0", velocity, "velocity");
    check_counter(stream, 0, elements);
    kernel.z_0 = rows_of(device, *z_0, "z_0");
    kernel.coefficients = floats_of(device, *coefficients, "coefficients", {4, samples});
    kernel.noise = noise_of(device, *index, samples, seed, stream, 0);
  }
  if (weight) kernel.finish.weight = floats_of(device, *weight, "weight", {samples});
  Tensor gradient = device.empty(shape_of(velocity), velocity.scalar_type());
  Tensor loss = device.empty({samples}, ScalarType::Float);
  kernel.gradient = output_rows(gradient, "gradient");
  kernel.finish.loss = loss.mutable_data_ptr<float>();
  device.launch(kernel, kernel.plan.items());
  finish_sums(device, kernel.plan, kernel.finish);
  return {loss, gradient};
}

}  // namespace

LFM_REGISTER_CUDA(velocity_loss, velocity_loss);

}  // namespace lfm_fast

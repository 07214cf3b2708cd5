// velocity_loss: loss_b = weight_b mean (velocity - target)^2 and its gradient, in one pass over the velocity.
#include <tuple>

#include "common/flow_math.h"
#include "common/registration.h"
#include "cpu/noise.h"
#include "cpu/rows.h"

namespace lfm_fast {
namespace {

struct VelocityLoss {
  Chunks chunks;
  Rows velocity, target;
  Rows z_0;  // with the next two: the target is rebuilt as d_alpha z_0 + d_sigma noise
  Noise noise;
  std::vector<float> coefficients;  // (4, B)
  std::vector<float> slope;         // (B,) d loss / d velocity = slope (velocity - target)
  OutputRows gradient;
  float* sums;  // one per chunk

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    for (int64_t item = first; item < last; ++item) {
      const int64_t sample = chunks.sample(item), begin = chunks.begin(item), end = chunks.end(item);
      TileSum sum(end - begin);
      for (int64_t start = begin; start < end; start += kTile)
        tile<level>(sample, start, std::min(kTile, end - start), sum);
      sums[item] = sum.total();
    }
  }

  template <Level level>
  LFM_HD void tile(int64_t sample, int64_t start, int64_t n, TileSum& sum) const {
    TileBuffer velocity_buffer, target_buffer, gradient_buffer;
    const float* __restrict v = velocity.load(sample, start, n, velocity_buffer);
    const float* __restrict wanted =
        target ? target.load(sample, start, n, target_buffer) : rebuild<level>(sample, start, n, target_buffer);
    float* __restrict gradient_tile = gradient.place(sample, start, gradient_buffer);
    float* __restrict lanes = sum.lanes;
    const float factor = slope[static_cast<size_t>(sample)];
    for (int64_t j = 0; j < n; ++j) {
      const float difference = v[j] - wanted[j];
      lanes[j] = add_square(lanes[j], difference);
      gradient_tile[j] = factor * difference;
    }
    gradient.store(sample, start, n, gradient_buffer);
  }

  template <Level level>
  LFM_HD const float* rebuild(int64_t sample, int64_t start, int64_t n, TileBuffer& out) const {
    TileBuffer data_buffer, noise_buffer;
    const float* __restrict data = z_0.load(sample, start, n, data_buffer);
    const float* __restrict normal = noise.tile<level>(sample, start, n, noise_buffer.values);
    float* __restrict wanted = out.values;
    const float d_alpha = coefficients[static_cast<size_t>(2 * chunks.samples + sample)];
    const float d_sigma = coefficients[static_cast<size_t>(3 * chunks.samples + sample)];
    for (int64_t j = 0; j < n; ++j) wanted[j] = combine(d_alpha, data[j], d_sigma, normal[j]);
    return wanted;
  }
};

std::tuple<Tensor, Tensor> velocity_loss(const Tensor& velocity, const std::optional<Tensor>& target,
                                         const std::optional<Tensor>& weight, const std::optional<Tensor>& z_0,
                                         const std::optional<Tensor>& coefficients, const std::optional<Tensor>& index,
                                         int64_t seed, int64_t stream) {
  VelocityLoss kernel{Chunks(0, 0), Rows(velocity, "velocity"), {}, {}, {}, {}, {}, {}, nullptr};
  const int64_t samples = velocity.size(0), elements = elements_per_sample(velocity);
  kernel.chunks = Chunks(samples, elements);
  if (target) {
    LFM_CHECK(!z_0 && !coefficients && !index, "pass either target, or z_0, coefficients and index, not both.");
    check_same_shape(*target, "target", velocity, "velocity");
    kernel.target = Rows(*target, "target");
  } else {
    LFM_CHECK(z_0 && coefficients && index, "without target, pass all of z_0, coefficients and index.");
    check_same_shape(*z_0, "z_0", velocity, "velocity");
    check_counter(stream, 0, elements);
    kernel.z_0 = Rows(*z_0, "z_0");
    kernel.coefficients = read_floats(*coefficients, "coefficients", {4, samples});
    kernel.noise = Noise{read_index(*index, samples), seed, stream, 0};
  }
  std::vector<float> weights(static_cast<size_t>(samples), 1.0f);
  if (weight) weights = read_floats(*weight, "weight", {samples});
  for (const float w : weights) kernel.slope.push_back(loss_slope(w, elements));

  Tensor gradient = new_tensor(shape_of(velocity), velocity.scalar_type());
  kernel.gradient = OutputRows(gradient, "gradient");
  std::vector<float> sums(static_cast<size_t>(kernel.chunks.count()));
  kernel.sums = sums.data();
  run_kernel(kernel, kernel.chunks.count(), kernel.chunks.grain(target ? 1 << 15 : 1 << 14));

  Tensor loss = new_tensor({samples}, ScalarType::Float);
  float* out = static_cast<float*>(loss.mutable_data_ptr());
  for (int64_t b = 0; b < samples; ++b)
    out[b] = weighted_loss(weights[static_cast<size_t>(b)], mean_of_chunks(sums.data(), b, kernel.chunks));
  return {loss, gradient};
}

}  // namespace

LFM_REGISTER(CPU, velocity_loss, velocity_loss);

}  // namespace lfm_fast

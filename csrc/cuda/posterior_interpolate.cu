// posterior_interpolate: rows of a table of posteriors gathered, sampled and interpolated, z_0 and both noises never
// written.
#include <limits>
#include <tuple>

#include "common/flow_math.h"
#include "cuda/device.h"
#include "cuda/rows.h"

namespace lfm_fast {
namespace {

struct PosteriorInterpolate {
  using Shared = NothingShared;
  static constexpr int64_t kMostBlocks = kManyBlocks;
  static constexpr int64_t kStreamNoise = 0, kStreamPosterior = 2;  // of lfm_fast/ops/streams.py

  Chunks chunks;
  int64_t items;
  Rows mean, log_variance;  // (N, ...), the second one or none
  Table<int64_t> rows;      // (B,)
  Noise posterior, noise;
  Table<float> coefficients;  // (4, B)
  OutputRows z_t, target;

  LFM_DEVICE void item(int64_t item, Shared&, const Threads& threads) const {
    const int64_t sample = chunks.sample(item), begin = chunks.begin(item), n = chunks.end(item) - begin;
    threads.independently([&](int thread) {
      if (quad_size(quad_start(thread, 0), n) == 0) return;
      const int64_t row = rows.at(sample);
      const bool exists = row >= 0 && row < items;  // else the sample is NaN: the host has not looked at the rows
      const PhiloxKey key = noise.key(sample), posterior_key = posterior.given() ? posterior.key(sample) : PhiloxKey{};
      for (int i = 0; i < kQuadsPerThread; i += kInFlight) {
        Packed data[kInFlight], variance[kInFlight] = {};
        LFM_UNROLL
        for (int u = 0; u < kInFlight; ++u) {
          const int start = quad_start(thread, i + u), count = exists ? quad_size(start, n) : 0;
          data[u] = mean.fetch(exists ? row : 0, begin + start, count);
          if (log_variance.given()) variance[u] = log_variance.fetch(exists ? row : 0, begin + start, count);
        }
        LFM_UNROLL
        for (int u = 0; u < kInFlight; ++u) {
          const int start = quad_start(thread, i + u);
          quad(sample, begin, start, n, key, posterior_key, exists, data[u], variance[u]);
        }
      }
    });
  }

  LFM_DEVICE void quad(int64_t sample, int64_t begin, int start, int64_t n, const PhiloxKey& key,
                       const PhiloxKey& posterior_key, bool exists, const Packed& packed,
                       const Packed& packed_variance) const {
    const int count = quad_size(start, n);
    float data[kQuad], normal[kQuad], point[kQuad], velocity[kQuad];
    mean.unpack(packed, data);
    if (log_variance.given()) {
      float variance[kQuad];
      log_variance.unpack(packed_variance, variance);
      posterior.quad(posterior_key, begin + start, normal);
      LFM_UNROLL
      for (int j = 0; j < kQuad; ++j) data[j] = draw(data[j], at_most_128(exponent_of_half(variance[j])), normal[j]);
    }
    noise.quad(key, begin + start, normal);
    LFM_UNROLL
    for (int j = 0; j < kQuad; ++j) {
      if (!exists) data[j] = std::numeric_limits<float>::quiet_NaN();
      point[j] = combine(coefficients.at(0, sample), data[j], coefficients.at(1, sample), normal[j]);
      velocity[j] = combine(coefficients.at(2, sample), data[j], coefficients.at(3, sample), normal[j]);
    }
    z_t.store(sample, begin + start, count, point);
    target.store(sample, begin + start, count, velocity);
  }
};

std::tuple<Tensor, Tensor> posterior_interpolate(const Tensor& mean, const Tensor& rows, const Tensor& index,
                                                 const Tensor& coefficients, const std::optional<Tensor>& log_variance,
                                                 int64_t seed) {
  Device device("posterior_interpolate", mean, "mean");
  const Rows means = rows_of(device, mean, "mean");
  check_batched(rows, "rows");
  const int64_t samples = rows.size(0), elements = elements_per_sample(mean);
  check_counter(PosteriorInterpolate::kStreamNoise, 0, elements);
  PosteriorInterpolate kernel{Chunks(samples, elements), mean.size(0), means, {}, {}, {}, {}, {}, {}, {}};
  kernel.rows = table_of<int64_t>(device, rows, "rows", ScalarType::Long, {samples});
  kernel.noise = noise_of(device, index, samples, seed, PosteriorInterpolate::kStreamNoise, 0);
  if (log_variance) {
    check_same_shape(*log_variance, "log_variance", mean, "mean");
    check_dtype(*log_variance, "log_variance", mean.scalar_type());
    kernel.log_variance = rows_of(device, *log_variance, "log_variance");
    kernel.posterior = noise_of(device, index, samples, seed, PosteriorInterpolate::kStreamPosterior, 0);
  }
  kernel.coefficients = floats_of(device, coefficients, "coefficients", {4, samples});
  std::vector<int64_t> shape = shape_of(mean);
  shape[0] = samples;
  Tensor z_t = device.empty(shape, ScalarType::Float);
  Tensor target = device.empty(shape, ScalarType::Float);
  kernel.z_t = output_rows(z_t, "z_t");
  kernel.target = output_rows(target, "target");
  device.launch(kernel, kernel.chunks.count());
  return {z_t, target};
}

}  // namespace

LFM_REGISTER_CUDA(posterior_interpolate, posterior_interpolate);

}  // namespace lfm_fast

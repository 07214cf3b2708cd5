// interpolate: z_t = alpha z_0 + sigma z_1 and target = d_alpha z_0 + d_sigma z_1, z_1 given or made from (seed,
// index).
#include <tuple>

#include "common/flow_math.h"
#include "cuda/device.h"
#include "cuda/rows.h"

namespace lfm_fast {
namespace {

struct Interpolate {
  using Shared = NothingShared;
  static constexpr int64_t kMostBlocks = kManyBlocks;

  Chunks chunks;
  Rows z_0, z_1;
  Noise noise;                // where z_1 is not given
  Table<float> coefficients;  // (4, B)
  OutputRows z_t, target;

  LFM_DEVICE void item(int64_t item, Shared&, const Threads& threads) const {
    const int64_t sample = chunks.sample(item), begin = chunks.begin(item), n = chunks.end(item) - begin;
    threads.independently([&](int thread) {
      if (quad_size(quad_start(thread, 0), n) == 0) return;
      const float alpha = coefficients.at(0, sample), sigma = coefficients.at(1, sample);
      const float d_alpha = coefficients.at(2, sample), d_sigma = coefficients.at(3, sample);
      const PhiloxKey key = noise.given() ? noise.key(sample) : PhiloxKey{};
      for (int i = 0; i < kQuadsPerThread; i += kInFlight) {
        Packed data[kInFlight], given[kInFlight] = {};
        LFM_UNROLL
        for (int u = 0; u < kInFlight; ++u) {
          const int start = quad_start(thread, i + u), count = quad_size(start, n);
          data[u] = z_0.fetch(sample, begin + start, count);
          if (!noise.given()) given[u] = z_1.fetch(sample, begin + start, count);
        }
        LFM_UNROLL
        for (int u = 0; u < kInFlight; ++u) {
          const int start = quad_start(thread, i + u), count = quad_size(start, n);
          float point[kQuad], velocity[kQuad], image[kQuad], normal[kQuad];
          if (noise.given())
            noise.quad(key, begin + start, normal);
          else
            z_1.unpack(given[u], normal);
          z_0.unpack(data[u], image);
          LFM_UNROLL
          for (int j = 0; j < kQuad; ++j) {
            point[j] = combine(alpha, image[j], sigma, normal[j]);
            velocity[j] = combine(d_alpha, image[j], d_sigma, normal[j]);
          }
          z_t.store(sample, begin + start, count, point);
          target.store(sample, begin + start, count, velocity);
        }
      }
    });
  }
};

std::tuple<Tensor, Tensor> interpolate(const Tensor& z_0, const Tensor& coefficients, const std::optional<Tensor>& z_1,
                                       const std::optional<Tensor>& index, int64_t seed, int64_t stream) {
  Device device("interpolate", z_0, "z_0");
  const Rows data = rows_of(device, z_0, "z_0");
  const int64_t samples = z_0.size(0), elements = elements_per_sample(z_0);
  LFM_CHECK(z_1.has_value() != index.has_value(), "pass exactly one of z_1 and index.");
  Interpolate kernel{Chunks(samples, elements), data, {}, {}, {}, {}, {}};
  if (z_1) {
    check_same_shape(*z_1, "z_1", z_0, "z_0");
    kernel.z_1 = rows_of(device, *z_1, "z_1");
  } else {
    check_counter(stream, 0, elements);
    kernel.noise = noise_of(device, *index, samples, seed, stream, 0);
  }
  kernel.coefficients = floats_of(device, coefficients, "coefficients", {4, samples});
  Tensor z_t = device.empty(shape_of(z_0), z_0.scalar_type());
  Tensor target = device.empty(shape_of(z_0), z_0.scalar_type());
  kernel.z_t = output_rows(z_t, "z_t");
  kernel.target = output_rows(target, "target");
  device.launch(kernel, kernel.chunks.count());
  return {z_t, target};
}

}  // namespace

LFM_REGISTER_CUDA(interpolate, interpolate);

}  // namespace lfm_fast

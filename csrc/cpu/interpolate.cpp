// interpolate: z_t = alpha z_0 + sigma z_1 and target = d_alpha z_0 + d_sigma z_1, z_1 given or made from (seed,
// index).
#include <tuple>

#include "common/flow_math.h"
#include "common/registration.h"
#include "cpu/noise.h"
#include "cpu/rows.h"

namespace lfm_fast {
namespace {

struct Interpolate {
  Chunks chunks;
  Rows z_0, z_1;
  Noise noise;                      // where z_1 is not given
  std::vector<float> coefficients;  // (4, B)
  OutputRows z_t, target;

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    for (int64_t item = first; item < last; ++item) {
      const int64_t sample = chunks.sample(item), end = chunks.end(item);
      for (int64_t start = chunks.begin(item); start < end; start += kTile)
        tile<level>(sample, start, std::min(kTile, end - start));
    }
  }

  template <Level level>
  LFM_HD void tile(int64_t sample, int64_t start, int64_t n) const {
    TileBuffer data_buffer, noise_buffer, z_t_buffer, target_buffer;
    const float* __restrict data = z_0.load(sample, start, n, data_buffer);
    const float* __restrict normal =
        z_1 ? z_1.load(sample, start, n, noise_buffer) : noise.tile<level>(sample, start, n, noise_buffer.values);
    float* __restrict z_t_tile = z_t.place(sample, start, z_t_buffer);
    float* __restrict target_tile = target.place(sample, start, target_buffer);
    const float* of_sample = coefficients.data() + sample;
    const float alpha = of_sample[0], sigma = of_sample[chunks.samples];
    const float d_alpha = of_sample[2 * chunks.samples], d_sigma = of_sample[3 * chunks.samples];
    for (int64_t j = 0; j < n; ++j) {
      z_t_tile[j] = combine(alpha, data[j], sigma, normal[j]);
      target_tile[j] = combine(d_alpha, data[j], d_sigma, normal[j]);
    }
    z_t.store(sample, start, n, z_t_buffer);
    target.store(sample, start, n, target_buffer);
  }
};

std::tuple<Tensor, Tensor> interpolate(const Tensor& z_0, const Tensor& coefficients, const std::optional<Tensor>& z_1,
                                       const std::optional<Tensor>& index, int64_t seed, int64_t stream) {
  Interpolate kernel{Chunks(0, 0), Rows(z_0, "z_0"), {}, {}, {}, {}, {}};
  const int64_t samples = z_0.size(0), elements = elements_per_sample(z_0);
  LFM_CHECK(z_1.has_value() != index.has_value(), "pass exactly one of z_1 and index.");
  if (z_1) {
    check_same_shape(*z_1, "z_1", z_0, "z_0");
    kernel.z_1 = Rows(*z_1, "z_1");
  } else {
    check_counter(stream, 0, elements);
    kernel.noise = Noise{read_index(*index, samples), seed, stream, 0};
  }
  kernel.coefficients = read_floats(coefficients, "coefficients", {4, samples});
  kernel.chunks = Chunks(samples, elements);
  Tensor z_t = new_tensor(shape_of(z_0), z_0.scalar_type());
  Tensor target = new_tensor(shape_of(z_0), z_0.scalar_type());
  kernel.z_t = OutputRows(z_t, "z_t");
  kernel.target = OutputRows(target, "target");
  run_kernel(kernel, kernel.chunks.count(), kernel.chunks.grain(z_1 ? 1 << 15 : 1 << 14));
  return {z_t, target};
}

}  // namespace

LFM_REGISTER(CPU, interpolate, interpolate);

}  // namespace lfm_fast

// posterior_interpolate: rows of a table of posteriors gathered, sampled and interpolated, z_0 and both noises never
// written.
#include <tuple>

#include "common/flow_math.h"
#include "common/registration.h"
#include "cpu/noise.h"
#include "cpu/rows.h"

namespace lfm_fast {
namespace {

constexpr int64_t kStreamNoise = 0, kStreamPosterior = 2;  // of lfm_fast/ops/streams.py

constexpr int64_t kAhead = 4 * kTile;  // elements

// Asks for what is read next. Rows lie anywhere in the table, and the processor's own prefetcher starts anew in each.
class Ahead {
 public:
  Ahead() = default;
  explicit Ahead(const Tensor& table) {
    if (!rows_are_dense(table)) return;  // then it is a copy that is read
    data_ = static_cast<const char*>(table.const_data_ptr());
    width_ = table.scalar_type() == ScalarType::Float ? 4 : 2;
    stride_ = width_ * table.stride(0);
  }

  LFM_HD void ask(int64_t row, int64_t start, int64_t n) const {
    if (data_ == nullptr) return;
    const char* first = data_ + row * stride_ + start * width_;
    for (int64_t byte = 0; byte < n * width_; byte += 64) __builtin_prefetch(first + byte);
  }

 private:
  const char* data_ = nullptr;
  int64_t width_ = 0, stride_ = 0;
};

struct PosteriorInterpolate {
  Chunks chunks;
  Rows mean, log_variance;  // (N, ...), the second one or none
  Ahead mean_ahead, log_variance_ahead;
  std::vector<int64_t> rows;  // (B,)
  Noise noise;
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

  LFM_HD void ask_ahead(int64_t sample, int64_t start) const {
    int64_t ahead = start + kAhead;
    if (ahead >= chunks.elements) {
      ahead -= chunks.elements;
      if (++sample == chunks.samples || ahead >= chunks.elements) return;
    }
    const int64_t row = rows[static_cast<size_t>(sample)], n = std::min(kTile, chunks.elements - ahead);
    mean_ahead.ask(row, ahead, n);
    log_variance_ahead.ask(row, ahead, n);
  }

  template <Level level>
  LFM_HD void tile(int64_t sample, int64_t start, int64_t n) const {
    ask_ahead(sample, start);
    TileBuffer mean_buffer, variance_buffer, exponent_buffer, noise_buffer, draw_buffer, unused;
    const int64_t row = rows[static_cast<size_t>(sample)];
    const float* z_0 = mean.load(row, start, n, mean_buffer);
    if (log_variance) {
      const float* __restrict center = z_0;
      const float* __restrict variance = log_variance.load(row, start, n, variance_buffer);
      float* __restrict drawn = draw_buffer.values;
      tile_of_two<level>(noise, kStreamPosterior, sample, start, n, noise_buffer.values, drawn);
      float* __restrict exponent = exponent_buffer.values;
      for (int64_t j = 0; j < n; ++j) exponent[j] = exponent_of_half(variance[j]);
      for (int64_t j = 0; j < n; ++j) exponent[j] = at_most_128(exponent[j]);
      for (int64_t j = 0; j < n; ++j) drawn[j] = draw(center[j], exponent[j], drawn[j]);
      z_0 = draw_buffer.values;
    } else {
      noise.tile<level>(sample, start, n, noise_buffer.values);
    }
    const float *__restrict data = z_0, *__restrict normal = noise_buffer.values;
    float* __restrict z_t_tile = z_t.place(sample, start, unused);
    float* __restrict target_tile = target.place(sample, start, unused);
    const float* of_sample = coefficients.data() + sample;
    const float alpha = of_sample[0], sigma = of_sample[chunks.samples];
    const float d_alpha = of_sample[2 * chunks.samples], d_sigma = of_sample[3 * chunks.samples];
    for (int64_t j = 0; j < n; ++j) {
      z_t_tile[j] = combine(alpha, data[j], sigma, normal[j]);
      target_tile[j] = combine(d_alpha, data[j], d_sigma, normal[j]);
    }
  }
};

std::tuple<Tensor, Tensor> posterior_interpolate(const Tensor& mean, const Tensor& rows, const Tensor& index,
                                                 const Tensor& coefficients, const std::optional<Tensor>& log_variance,
                                                 int64_t seed) {
  PosteriorInterpolate kernel{Chunks(0, 0), Rows(mean, "mean"), {}, Ahead(mean), {}, {}, {}, {}, {}, {}};
  check_batched(rows, "rows");
  const int64_t items = mean.size(0), samples = rows.size(0), elements = elements_per_sample(mean);
  check_counter(kStreamNoise, 0, elements);
  kernel.rows = read_table<int64_t>(rows, "rows", ScalarType::Long, {samples});
  for (const int64_t row : kernel.rows)
    LFM_CHECK(row >= 0 && row < items, "rows holds ", row, ", but mean has rows 0 to ", items - 1, ".");
  kernel.noise = Noise{read_index(index, samples), seed, kStreamNoise, 0};
  if (log_variance) {
    check_same_shape(*log_variance, "log_variance", mean, "mean");
    check_dtype(*log_variance, "log_variance", mean.scalar_type());
    kernel.log_variance = Rows(*log_variance, "log_variance");
    kernel.log_variance_ahead = Ahead(*log_variance);
  }
  kernel.coefficients = read_floats(coefficients, "coefficients", {4, samples});
  kernel.chunks = Chunks(samples, elements);
  std::vector<int64_t> shape = shape_of(mean);
  shape[0] = samples;
  Tensor z_t = new_tensor(shape, ScalarType::Float);
  Tensor target = new_tensor(shape, ScalarType::Float);
  kernel.z_t = OutputRows(z_t, "z_t");
  kernel.target = OutputRows(target, "target");
  run_kernel(kernel, kernel.chunks.count(), kernel.chunks.grain(1 << 13));
  return {z_t, target};
}

}  // namespace

LFM_REGISTER(CPU, posterior_interpolate, posterior_interpolate);

}  // namespace lfm_fast

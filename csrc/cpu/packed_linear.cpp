// act(x W^T + b) in bfloat16 by the tile instructions (AMX), W in the tiles' order already. Some rows of x are packed
// into tiles, in strips of 32, and stay in the second cache; panels of 32 columns of W go by, each through the innermost
// one. The result of 32 x 32 is finished (bias, GELU, rounding) a few rows at a time between the products of the next,
// which other units do.
#include "common/activations.h"
#include "common/registration.h"
#include "cpu/amx.h"
#include "cpu/rows.h"

namespace lfm_fast {
namespace {

constexpr int64_t kStrip = 32;             // rows of x, and columns of a panel: two tiles by two
constexpr int64_t kSquare = kStrip * kStrip;
constexpr int64_t kMostSteps = 32;         // of 32 inner numbers each, at a time
constexpr int64_t kMostStrips = 8;         // of a block
constexpr int64_t kGroupBytes = 3 << 18;   // of the panels that a block meets one after the other: they stay in the second cache
constexpr double kLeastWork = 1e7;         // operations that are worth a second thread

#if defined(LFM_AMX)

struct Linear {
  const Bf16 *x, *weight;
  const float* bias;  // padded to whole panels
  Bf16* y;
  int64_t rows, inner, outer;
  int64_t block, groups;  // strips that are packed together, ranges into which the panels are split
  bool gelu;

  int64_t strips() const { return (rows + kStrip - 1) / kStrip; }
  int64_t blocks() const { return (strips() + block - 1) / block; }
  int64_t panels() const { return (outer + kStrip - 1) / kStrip; }
  int64_t steps() const { return (inner + 31) / 32; }
  int64_t first_panel(int64_t group) const { return panels() * group / groups; }

  bool in_one() const { return steps() <= kMostSteps; }  // whether a product of 32 x 32 is made in one go
  int64_t panels_together() const {
    return std::max<int64_t>(1, kGroupBytes / (4 * kTile16 * std::min(std::max<int64_t>(steps(), 1), kMostSteps)));
  }

  // Blocks, and ranges of panels where there are fewer blocks, for every thread.
  void divide(int64_t threads) {
    block = std::min(kMostStrips, (strips() + threads - 1) / threads);
    groups = std::min(panels(), std::max<int64_t>(1, threads / blocks()));
  }
};

// GELU by a logistic function to 1.5e-4, a thirteenth of the distance between two bfloat16: x / (1 + e^-2u). A division
// would take longer than the products.
LFM_AMX_INLINE __m512 gelu_of(__m512 x) {
  const __m512 square = _mm512_mul_ps(x, x);
  const __m512 slope = _mm512_fmadd_ps(square, _mm512_set1_ps(-kGeluCubic2), _mm512_set1_ps(-kGeluLinear2));
  const __m512 e = power_of_two(_mm512_mul_ps(x, slope));
  return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(1.0f))));
}

// A product of 32 x 32 whose rows are yet to be finished: four after every step of the next product.
template <bool gelu>
struct Pending {
  const float* result = nullptr;
  Bf16* y = nullptr;
  int64_t rows = 0, stride = 0;  // rows that are left; between two rows of y
  __m512 low_bias, high_bias;
  __mmask32 inside = 0;

  LFM_AMX_INLINE void set(const Linear& a, const float* product, int64_t row, int64_t column) {
    result = product, y = a.y + row * a.outer + column, stride = a.outer;
    rows = a.rows - row < kStrip ? a.rows - row : kStrip;
    inside = first_of_32(a.outer - column);
    low_bias = _mm512_loadu_ps(a.bias + column), high_bias = _mm512_loadu_ps(a.bias + column + 16);
  }

  LFM_AMX_INLINE void finish_row() {
    __m512 low = _mm512_add_ps(_mm512_load_ps(result), low_bias);
    __m512 high = _mm512_add_ps(_mm512_load_ps(result + 16), high_bias);
    if (gelu) low = gelu_of(low), high = gelu_of(high);
    _mm512_mask_storeu_epi16(y, inside, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    result += kStrip, y += stride;
  }

  LFM_AMX_INLINE void finish_four() {
    if (rows < 4) return;
    finish_row();
    finish_row();
    finish_row();
    finish_row();
    rows -= 4;
  }

  LFM_AMX_INLINE void finish() {
    for (; rows > 0; --rows) finish_row();
  }
};

// 32 rows of x: their tiles, or the rows themselves.
struct Strip {
  const Bf16 *upper, *lower;
  int64_t stride, step;  // bytes between two rows of a tile, elements between two tiles
};

// Rows from `first` on. They are copied into tiles (step by step the upper 16 rows, then the lower) where some are
// missing, where a tile would read beyond their ends, and where their distance puts them all into a few sets of the cache.
LFM_AMX_INLINE Strip strip_at(const Linear& a, int64_t first, Bf16* packed) {
  if (first + kStrip <= a.rows && a.inner % 32 == 0 && a.inner % 1024 != 0) {
    const Bf16* const upper = a.x + first * a.inner;
    return {upper, upper + 16 * a.inner, 2 * a.inner, 32};
  }
  for (int64_t i = 0; i < kStrip; ++i) {
    const bool present = first + i < a.rows;
    const Bf16* row = a.x + (present ? (first + i) * a.inner : 0);
    Bf16* to = packed + i / 16 * kTile16 + i % 16 * 32;
    for (int64_t k = 0; k < a.inner; k += 32, to += 2 * kTile16)
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(present ? first_of_32(a.inner - k) : 0, row + k));
  }
  return {packed, packed + kTile16, 64, 2 * kTile16};
}

// result (32 x 32) = or += strip (32 x 32 steps) panel (32 steps x 32); `wide`: there are columns from 16 on. A panel is
// read by tile loads that leave the innermost cache to the strip.
template <bool wide, bool gelu>
LFM_AMX_INLINE void multiply(Strip strip, const Bf16* panel, int64_t steps, bool add, float* result,
                             Pending<gelu>& last) {
  if (add) {
    _tile_loadd(0, result, 4 * kStrip);
    _tile_loadd(2, result + 16 * kStrip, 4 * kStrip);
    if (wide) _tile_loadd(1, result + 16, 4 * kStrip);
    if (wide) _tile_loadd(3, result + 16 * kStrip + 16, 4 * kStrip);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, strip.upper, strip.stride);
    _tile_stream_loadd(6, panel, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, strip.lower, strip.stride);
    _tile_dpbf16ps(2, 5, 6);
    if (wide) {
      _tile_stream_loadd(7, panel + kTile16, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    strip.upper += strip.step, strip.lower += strip.step, panel += 2 * kTile16;
    last.finish_four();
  }
  last.finish();
  _tile_stored(0, result, 4 * kStrip);
  _tile_stored(2, result + 16 * kStrip, 4 * kStrip);
  if (wide) _tile_stored(1, result + 16, 4 * kStrip);
  if (wide) _tile_stored(3, result + 16 * kStrip + 16, 4 * kStrip);
}

// The strips of a block meet the panels from `first` to `past`, at most kMostSteps of inner numbers at a time.
template <bool gelu>
LFM_AMX_INLINE void run_group(const Linear& a, const Strip* strips, int64_t count, int64_t row, int64_t first,
                              int64_t past, float* results, Pending<gelu>& last) {
  const int64_t steps = a.steps();
  for (int64_t step = 0; step == 0 || step < steps; step += kMostSteps) {
    const int64_t taken = steps - step < kMostSteps ? steps - step : kMostSteps;
    for (int64_t i = 0; i < count; ++i) {
      Strip left = strips[i];
      left.upper += step * left.step, left.lower += step * left.step;
      for (int64_t panel = first; panel < past; ++panel) {
        const Bf16* const right = a.weight + (panel * steps + step) * 2 * kTile16;
        float* const result = results + (a.in_one() ? 0 : i * (past - first) + panel - first) * kSquare;
        if (a.outer - panel * kStrip > 16)
          multiply<true>(left, right, taken, step > 0, result, last);
        else
          multiply<false>(left, right, taken, step > 0, result, last);
        if (step + taken == steps) last.set(a, result, row + i * kStrip, panel * kStrip);
      }
    }
  }
}

// Items are (block of strips, range of panels).
template <bool gelu>
LFM_AMX_CODE void run_blocks(const Linear& a, int64_t begin, int64_t end) {
  const int64_t size = 2 * kTile16 * a.steps(), together = a.panels_together();
  Workspace memory({2 * size * a.block, 4 * kSquare * (a.in_one() ? 1 : together * a.block)});
  Bf16* const packed = memory.take<Bf16>(size * a.block);
  float* const results = memory.take<float>(0);
  Strip strips[kMostStrips];
  const Tiles tiles;
  Pending<gelu> last;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / a.groups * a.block, group = item % a.groups, past = a.first_panel(group + 1);
    const int64_t count = a.strips() - first < a.block ? a.strips() - first : a.block;
    for (int64_t i = 0; i < count; ++i) strips[i] = strip_at(a, (first + i) * kStrip, packed + i * size);
    before_tiles_read();
    for (int64_t panel = a.first_panel(group); panel < past; panel += together)
      run_group(a, strips, count, first * kStrip, panel, panel + together < past ? panel + together : past, results,
                last);
  }
  last.finish();
}

#endif

// float32, padded to whole panels with zeros.
std::vector<float> bias_of(const std::optional<Tensor>& bias, int64_t outer) {
  std::vector<float> values(static_cast<size_t>(rounded_up(outer, kStrip)));
  if (!bias) return values;
  check_on_cpu(*bias, "bias");
  check_table(*bias, "bias", ScalarType::BFloat16, {outer});
  const uint16_t* data = static_cast<const uint16_t*>(bias->const_data_ptr());
  for (int64_t n = 0; n < outer; ++n) values[static_cast<size_t>(n)] = bfloat16_to_float(data[n * bias->stride(0)]);
  return values;
}

Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
                     bool gelu) {
  check_on_cpu(x, "x");
  check_on_cpu(weight, "weight");
  check_dtype(x, "x", ScalarType::BFloat16);
  LFM_CHECK(x.dim() >= 1, "x must be (..., in_features), got a scalar.");
  LFM_CHECK(out_features >= 0, "out_features must be 0 or more, got ", out_features, ".");
  const int64_t inner = x.size(x.dim() - 1);
  check_table(weight, "weight", ScalarType::BFloat16,
              {(out_features + 31) / 32, (inner + 31) / 32, 2, 16, 16, 2});
  LFM_CHECK(has_tiles(), "packed_linear needs a processor with AMX for bfloat16.");
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = out_features;
  Tensor y = new_tensor(shape, ScalarType::BFloat16);
  if (y.numel() == 0) return y;
#if defined(LFM_AMX)
  const Tensor dense = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Tensor tiles = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  const std::vector<float> padded = bias_of(bias, out_features);
  Linear a{static_cast<const Bf16*>(dense.const_data_ptr()), static_cast<const Bf16*>(tiles.const_data_ptr()),
           padded.data(), static_cast<Bf16*>(y.mutable_data_ptr()), y.numel() / out_features, inner,
           out_features, 1, 1, gelu};
  const double work = 2.0 * static_cast<double>(y.numel()) * static_cast<double>(inner);
  a.divide(work < kLeastWork ? 1 : torch::stable::get_num_threads());
  parallel_for(0, a.blocks() * a.groups, 1, [&a](int64_t first, int64_t last) {
    a.gelu ? run_blocks<true>(a, first, last) : run_blocks<false>(a, first, last);
  });
#endif
  return y;
}

}  // namespace

LFM_REGISTER(CPU, packed_linear, packed_linear);

}  // namespace lfm_fast

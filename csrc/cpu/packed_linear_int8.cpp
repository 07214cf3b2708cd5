// act(x W^T + b) by the tile instructions (AMX), x in bfloat16, W in int8 and in the tiles' order: rows of x are turned
// into int8, each with a scale of its own, where they are put into tiles, and products of int8 are summed in int32.
#include <atomic>
#include <limits>

#include "common/registration.h"
#include "cpu/linear.h"

namespace lfm_fast {
namespace {

#if defined(LFM_AMX)

constexpr int64_t kStep = 64;                // inner numbers of two tiles
constexpr float kLargest = 127.0f;           // of the whole numbers that stand for a row
constexpr float kLeastRow = 0x1p-100f;       // a row whose largest number is below it counts as zero
constexpr float kWholeNumbers = 0x1.8p+23f;  // added to a number, it leaves the nearest whole one in the low bits

// Threads that share the panels quantise the same rows and store the same numbers.
inline void store_shared(float& to, float value) { std::atomic_ref<float>(to).store(value, std::memory_order_relaxed); }
inline float load_shared(float& from) { return std::atomic_ref<float>(from).load(std::memory_order_relaxed); }

// The factor (rows x inner) of a product as its rows lie in memory, to be made int8.
struct LeftQuantised {
  static constexpr int kParts = 1;
  const Bf16* data;
  int64_t inner;  // numbers in a row
  float* scales;  // of the rows, found when a strip is made
};

// The largest magnitude of a row, as the bits of a bfloat16: those of positive numbers are in their numbers' order.
LFM_AMX_INLINE uint32_t largest_of(const Bf16* row, int64_t inner) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i most = _mm512_setzero_si512(), other = most;
  int64_t k = 0;
  for (; k + kStep <= inner; k += kStep) {
    most = _mm512_max_epu16(most, _mm512_and_si512(magnitude, _mm512_loadu_si512(row + k)));
    other = _mm512_max_epu16(other, _mm512_and_si512(magnitude, _mm512_loadu_si512(row + k + 32)));
  }
  for (; k < inner; k += 32)
    most = _mm512_max_epu16(most, _mm512_and_si512(magnitude, load_32(row + k, first_of_32(inner - k))));
  most = _mm512_max_epu16(most, other);
  const __m512i low = _mm512_and_si512(most, _mm512_set1_epi32(0xffff)), high = _mm512_srli_epi32(most, 16);
  return _mm512_reduce_max_epu32(_mm512_max_epu32(low, high));
}

// Pairs of bfloat16 -> pairs of whole numbers, in the low bytes of 16-bit halves.
LFM_AMX_INLINE __m512i quantised(__m512i pairs, __m512 factor) {
  const __m512 whole = _mm512_set1_ps(kWholeNumbers);
  const __m512 even = reinterpret_cast<__m512>(_mm512_slli_epi32(pairs, 16));
  const __m512 odd = reinterpret_cast<__m512>(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
  const __m512i first = reinterpret_cast<__m512i>(_mm512_fmadd_ps(even, factor, whole));
  const __m512i second = reinterpret_cast<__m512i>(_mm512_fmadd_ps(odd, factor, whole));
  return _mm512_mask_blend_epi8(0x2222222222222222, first, _mm512_slli_epi32(second, 8));
}

// A row of a tile: four bytes of lane l are the numbers 2 l, 2 l + 1, 32 + 2 l and 33 + 2 l of a step.
LFM_AMX_INLINE __m512i step_of(__m512i a, __m512i b, __m512 factor) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, quantised(a, factor), _mm512_slli_epi32(quantised(b, factor), 16));
}

// The rows of a section in tiles, scaled by the largest number of the whole row.
LFM_AMX_INLINE Strip strip_at(const LeftQuantised& left, const Sizes& sizes, const Section& at) {
  const int64_t begin = at.step * kStep, end = begin + at.steps * kStep;
  for (int64_t i = 0; i < kStrip; ++i) {
    const bool present = at.row + i < sizes.rows;
    const Bf16* const row = left.data + (present ? (at.row + i) * left.inner : 0);
    const int64_t inner = present ? left.inner : 0;
    const uint32_t bits = largest_of(row, inner);
    const float largest = bfloat16_to_float(static_cast<uint16_t>(bits));
    const bool counts = largest >= kLeastRow, finite = bits < 0x7f80;
    const __m512 factor = _mm512_set1_ps(counts && finite ? kLargest / largest : 0.0f);
    if (present)
      store_shared(left.scales[at.row + i], !finite ? std::numeric_limits<float>::quiet_NaN()
                                            : counts ? largest / kLargest
                                                     : 0.0f);
    Bf16* to = at.copy + i / 16 * kTile16 + i % 16 * 32;
    int64_t k = begin;
    for (; k < end && k + kStep <= inner; k += kStep, to += 2 * kTile16)
      _mm512_store_si512(to, step_of(_mm512_loadu_si512(row + k), _mm512_loadu_si512(row + k + 32), factor));
    for (; k < end; k += kStep, to += 2 * kTile16) {
      const __m512i a = load_32(row + (k < inner ? k : 0), first_of_32(inner - k));
      const __m512i b = load_32(row + (k + 32 < inner ? k + 32 : 0), first_of_32(inner - k - 32));
      _mm512_store_si512(to, step_of(a, b, factor));
    }
  }
  return {at.copy, at.copy + kTile16, 64, 2 * kTile16};
}

// y = product (row's scale) (column's scale) + bias in bfloat16, or GELU of that.
template <bool gelu>
struct FinishQuantised {
  const float *columns_scale, *bias;  // whole panels of them
  float* scales;                      // of the rows
  Bf16* y;
  int64_t stride, at = 0, row = 0;
  __mmask32 inside = 0;
  __m512 low_scale{}, high_scale{}, low_bias{}, high_bias{};

  LFM_AMX_INLINE void start(int64_t first, int64_t column, __mmask32 columns) {
    row = first, at = first * stride + column, inside = columns;
    low_scale = _mm512_loadu_ps(columns_scale + column), high_scale = _mm512_loadu_ps(columns_scale + column + 16);
    low_bias = _mm512_loadu_ps(bias + column), high_bias = _mm512_loadu_ps(bias + column + 16);
  }
  LFM_AMX_INLINE void operator()(__m512 low, __m512 high) {
    const __m512 scale = _mm512_set1_ps(load_shared(scales[row]));
    low = _mm512_mul_ps(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(low)), scale);
    high = _mm512_mul_ps(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(high)), scale);
    low = _mm512_fmadd_ps(low, low_scale, low_bias), high = _mm512_fmadd_ps(high, high_scale, high_bias);
    if (gelu) low = _mm512_mul_ps(low, gelu_logistic(low)), high = _mm512_mul_ps(high, gelu_logistic(high));
    store(y + at, inside, low, high);
    at += stride, ++row;
  }
};

#endif

}  // namespace

#if defined(LFM_AMX)
template <bool gelu>
constexpr bool kOfIntegers<FinishQuantised<gelu>> = true;
#endif

namespace {

Tensor packed_linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
                          int64_t out_features, bool gelu) {
  check_on_cpu(x, "x");
  check_on_cpu(weight, "weight");
  check_dtype(x, "x", ScalarType::BFloat16);
  LFM_CHECK(x.dim() >= 1, "x must be (..., in_features), got a scalar.");
  LFM_CHECK(out_features >= 0, "out_features must be 0 or more, got ", out_features, ".");
  const int64_t inner = x.size(x.dim() - 1);
  check_table(weight, "weight", ScalarType::Char, {in_strips(out_features), (inner + 63) / 64, 2, 16, 16, 4});
  check_dtype(scale, "scale", ScalarType::Float);
  const std::vector<float> columns = bias_of(scale, "scale", out_features), shift = bias_of(bias, "bias", out_features);
  LFM_CHECK(has_tiles(), "packed_linear_int8 needs a processor with AMX for int8.");
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = out_features;
  Tensor y = new_tensor(shape, ScalarType::BFloat16);
  if (y.numel() == 0) return y;
#if defined(LFM_AMX)
  const Tensor rows = contiguous_on_cpu(x, "x"), tiles = contiguous_on_cpu(weight, "weight");
  const int64_t count = y.numel() / out_features;
  std::vector<float> scales(static_cast<size_t>(count));
  const LeftQuantised left{bf16_of(rows), inner, scales.data()};
  const Bf16* const right = static_cast<const Bf16*>(tiles.const_data_ptr());  // two int8 each
  const Sizes sizes{count, (inner + 1) / 2, out_features};
  if (gelu)
    run_product(sizes, left, right,
                FinishQuantised<true>{columns.data(), shift.data(), scales.data(), bf16_of(y), out_features});
  else
    run_product(sizes, left, right,
                FinishQuantised<false>{columns.data(), shift.data(), scales.data(), bf16_of(y), out_features});
#endif
  return y;
}

}  // namespace

LFM_REGISTER(CPU, packed_linear_int8, packed_linear_int8);

}  // namespace lfm_fast

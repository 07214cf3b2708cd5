// y = gelu(x W_1^T + b_1) W_2^T + b_2 in bfloat16 by the tile instructions (AMX), and its gradients. The GELU and its
// derivative are part of the products beside them.
#include <tuple>

#include "common/registration.h"
#include "cpu/linear.h"

namespace lfm_fast {
namespace {

#if defined(LFM_AMX)

// d/dx gelu(x) = s + x s (1 - s) 2u'. Beyond 30 it is 0 or 1, where x^2 might overflow.
LFM_AMX_INLINE __m512 gelu_slope(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-30.0f), _mm512_min_ps(_mm512_set1_ps(30.0f), x));  // NaN, the second, stays
  const __m512 s = gelu_logistic(x), square = _mm512_mul_ps(x, x), one = _mm512_set1_ps(1.0f);
  const __m512 inner = _mm512_fmadd_ps(square, _mm512_set1_ps(kGeluThreeCubic), _mm512_set1_ps(kGeluLinear));
  return _mm512_mul_ps(s, _mm512_fmadd_ps(_mm512_mul_ps(x, inner), _mm512_sub_ps(one, s), one));
}

// y = product gelu'(before) in bfloat16.
struct FinishSlope {
  const Bf16* before;
  Bf16* y;
  int64_t stride, at = 0;
  __mmask32 inside = 0;

  LFM_AMX_INLINE void start(int64_t row, int64_t column, __mmask32 columns) {
    at = row * stride + column, inside = columns;
  }
  LFM_AMX_INLINE void operator()(__m512 low, __m512 high) {
    const Bf16* const from = before + at;
    low = _mm512_mul_ps(low, gelu_slope(load_floats(from, static_cast<__mmask16>(inside))));
    high = _mm512_mul_ps(high, gelu_slope(load_floats(from + 16, static_cast<__mmask16>(inside >> 16))));
    store(y + at, inside, low, high);
    at += stride;
  }
};

#endif

struct Weights {
  Tensor first, second;
  int64_t inner, hidden, outer;

  Weights(const Tensor& weight_1, const Tensor& weight_2)
      : first(weight_of(weight_1, "weight_1")),
        second(weight_of(weight_2, "weight_2")),
        inner(first.size(1)),
        hidden(first.size(0)),
        outer(second.size(0)) {
    LFM_CHECK(second.size(1) == hidden, "weight_2 must have ", hidden, " inputs, as many as weight_1 has outputs, got ",
              shape_text(second), ".");
    LFM_CHECK(has_tiles(), "tile_mlp needs a processor with AMX for bfloat16.");
  }
};

Tensor like_rows(const Tensor& x, int64_t width) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = width;
  return new_tensor(shape, ScalarType::BFloat16);
}

std::tuple<Tensor, Tensor> tile_mlp(const Tensor& x, const Tensor& weight_1, const Tensor& bias_1,
                                    const Tensor& weight_2, const Tensor& bias_2) {
  const Weights w(weight_1, weight_2);
  const Tensor rows = rows_of(x, "x", w.inner);
  const std::vector<float> shift_1 = bias_of(bias_1, "bias_1", w.hidden), shift_2 = bias_of(bias_2, "bias_2", w.outer);
  Tensor y = like_rows(x, w.outer), before = like_rows(x, w.hidden);
#if defined(LFM_AMX)
  const int64_t count = rows_in(x);
  const Tensor first = packed_for_output(w.first), second = packed_for_output(w.second);
  const int64_t most = rows_at_once(2 * w.hidden);
  Tensor hidden = new_tensor({std::min(count, most), w.hidden}, ScalarType::BFloat16);
  for (int64_t row = 0; row < count; row += most) {
    const int64_t n = std::min(most, count - row);
    run_product({n, w.inner, w.hidden}, LeftRows{bf16_of(rows) + row * w.inner, w.inner}, bf16_of(first),
                FinishLinear<true, true>{shift_1.data(), bf16_of(hidden), bf16_of(before) + row * w.hidden, w.hidden});
    run_product({n, w.hidden, w.outer}, LeftRows{bf16_of(std::as_const(hidden)), w.hidden}, bf16_of(second),
                FinishLinear<false, false>{shift_2.data(), bf16_of(y) + row * w.outer, nullptr, w.outer});
  }
#endif
  return {std::move(y), std::move(before)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tile_mlp_backward(const Tensor& grad, const Tensor& x,
                                                                     const Tensor& before, const Tensor& weight_1,
                                                                     const Tensor& weight_2) {
  const Weights w(weight_1, weight_2);
  const Tensor rows = rows_of(x, "x", w.inner), grad_rows = rows_beside(grad, "grad", x, w.outer);
  const Tensor before_rows = rows_beside(before, "before", x, w.hidden);
  const int64_t count = rows_in(x);
  Tensor grad_x = like_rows(x, w.inner);
#if defined(LFM_AMX)
  WeightGradient first(w.hidden, w.inner), second(w.outer, w.hidden);
  const Tensor right_1 = packed_for_input(w.first), right_2 = packed_for_input(w.second);
  const int64_t most = rows_at_once(2 * w.hidden);
  Tensor slope = new_tensor({std::min(count, most), w.hidden}, ScalarType::BFloat16);
  const Bf16* const slopes = bf16_of(std::as_const(slope));
  for (int64_t row = 0; row < count; row += most) {
    const int64_t n = std::min(most, count - row);
    const Bf16* const above = bf16_of(grad_rows) + row * w.outer;
    const Bf16* const inside = bf16_of(before_rows) + row * w.hidden;
    second.add<true>(above, inside, n);
    run_product({n, w.outer, w.hidden}, LeftRows{above, w.outer}, bf16_of(right_2),
                FinishSlope{inside, bf16_of(slope), w.hidden});
    first.add<false>(slopes, bf16_of(rows) + row * w.inner, n);
    run_product({n, w.hidden, w.inner}, LeftRows{slopes, w.hidden}, bf16_of(right_1),
                FinishLinear<false, false>{nullptr, bf16_of(grad_x) + row * w.inner, nullptr, w.inner});
  }
  first.finish();
  second.finish();
  return {std::move(grad_x), std::move(first.weight), std::move(first.bias), std::move(second.weight),
          std::move(second.bias)};
#else
  const auto empty = [](int64_t size) { return new_tensor({size}, ScalarType::Float); };
  return {std::move(grad_x), empty(0), empty(0), empty(0), empty(0)};
#endif
}

}  // namespace

LFM_REGISTER(CPU, tile_mlp, tile_mlp);
LFM_REGISTER(CPU, tile_mlp_backward, tile_mlp_backward);

}  // namespace lfm_fast

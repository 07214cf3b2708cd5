// y = x W^T + b in bfloat16 by the tile instructions (AMX), and its gradients.
#include <tuple>

#include "common/registration.h"
#include "cpu/linear.h"

namespace lfm_fast {
namespace {

Tensor tile_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor matrix = weight_of(weight, "weight");
  const int64_t outer = matrix.size(0), inner = matrix.size(1);
  const Tensor rows = rows_of(x, "x", inner);
  const std::vector<float> shift = bias_of(bias, "bias", outer);
  LFM_CHECK(has_tiles(), "tile_linear needs a processor with AMX for bfloat16.");
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = outer;
  Tensor y = new_tensor(shape, ScalarType::BFloat16);
#if defined(LFM_AMX)
  const Tensor right = packed_for_output(matrix);
  run_product({rows_in(x), inner, outer}, LeftRows{bf16_of(rows), inner}, bf16_of(right),
              FinishLinear<false, false>{shift.data(), bf16_of(y), nullptr, outer});
#endif
  return y;
}

std::tuple<Tensor, Tensor, Tensor> tile_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        bool gradient_of_x) {
  const Tensor matrix = weight_of(weight, "weight");
  const int64_t outer = matrix.size(0), inner = matrix.size(1), count = rows_in(x);
  const Tensor rows = rows_of(x, "x", inner), grad_rows = rows_beside(grad, "grad", x, outer);
  LFM_CHECK(has_tiles(), "tile_linear_backward needs a processor with AMX for bfloat16.");
  Tensor grad_x = new_tensor(gradient_of_x ? shape_of(x) : std::vector<int64_t>{0}, ScalarType::BFloat16);
#if defined(LFM_AMX)
  WeightGradient gradient(outer, inner);
  const Tensor right = gradient_of_x ? packed_for_input(matrix) : grad_x;
  const int64_t most = rows_at_once(outer + inner);
  for (int64_t first = 0; first < count; first += most) {
    const int64_t n = std::min(most, count - first);
    const Bf16* const above = bf16_of(grad_rows) + first * outer;
    gradient.add<false>(above, bf16_of(rows) + first * inner, n);
    if (gradient_of_x)
      run_product({n, outer, inner}, LeftRows{above, outer}, bf16_of(right),
                  FinishLinear<false, false>{nullptr, bf16_of(grad_x) + first * inner, nullptr, inner});
  }
  gradient.finish();
  return {std::move(grad_x), std::move(gradient.weight), std::move(gradient.bias)};
#else
  return {std::move(grad_x), new_tensor({outer, inner}, ScalarType::Float), new_tensor({outer}, ScalarType::Float)};
#endif
}

}  // namespace

LFM_REGISTER(CPU, tile_linear, tile_linear);
LFM_REGISTER(CPU, tile_linear_backward, tile_linear_backward);

}  // namespace lfm_fast

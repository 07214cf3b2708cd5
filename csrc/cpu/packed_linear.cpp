// act(x W^T + b) in bfloat16 by the tile instructions (AMX), W in the tiles' order already.
#include "common/registration.h"
#include "cpu/linear.h"

namespace lfm_fast {
namespace {

Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
                     bool gelu) {
  check_on_cpu(x, "x");
  check_on_cpu(weight, "weight");
  check_dtype(x, "x", ScalarType::BFloat16);
  LFM_CHECK(x.dim() >= 1, "x must be (..., in_features), got a scalar.");
  LFM_CHECK(out_features >= 0, "out_features must be 0 or more, got ", out_features, ".");
  const int64_t inner = x.size(x.dim() - 1);
  check_table(weight, "weight", ScalarType::BFloat16, {in_strips(out_features), in_strips(inner), 2, 16, 16, 2});
  LFM_CHECK(has_tiles(), "packed_linear needs a processor with AMX for bfloat16.");
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = out_features;
  Tensor y = new_tensor(shape, ScalarType::BFloat16);
  if (y.numel() == 0) return y;
#if defined(LFM_AMX)
  const Tensor rows = contiguous_on_cpu(x, "x"), tiles = contiguous_on_cpu(weight, "weight");
  const std::vector<float> padded = bias_of(bias, "bias", out_features);
  const LeftRows left{bf16_of(rows), inner};
  const Bf16* const right = bf16_of(tiles);
  const Sizes sizes{y.numel() / out_features, inner, out_features};
  if (gelu)
    run_product(sizes, left, right, FinishLinear<true, false>{padded.data(), bf16_of(y), nullptr, out_features});
  else
    run_product(sizes, left, right, FinishLinear<false, false>{padded.data(), bf16_of(y), nullptr, out_features});
#endif
  return y;
}

}  // namespace

LFM_REGISTER(CPU, packed_linear, packed_linear);

}  // namespace lfm_fast

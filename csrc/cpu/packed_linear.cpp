// act(x W^T + b) by the tile instructions (AMX), W in the tiles' order already; in bfloat16, or in float32 of which
// every number is taken as a sum of two or three bfloat16.
#include "common/registration.h"
#include "cpu/linear.h"

namespace lfm_fast {
namespace {

#if defined(LFM_AMX)

// Left: how the rows of x are read.
template <typename Left, typename Number>
void run(const Sizes& sizes, const Number* x, const Bf16* weight, const float* bias, Number* y, bool gelu) {
  const Left left{x, sizes.inner};
  if (gelu)
    run_product(sizes, left, weight, FinishLinear<true, false, Number>{bias, y, nullptr, sizes.outer});
  else
    run_product(sizes, left, weight, FinishLinear<false, false, Number>{bias, y, nullptr, sizes.outer});
}

#endif

Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
                     bool gelu) {
  check_on_cpu(x, "x");
  check_on_cpu(weight, "weight");
  check_float_or_bf16(x, "x");
  LFM_CHECK(x.dim() >= 1, "x must be (..., in_features), got a scalar.");
  LFM_CHECK(out_features >= 0, "out_features must be 0 or more, got ", out_features, ".");
  const int64_t inner = x.size(x.dim() - 1);
  const bool floats = x.scalar_type() == ScalarType::Float;
  LFM_CHECK(weight.dim() == 7, "weight must have 7 dimensions, got ", shape_text(weight), ".");
  const int64_t parts = weight.size(2);
  LFM_CHECK(floats ? parts == 2 || parts == 3 : parts == 1, "weight must be of 2 or 3 parts for x in float32 and of 1 ",
            "for bfloat16, got ", parts, ".");
  check_table(weight, "weight", ScalarType::BFloat16, {in_strips(out_features), in_strips(inner), parts, 2, 16, 16, 2});
  LFM_CHECK(has_tiles(), "packed_linear needs a processor with AMX for bfloat16.");
  const std::vector<float> padded = bias_of(bias, "bias", out_features);
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = out_features;
  Tensor y = new_tensor(shape, x.scalar_type());
  if (y.numel() == 0) return y;
#if defined(LFM_AMX)
  const Tensor rows = contiguous_on_cpu(x, "x"), tiles = contiguous_on_cpu(weight, "weight");
  const Bf16* const right = bf16_of(tiles);
  const Sizes sizes{y.numel() / out_features, inner, out_features};
  if (!floats) {
    run<LeftRows>(sizes, bf16_of(rows), right, padded.data(), bf16_of(y), gelu);
    return y;
  }
  const float* const from = static_cast<const float*>(rows.const_data_ptr());
  float* const to = static_cast<float*>(y.mutable_data_ptr());
  if (parts == 3)
    run<LeftFloats<3>>(sizes, from, right, padded.data(), to, gelu);
  else
    run<LeftFloats<2>>(sizes, from, right, padded.data(), to, gelu);
#endif
  return y;
}

}  // namespace

LFM_REGISTER(CPU, packed_linear, packed_linear);

}  // namespace lfm_fast

// Linear layers that are trained: weights as the optimizer keeps them, packed into tiles at every call.
#pragma once

#include <type_traits>

#include <torch/csrc/stable/ops.h>

#include "cpu/amx_products.h"
#include "cpu/rows.h"

namespace lfm_fast {

inline Tensor contiguous_on_cpu(const Tensor& tensor, const char* name) {
  check_on_cpu(tensor, name);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_float_or_bf16(const Tensor& tensor, const char* name) {
  LFM_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::BFloat16, name,
            " must be float32 or bfloat16, got ", dtype_name(tensor.scalar_type()), ".");
}

// Rows of `width` numbers in bfloat16.
inline Tensor rows_of(const Tensor& tensor, const char* name, int64_t width) {
  check_dtype(tensor, name, ScalarType::BFloat16);
  LFM_CHECK(tensor.dim() >= 1 && tensor.size(tensor.dim() - 1) == width, name, " must be (..., ", width, "), got ",
            shape_text(tensor), ".");
  return contiguous_on_cpu(tensor, name);
}

// A weight (outer, inner).
inline Tensor weight_of(const Tensor& tensor, const char* name) {
  check_float_or_bf16(tensor, name);
  LFM_CHECK(tensor.dim() == 2, name, " must be (out_features, in_features), got ", shape_text(tensor), ".");
  return contiguous_on_cpu(tensor, name);
}

// float32, padded to whole panels with zeros; all zeros where there is none.
inline std::vector<float> bias_of(const std::optional<Tensor>& bias, const char* name, int64_t outer) {
  std::vector<float> values(static_cast<size_t>(rounded_up(outer, kStrip)));
  if (!bias) return values;
  check_on_cpu(*bias, name);
  check_float_or_bf16(*bias, name);
  check_table(*bias, name, bias->scalar_type(), {outer});
  const int64_t stride = bias->stride(0);
  for (int64_t n = 0; n < outer; ++n)
    values[static_cast<size_t>(n)] =
        bias->scalar_type() == ScalarType::Float
            ? static_cast<const float*>(bias->const_data_ptr())[n * stride]
            : bfloat16_to_float(static_cast<const uint16_t*>(bias->const_data_ptr())[n * stride]);
  return values;
}

inline Bf16* bf16_of(Tensor& tensor) { return static_cast<Bf16*>(tensor.mutable_data_ptr()); }
inline const Bf16* bf16_of(const Tensor& tensor) { return static_cast<const Bf16*>(tensor.const_data_ptr()); }

inline int64_t rows_in(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

#if defined(LFM_AMX)

// pack(data, first, last) over panels or strips in parallel, `data` of the tensor's own type.
template <typename Pack>
void pack_parallel(const Tensor& tensor, int64_t count, const Pack& pack) {
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) * count / std::max<int64_t>(1, tensor.numel()));
  parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    if (tensor.scalar_type() == ScalarType::Float)
      pack(static_cast<const float*>(tensor.const_data_ptr()), first, last);
    else
      pack(static_cast<const Bf16*>(tensor.const_data_ptr()), first, last);
  });
}

// weight (outer, inner) as the right factor of x weight^T.
inline Tensor packed_for_output(const Tensor& weight) {
  const int64_t outer = weight.size(0), inner = weight.size(1);
  Tensor packed = new_tensor({packed_size(outer, inner)}, ScalarType::BFloat16);
  pack_parallel(weight, in_strips(outer), [&](const auto* data, int64_t first, int64_t last) {
    pack_right_of_rows(data, outer, inner, bf16_of(packed), first, last);
  });
  return packed;
}

// A matrix (inner, outer) as the right factor itself: a weight in grad weight, x in grad^T x.
inline Tensor packed_as_right(const Tensor& matrix, int64_t inner, int64_t outer) {
  Tensor packed = new_tensor({packed_size(outer, inner)}, ScalarType::BFloat16);
  pack_parallel(matrix, in_strips(inner), [&](const auto* data, int64_t first, int64_t last) {
    pack_right(data, inner, outer, bf16_of(packed), first, last);
  });
  return packed;
}

// grad (rows, outer) and x (rows, inner): (grad^T x, column sums of grad), float32.
inline void weight_gradients(const Tensor& grad, const Tensor& x, int64_t rows, Tensor& of_weight, Tensor& of_bias) {
  const int64_t outer = of_weight.size(0), inner = of_weight.size(1);
  const int64_t chunks = (in_strips(rows) + kSummedSteps - 1) / kSummedSteps;
  Tensor left = new_tensor({packed_size(outer, rows)}, ScalarType::BFloat16);
  std::vector<float> sums(static_cast<size_t>(chunks * outer));
  parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    pack_left_of_columns(bf16_of(grad), rows, outer, bf16_of(left), sums.data(), first, last);
  });
  if (outer % kStrip != 0 && outer % kStrip <= 16) {  // the last strip's lower half is no one's: tiles read it
    Bf16* const tiles = bf16_of(left) + (in_strips(outer) - 1) * in_strips(rows) * 2 * kTile16;
    for (int64_t step = 0; step < in_strips(rows); ++step)
      std::fill_n(tiles + (2 * step + 1) * kTile16, kTile16, Bf16{0});
  }
  float* const total = static_cast<float*>(of_bias.mutable_data_ptr());
  for (int64_t n = 0; n < outer; ++n) {
    total[n] = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total[n] += sums[static_cast<size_t>(chunk * outer + n)];
  }
  const Tensor right = packed_as_right(x, rows, inner);
  run_product({outer, rows, inner}, LeftTiles{bf16_of(std::as_const(left))}, bf16_of(right),
              FinishFloat{static_cast<float*>(of_weight.mutable_data_ptr()), inner});
}

#endif

}  // namespace lfm_fast

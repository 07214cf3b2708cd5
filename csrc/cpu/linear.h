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

// The same beside x: its shape but for the last dimension.
inline Tensor rows_beside(const Tensor& tensor, const char* name, const Tensor& x, int64_t width) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = width;
  LFM_CHECK(shape_of(tensor) == shape, name, " must have the shape of x, ", shape_text(x), ", but ", width,
            " in its last dimension, got ", shape_text(tensor), ".");
  return rows_of(tensor, name, width);
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
  // asked once: each question crosses the library's border
  const int64_t stride = bias->stride(0);
  const void* const data = bias->const_data_ptr();
  const bool is_float = bias->scalar_type() == ScalarType::Float;
  for (int64_t n = 0; n < outer; ++n)
    values[static_cast<size_t>(n)] = is_float ? static_cast<const float*>(data)[n * stride]
                                              : bfloat16_to_float(static_cast<const uint16_t*>(data)[n * stride]);
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

// weight (inner, outer) as the right factor itself, of grad weight.
inline Tensor packed_for_input(const Tensor& weight) {
  const int64_t inner = weight.size(0), outer = weight.size(1);
  Tensor packed = new_tensor({packed_size(outer, inner)}, ScalarType::BFloat16);
  pack_parallel(weight, in_strips(inner), [&](const auto* data, int64_t first, int64_t last) {
    pack_right<false>(data, inner, outer, bf16_of(packed), first, last);
  });
  return packed;
}

// Rows of activations that are taken at a time, so that what is made of them on the way stays in the caches: `width`
// numbers of each row.
inline int64_t rows_at_once(int64_t width) {
  constexpr int64_t kElements = int64_t{1} << 21;
  return std::max<int64_t>(1024, kElements / std::max<int64_t>(width, 1) / kStrip * kStrip);
}

// grad^T x and the column sums of grad, taken up chunk by chunk: grad (n, outer), x (n, inner), or GELU(x).
class WeightGradient {
 public:
  WeightGradient(int64_t outer, int64_t inner)
      : weight(new_tensor({outer, inner}, ScalarType::Float)),
        bias(new_tensor({outer}, ScalarType::Float)),
        outer_(outer),
        inner_(inner) {
    std::fill_n(static_cast<float*>(bias.mutable_data_ptr()), outer, 0.0f);
  }

  template <bool gelu>
  void add(const Bf16* grad, const Bf16* x, int64_t rows) {
    const int64_t steps = in_strips(rows), chunks = (steps + kSummedSteps - 1) / kSummedSteps;
    if (rows > room_) {
      const int64_t sizes[] = {packed_size(outer_, rows), packed_size(inner_, rows)};
      memory_ = std::make_unique<Workspace>(std::initializer_list<int64_t>{2 * sizes[0], 2 * sizes[1]});
      left_ = memory_->take<Bf16>(sizes[0]), right_ = memory_->take<Bf16>(sizes[1]), room_ = rows;
      sums_.resize(static_cast<size_t>(chunks * outer_));
    }
    Bf16 *const left = left_, *const right = right_;
    parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      pack_left_of_columns(grad, rows, outer_, left, sums_.data(), first, last);
    });
    parallel_for(0, steps, 1, [&](int64_t first, int64_t last) {
      pack_right<gelu>(x, rows, inner_, right, first, last);
    });
    float* const total = static_cast<float*>(bias.mutable_data_ptr());
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t n = 0; n < outer_; ++n) total[n] += sums_[static_cast<size_t>(chunk * outer_ + n)];
    float* const to = static_cast<float*>(weight.mutable_data_ptr());
    run_product({outer_, rows, inner_}, LeftTiles{left}, right, FinishFloat{to, inner_, started_});
    started_ = true;
  }

  // Nothing was added: zeros.
  void finish() {
    if (!started_) std::fill_n(static_cast<float*>(weight.mutable_data_ptr()), outer_ * inner_, 0.0f);
  }

  Tensor weight, bias;

 private:
  int64_t outer_, inner_;
  bool started_ = false;
  // Uninitialised: what no column fills of the last tile makes rows of the product that nobody stores.
  std::unique_ptr<Workspace> memory_;
  Bf16 *left_ = nullptr, *right_ = nullptr;
  int64_t room_ = 0;  // rows
  std::vector<float> sums_;
};

#endif

}  // namespace lfm_fast

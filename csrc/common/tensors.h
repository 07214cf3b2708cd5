// What kernels need to know of a tensor, and how they make one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"

namespace lfm_fast {

enum class Element { float32, bfloat16, float16 };

inline Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::float32;
    case ScalarType::BFloat16: return Element::bfloat16;
    case ScalarType::Half: return Element::float16;
    default: break;
  }
  refuse(name, " must be float32, bfloat16 or float16, got ", dtype_name(tensor.scalar_type()), ".");
}

// Whether the elements of each sample lie side by side; the stride between samples is free (0 where expanded).
inline bool rows_are_dense(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (size_t i = sizes.size(); i-- > 1;) {
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// A fresh contiguous tensor. Made by the C call under torch::stable::new_empty: that goes through the dispatcher, which
// costs more than a small step itself.
inline Tensor empty_tensor(const std::vector<int64_t>& shape, ScalarType dtype, int32_t device_type,
                           int32_t device_index) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) strides[i] = stride;
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), dtype_code, device_type, device_index,
                                                         &handle));
  return Tensor(handle);
}

// A small table of per-sample numbers has exactly this dtype and shape.
inline void check_table(const Tensor& tensor, const char* name, ScalarType dtype, const std::vector<int64_t>& shape) {
  check_dtype(tensor, name, dtype);
  std::string expected;
  for (size_t i = 0; i < shape.size(); ++i) expected += (i ? ", " : "") + std::to_string(shape[i]);
  LFM_CHECK(shape_of(tensor) == shape, name, " must have shape (", expected, "), got ", shape_text(tensor), ".");
}

}  // namespace lfm_fast

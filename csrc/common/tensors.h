// What kernels need to know of a tensor, and how they make one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
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

// Whether the elements fill their memory without gap or overlap, in whatever order of the dimensions.
inline bool fills_its_memory(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1) dimensions.emplace_back(strides[i], sizes[i]);
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether two tensors of one shape have their elements in the same order.
inline bool same_strides(const Tensor& tensor, const Tensor& model) {
  const auto sizes = model.sizes(), strides = tensor.strides(), wanted = model.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1 && strides[i] != wanted[i]) return false;
  return true;
}

// Where a tensor's elements lie, and whether an op changes them. Of one with gaps, where the first of them lies: others
// may live in the gaps.
struct Memory {
  const char *begin, *end;
  bool changed;
};

inline Memory memory_of(const Tensor& tensor, bool changed) {
  const int64_t width = tensor.scalar_type() == ScalarType::Float ? 4 : 2;
  const int64_t elements = tensor.numel() == 0 || fills_its_memory(tensor) ? tensor.numel() : 1;
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + elements * width, changed};
}

// Nothing that is changed is read or changed through another tensor too: by another thread, or one element later.
inline void check_apart(std::vector<Memory> memory) {
  std::sort(memory.begin(), memory.end(), [](const Memory& a, const Memory& b) { return a.begin < b.begin; });
  const char *end_of_changed = nullptr, *end_of_any = nullptr;  // of those so far
  for (const Memory& m : memory) {
    if (m.begin == m.end) continue;
    LFM_CHECK(m.begin >= (m.changed ? end_of_any : end_of_changed),
              "a tensor to change shares memory with another one; pass each one once.");
    if (m.changed) end_of_changed = std::max(end_of_changed, m.end);
    end_of_any = std::max(end_of_any, m.end);
  }
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

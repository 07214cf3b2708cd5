// Per-sample rows of elements in float32, bfloat16 or float16, read and written a tile at a time as float32.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/low_precision.h"
#include "common/macros.h"
#include "common/tensors.h"
#include "cpu/tiles.h"

namespace lfm_fast {

// A tile's worth of scratch; uninitialised on purpose.
struct TileBuffer {
  alignas(64) float values[kTile];
};

// Input rows. Copies the tensor only where a sample's own elements are strided.
class Rows {
 public:
  Rows() = default;
  Rows(const Tensor& tensor, const char* name) : element_(element_of(tensor, name)) {
    check_on_cpu(tensor, name);
    check_batched(tensor, name);
    owner_ = rows_are_dense(tensor) ? tensor : torch::stable::contiguous(tensor);
    data_ = owner_->const_data_ptr();
    stride_ = owner_->stride(0);
  }

  explicit operator bool() const { return owner_.has_value(); }

  // Elements [start, start + n) of a sample: where they lie if they are float32, else converted into `buffer`.
  LFM_HD const float* load(int64_t sample, int64_t start, int64_t n, TileBuffer& buffer) const {
    const int64_t at = sample * stride_ + start;
    if (element_ == Element::float32) return static_cast<const float*>(data_) + at;
    const uint16_t* source = static_cast<const uint16_t*>(data_) + at;
    float* __restrict values = buffer.values;
    if (element_ == Element::bfloat16) {
      for (int64_t j = 0; j < n; ++j) values[j] = bfloat16_to_float(source[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) values[j] = float16_to_float(source[j]);
    }
    return values;
  }

 private:
  std::optional<Tensor> owner_;
  const void* data_ = nullptr;
  int64_t stride_ = 0;
  Element element_ = Element::float32;
};

// Output rows of a fresh contiguous tensor.
class OutputRows {
 public:
  OutputRows() = default;
  OutputRows(const Tensor& tensor, const char* name)
      : data_(tensor.mutable_data_ptr()), stride_(elements_per_sample(tensor)), element_(element_of(tensor, name)) {}

  explicit operator bool() const { return data_ != nullptr; }

  // Where to compute a tile: the tensor's own memory if it is float32, else `buffer`; then call `store`.
  LFM_HD float* place(int64_t sample, int64_t start, TileBuffer& buffer) const {
    if (element_ == Element::float32) return static_cast<float*>(data_) + sample * stride_ + start;
    return buffer.values;
  }

  LFM_HD void store(int64_t sample, int64_t start, int64_t n, const TileBuffer& buffer) const {
    if (element_ == Element::float32) return;
    uint16_t* __restrict target = static_cast<uint16_t*>(data_) + sample * stride_ + start;
    const float* __restrict values = buffer.values;
    if (element_ == Element::bfloat16) {
      for (int64_t j = 0; j < n; ++j) target[j] = float_to_bfloat16(values[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) target[j] = float_to_float16(values[j]);
    }
  }

 private:
  void* data_ = nullptr;
  int64_t stride_ = 0;
  Element element_ = Element::float32;
};

// A small (rows, columns) or (B,) table of per-sample numbers, copied out through any strides.
template <typename T>
std::vector<T> read_table(const Tensor& tensor, const char* name, ScalarType dtype, std::vector<int64_t> shape) {
  check_on_cpu(tensor, name);
  check_table(tensor, name, dtype, shape);
  const T* data = tensor.const_data_ptr<T>();
  const int64_t rows = shape[0], columns = shape.size() > 1 ? shape[1] : 1;
  const int64_t row_stride = tensor.stride(0), column_stride = shape.size() > 1 ? tensor.stride(1) : 0;
  std::vector<T> table(static_cast<size_t>(rows * columns));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      table[static_cast<size_t>(r * columns + c)] = data[r * row_stride + c * column_stride];
  return table;
}

inline std::vector<float> read_floats(const Tensor& tensor, const char* name, std::vector<int64_t> shape) {
  return read_table<float>(tensor, name, ScalarType::Float, std::move(shape));
}

inline std::vector<int64_t> read_index(const Tensor& tensor, int64_t samples) {
  return read_table<int64_t>(tensor, "index", ScalarType::Long, {samples});
}

inline Tensor new_tensor(const std::vector<int64_t>& shape, ScalarType dtype) {
  return empty_tensor(shape, dtype, aoti_torch_device_type_cpu(), 0);
}

}  // namespace lfm_fast

// What a kernel must know before it touches memory. The Python rows have checked and worded the same before; these
// checks are for callers of torch.ops.lfm_fast_cpp, and for what would otherwise be read out of bounds.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace lfm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// STD_TORCH_CHECK without the path of the build machine in front of the sentence.
#define LFM_CHECK(condition, ...)                      \
  do {                                                 \
    if (!(condition)) ::lfm_fast::refuse(__VA_ARGS__); \
  } while (false)

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  const auto sizes = tensor.sizes();
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto sizes_a = a.sizes(), sizes_b = b.sizes();
  if (sizes_a.size() != sizes_b.size()) return false;
  for (size_t i = 0; i < sizes_a.size(); ++i)
    if (sizes_a[i] != sizes_b[i]) return false;
  return true;
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType expected) {
  const ScalarType found = tensor.scalar_type();
  LFM_CHECK(found == expected, name, " must be ", dtype_name(expected), ", got ", dtype_name(found), ".");
}

inline void check_on_cpu(const Tensor& tensor, const char* name) {
  LFM_CHECK(tensor.is_cpu(), name, " must be on the CPU like the other arguments; move it with .to(\"cpu\").");
}

inline void check_batched(const Tensor& tensor, const char* name) {
  LFM_CHECK(tensor.dim() >= 1, name, " must have a batch dimension (B, ...), got a scalar.");
}

inline void check_same_shape(const Tensor& tensor, const char* name, const Tensor& model, const char* model_name) {
  LFM_CHECK(same_shape(tensor, model), name, " must have the shape of ", model_name, ", ", shape_text(model), ", got ",
            shape_text(tensor), ".");
}

// Elements per sample, the batch dimension taken off; well defined for B = 0 too.
inline int64_t elements_per_sample(const Tensor& tensor) {
  int64_t count = 1;
  const auto sizes = tensor.sizes();
  for (size_t i = 1; i < sizes.size(); ++i) count *= sizes[i];
  return count;
}

// The counter's block and stream words have 32 bits; beyond them the noise would repeat.
inline void check_counter(int64_t stream, int64_t offset, int64_t elements) {
  constexpr int64_t kWords = int64_t{1} << 32;
  LFM_CHECK(stream >= 0 && stream < kWords, "stream must be in [0, 2^32), got ", stream, ".");
  const int64_t blocks = elements / 4 + (elements % 4 != 0);
  LFM_CHECK(offset >= 0 && offset < kWords && blocks <= kWords - offset,
            "offset + ceil(elements / 4) must stay within [0, 2^32] blocks, got offset ", offset, " and ", elements,
            " elements.");
}

}  // namespace lfm_fast

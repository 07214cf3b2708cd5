// Tokens (B, T, D): a row is the D channels of one token, worked through a block of 64 at a time while it stays in the
// innermost cache. Parallel work and partial column sums go by 32 rows of ONE sample.
#pragma once

#include <cstring>
#include <optional>
#include <vector>

#include "cpu/rows.h"
#include "cpu/vectors.h"

namespace lfm_fast {

constexpr int64_t kRowsPerItem = 32;  // a constant of the definition of a column sum

// The flat range of work items (sample, 32 rows).
struct TokenItems {
  int64_t samples, length, width, per_sample;

  explicit TokenItems(const Tensor& x)
      : samples(x.size(0)),
        length(x.size(1)),
        width(x.size(2)),
        per_sample((length + kRowsPerItem - 1) / kRowsPerItem) {}

  int64_t count() const { return samples * per_sample; }
  int64_t grain(int64_t elements_per_thread) const {
    return std::max<int64_t>(1, elements_per_thread / std::max<int64_t>(1, width * kRowsPerItem));
  }
  int64_t padded_width() const { return (width + kBlock - 1) / kBlock * kBlock; }

  LFM_HD int64_t sample(int64_t item) const { return item / per_sample; }
  LFM_HD int64_t begin(int64_t item) const { return (item % per_sample) * kRowsPerItem; }
  LFM_HD int64_t end(int64_t item) const {
    const int64_t stop = begin(item) + kRowsPerItem;
    return stop < length ? stop : length;
  }
  // What a mean over channels is divided by; a token without channels has mean 0.
  LFM_HD float channels() const { return static_cast<float>(width > 0 ? width : 1); }
};

// Tokens (B, T, D) or per-sample vectors (B, D). Copies only where the channels themselves are strided.
class TokenRows {
 public:
  TokenRows() = default;
  TokenRows(const Tensor& tensor, const char* name) : size_(size_of(element_of(tensor, name))) {
    check_on_cpu(tensor, name);
    const int64_t last = tensor.dim() - 1;
    owner_ = tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
    data_ = static_cast<char*>(const_cast<void*>(owner_->const_data_ptr()));
    sample_stride_ = owner_->stride(0) * size_;
    row_stride_ = last == 2 ? owner_->stride(1) * size_ : 0;
  }

  explicit operator bool() const { return owner_.has_value(); }
  LFM_HD const char* row(int64_t sample, int64_t token) const { return place(sample, token); }

 protected:
  LFM_HD char* place(int64_t sample, int64_t token) const {
    return data_ + sample * sample_stride_ + token * row_stride_;
  }

 private:
  std::optional<Tensor> owner_;
  char* data_ = nullptr;
  int64_t size_ = 4, sample_stride_ = 0, row_stride_ = 0;
};

// A fresh contiguous tensor.
class OutputTokens : public TokenRows {
 public:
  using TokenRows::TokenRows;
  LFM_HD char* row(int64_t sample, int64_t token) const { return place(sample, token); }
};

// Where a row's blocks of 64 lie; its last, incomplete one in a copy that is padded with zeros.
template <Element element>
struct RowIn {
  static constexpr int64_t bytes = size_of(element);
  const char* data;
  int64_t whole;
  alignas(64) char tail[kBlock * bytes];

  LFM_HD RowIn(const char* row, int64_t width) : data(row), whole(width / kBlock) {
    const int64_t rest = width % kBlock;
    if (rest == 0) return;
    std::memset(tail, 0, sizeof tail);
    std::memcpy(tail, row + whole * kBlock * bytes, static_cast<size_t>(rest * bytes));
  }
  // The pair `at` elements into a block.
  LFM_HD const char* place(int64_t block, int64_t at) const {
    return (block < whole ? data + block * kBlock * bytes : tail) + at * bytes;
  }
};

// The same for a row that is written: `finish` puts the incomplete block where it belongs.
template <Element element>
struct RowOut {
  static constexpr int64_t bytes = size_of(element);
  char* data;
  int64_t whole, rest;
  alignas(64) char tail[kBlock * bytes];

  LFM_HD RowOut(char* row, int64_t width) : data(row), whole(width / kBlock), rest(width % kBlock) {}
  LFM_HD char* place(int64_t block, int64_t at) {
    return (block < whole ? data + block * kBlock * bytes : tail) + at * bytes;
  }
  LFM_HD void finish() {
    if (rest) std::memcpy(data + whole * kBlock * bytes, tail, static_cast<size_t>(rest * bytes));
  }
};

// Fetches the next rows of an input from memory while the last pass over the present one computes: left alone, a core
// would read in its first pass and compute in the others, in turns.
template <Element element>
struct RowAhead {
  const char* data;

  // Two rows ahead, or as many as make 3 KB; near the end any row of the item does.
  LFM_HD RowAhead(const TokenRows& rows, int64_t width, int64_t sample, int64_t token, int64_t end) {
    const int64_t bytes = std::max<int64_t>(1, width * size_of(element));
    const int64_t next = token + std::max<int64_t>(2, (3071 + bytes) / bytes);
    data = rows.row(sample, next < end ? next : token);
  }
  LFM_HD void fetch(int64_t block) const {
    constexpr int64_t bytes = kBlock * size_of(element), line = 64;
#pragma GCC unroll 4
    for (int64_t at = 0; at < bytes; at += line) __builtin_prefetch(data + block * bytes + at);
  }
};

// Which elements of the last block exist: what is computed for the others must stay out of a row's sums.
struct TailMask {
  alignas(64) float exists[kBlock];
  int64_t whole, blocks;

  explicit TailMask(int64_t width) : whole(width / kBlock), blocks((width + kBlock - 1) / kBlock) {
    for (int64_t j = 0; j < kBlock; ++j) exists[j] = j < width % kBlock ? 1.0f : 0.0f;
  }
  template <Level level, Order order>
  LFM_HD void apply(int64_t block, int64_t at, Pair<level>& pair) const {
    using V = Vectors<level>;
    if (block < whole) return;
    Pair<level> keep;
    load<level, order, Element::float32>(reinterpret_cast<const char*>(exists + at), keep);
    pair.a = (typename V::Float)((typename V::Int)pair.a & (keep.a != 0.0f));
    pair.b = (typename V::Float)((typename V::Int)pair.b & (keep.b != 0.0f));
  }
};

// x (B, T, D); per-sample vectors (B, D) for it; other tokens of its shape.
inline void check_tokens(const Tensor& x, const char* name) {
  LFM_CHECK(x.dim() == 3, name, " must be tokens (B, T, D), got ", shape_text(x), ".");
}

inline TokenRows tokens_like(const Tensor& tensor, const char* name, const Tensor& x, const char* x_name,
                             ScalarType dtype) {
  check_same_shape(tensor, name, x, x_name);
  check_dtype(tensor, name, dtype);
  return TokenRows(tensor, name);
}

inline TokenRows vectors_for(const Tensor& tensor, const char* name, const Tensor& x, ScalarType dtype) {
  LFM_CHECK(tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(2), name,
            " must be (B, D) for tokens ", shape_text(x), ", got ", shape_text(tensor), ".");
  check_dtype(tensor, name, dtype);
  return TokenRows(tensor, name);
}

// (B, T) float32, one per token, contiguous; keeps its tensor alive.
struct TokenNumbers {
  Tensor owner;
  const float* data;

  TokenNumbers(const Tensor& tensor, const char* name, const Tensor& x) : owner(tensor) {
    check_on_cpu(tensor, name);
    check_dtype(tensor, name, ScalarType::Float);
    LFM_CHECK(tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1), name,
              " must be (B, T) for tokens ", shape_text(x), ", got ", shape_text(tensor), ".");
    owner = torch::stable::contiguous(tensor);
    data = owner.const_data_ptr<float>();
  }
};

// run(std::integral_constant of both element types): float32 or bfloat16 each.
template <typename Run>
void with_elements(const Tensor& x, const char* x_name, const Tensor& vector, const char* name, const Run& run) {
  using Float32 = std::integral_constant<Element, Element::float32>;
  using Bfloat16 = std::integral_constant<Element, Element::bfloat16>;
  const Element a = element_of(x, x_name), b = element_of(vector, name);
  LFM_CHECK(a != Element::float16 && b != Element::float16, "float16 has no kernel here; pass float32 or bfloat16.");
  if (a == Element::float32) {
    if (b == Element::float32) run(Float32{}, Float32{});
    else run(Float32{}, Bfloat16{});
  } else {
    if (b == Element::float32) run(Bfloat16{}, Float32{});
    else run(Bfloat16{}, Bfloat16{});
  }
}

}  // namespace lfm_fast

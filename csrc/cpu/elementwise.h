// One output element from the input elements of the same place: whole tensors as flat memory, a tile at a time.
#pragma once

#include <cstdint>

#include "common/low_precision.h"
#include "common/macros.h"
#include "common/tensors.h"
#include "cpu/levels.h"
#include "cpu/rows.h"

namespace lfm_fast {

// What lies in memory for each type of element, and its value.
template <Element element>
struct Stored {
  using Type = uint16_t;
  static LFM_HD float load(uint16_t value) {
    return element == Element::bfloat16 ? bfloat16_to_float(value) : float16_to_float(value);
  }
  static LFM_HD uint16_t store(float value) {
    return element == Element::bfloat16 ? float_to_bfloat16(value) : float_to_float16(value);
  }
};

template <>
struct Stored<Element::float32> {
  using Type = float;
  static LFM_HD float load(float value) { return value; }
  static LFM_HD float store(float value) { return value; }
};

template <Element element>
LFM_HD void widen_tile(float* __restrict to, const typename Stored<element>::Type* __restrict from, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = Stored<element>::load(from[j]);
}

template <Element element>
LFM_HD void narrow_tile(typename Stored<element>::Type* __restrict to, const float* __restrict from, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = Stored<element>::store(from[j]);
}

// out_j = Function::of(x_j), or Function::of(x_j, other_j) where there is an `other`.
template <typename Function, Element element>
struct Elementwise {
  using Type = typename Stored<element>::Type;
  const Type *x, *other;
  Type* out;
  int64_t count;

  int64_t items() const { return (count + kChunk - 1) / kChunk; }

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    const int64_t end = std::min(last * kChunk, count);
    for (int64_t start = first * kChunk; start < end; start += kTile) tile(start, std::min(kTile, end - start));
  }

  LFM_HD void tile(int64_t start, int64_t n) const {
    if constexpr (element == Element::float32) {
      compute(out + start, x + start, other + start, n);
    } else {
      // three loops over a tile in the innermost cache: compilers give up on one that mixes the widths of its elements
      TileBuffer values, others, results;
      widen_tile<element>(values.values, x + start, n);
      if constexpr (Function::kInputs == 2) widen_tile<element>(others.values, other + start, n);
      compute(results.values, values.values, others.values, n);
      narrow_tile<element>(out + start, results.values, n);
    }
  }

  static LFM_HD void compute(float* __restrict to, const float* __restrict a, const float* __restrict b, int64_t n) {
    if constexpr (Function::kInputs == 1) {
      for (int64_t j = 0; j < n; ++j) to[j] = Function::of(a[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) to[j] = Function::of(a[j], b[j]);
    }
  }
};

template <typename Function, Element element>
void run_elementwise(const Tensor& x, const Tensor* other, Tensor& out) {
  using Type = typename Stored<element>::Type;
  const Elementwise<Function, element> kernel{static_cast<const Type*>(x.const_data_ptr()),
                                              other ? static_cast<const Type*>(other->const_data_ptr()) : nullptr,
                                              static_cast<Type*>(out.mutable_data_ptr()), x.numel()};
  run_kernel(kernel, kernel.items(), std::max<int64_t>(1, (1 << 14) / kChunk));
}

// Over contiguous tensors of one shape and type.
template <typename Function>
void run_elementwise(const Tensor& x, const Tensor* other, Tensor& out) {
  switch (element_of(x, "x")) {
    case Element::float32: return run_elementwise<Function, Element::float32>(x, other, out);
    case Element::bfloat16: return run_elementwise<Function, Element::bfloat16>(x, other, out);
    case Element::float16: return run_elementwise<Function, Element::float16>(x, other, out);
  }
}

}  // namespace lfm_fast

// Rows of samples and tables of per-sample numbers in device memory, as kernels see them: four elements at a time.
//
// Four is the length of a 16-byte vector of float32 and of a block of the noise. A thread takes four neighbouring
// elements, its neighbour the next four, so that every access of a warp is one contiguous run: 16 bytes a thread of
// float32, 8 of bfloat16 or float16. Twice as many elements would make 16 bytes of a 16-bit type too, but cut each
// float32 access beside it (state, target, result) into two of which every second half is skipped.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "common/chunks.h"
#include "common/low_precision.h"
#include "common/philox.h"
#include "common/tensors.h"
#include "cuda/device.h"

namespace lfm_fast {

constexpr int kQuad = 4;
constexpr int kQuadsPerThread = static_cast<int>(kChunk) / (kQuad * kThreads);
constexpr int kInFlight = 2;  // quads that a thread loads before it uses the first: enough to keep the memory busy
static_assert(kQuadsPerThread * kQuad * kThreads == kChunk && kQuadsPerThread % kInFlight == 0);

// The i-th quad of a thread within a chunk of n elements: where it starts, and how many of its elements there are.
LFM_DEVICE int quad_start(int thread, int i) { return kQuad * (thread + kThreads * i); }
LFM_DEVICE int quad_size(int start, int64_t n) {
  const int64_t left = n - start;
  return left <= 0 ? 0 : left < kQuad ? static_cast<int>(left) : kQuad;
}

struct alignas(16) Quad32 {
  float values[kQuad];
};
struct alignas(8) Quad16 {
  uint16_t values[kQuad];
};

// A GPU faults on a vector that is not where a vector may be; a CPU would not notice.
template <typename Quad, typename T>
LFM_DEVICE const Quad& quad_at(const T* source) {
#if defined(LFM_EMULATED)
  LFM_CHECK(reinterpret_cast<uintptr_t>(source) % sizeof(Quad) == 0, "a vector must be aligned.");
#endif
  return *reinterpret_cast<const Quad*>(source);
}

// One access each. (A plain assignment is taken apart by nvcc, which finds the same four stores in the scalar path.)
LFM_DEVICE void store_vector(float* target, const Quad32& quad) {
#if defined(LFM_EMULATED)
  const_cast<Quad32&>(quad_at<Quad32>(target)) = quad;
#else
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)),
               "f"(quad.values[0]), "f"(quad.values[1]), "f"(quad.values[2]), "f"(quad.values[3])
               : "memory");
#endif
}
LFM_DEVICE void store_vector(uint16_t* target, const Quad16& quad) {
#if defined(LFM_EMULATED)
  const_cast<Quad16&>(quad_at<Quad16>(target)) = quad;
#else
  asm volatile("st.global.v4.u16 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)),
               "h"(quad.values[0]), "h"(quad.values[1]), "h"(quad.values[2]), "h"(quad.values[3])
               : "memory");
#endif
}

LFM_DEVICE uint16_t float_to_element(float value, Element element) {
  return element == Element::bfloat16 ? float_to_bfloat16(value) : float_to_float16(value);
}

// Four elements as they lie in memory: a word each of float32, two to a word of a 16-bit type. A thread fetches all it
// needs before it unpacks any: unpacking waits for the memory, and what is fetched after it would wait with it.
struct Packed {
  uint32_t words[kQuad];
};
struct alignas(8) Words16 {
  uint32_t words[kQuad / 2];
};

// `count` elements at `data`, zeros after them. `vector`: a full quad may be read in one access.
LFM_DEVICE Packed fetch_quad(const void* data, int64_t at, int count, Element element, bool vector) {
  Packed packed = {};
  if (element == Element::float32) {
    const float* source = static_cast<const float*>(data) + at;
    if (vector && count == kQuad) {
      const Quad32 quad = quad_at<Quad32>(source);
      LFM_UNROLL
      for (int j = 0; j < kQuad; ++j) packed.words[j] = std::bit_cast<uint32_t>(quad.values[j]);
    } else {
      LFM_UNROLL
      for (int j = 0; j < kQuad; ++j)
        if (j < count) packed.words[j] = std::bit_cast<uint32_t>(source[j]);
    }
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(data) + at;
    if (vector && count == kQuad) {
      const Words16 pairs = quad_at<Words16>(source);
      packed.words[0] = pairs.words[0];
      packed.words[1] = pairs.words[1];
    } else {
      LFM_UNROLL
      for (int j = 0; j < kQuad; ++j)
        if (j < count) packed.words[j / 2] |= static_cast<uint32_t>(source[j]) << (16 * (j % 2));
    }
  }
  return packed;
}

LFM_DEVICE void unpack(const Packed& packed, Element element, float (&out)[kQuad]) {
  const auto half = [&](int j) { return static_cast<uint16_t>(packed.words[j / 2] >> (16 * (j % 2))); };
  if (element == Element::float32) {
    LFM_UNROLL
    for (int j = 0; j < kQuad; ++j) out[j] = std::bit_cast<float>(packed.words[j]);
  } else if (element == Element::bfloat16) {
    LFM_UNROLL
    for (int j = 0; j < kQuad; ++j) out[j] = bfloat16_to_float(half(j));
  } else {
    LFM_UNROLL
    for (int j = 0; j < kQuad; ++j) out[j] = float16_to_float(half(j));
  }
}

LFM_DEVICE void store_quad(void* data, int64_t at, int count, Element element, bool vector,
                           const float (&values)[kQuad]) {
  if (element == Element::float32) {
    float* target = static_cast<float*>(data) + at;
    if (vector && count == kQuad) {
      Quad32 quad;
      LFM_UNROLL
      for (int j = 0; j < kQuad; ++j) quad.values[j] = values[j];
      store_vector(target, quad);
    } else {
      LFM_UNROLL
      for (int j = 0; j < kQuad; ++j)
        if (j < count) target[j] = values[j];
    }
  } else {
    uint16_t* target = static_cast<uint16_t*>(data) + at;
    Quad16 quad;
    LFM_UNROLL
    for (int j = 0; j < kQuad; ++j) quad.values[j] = float_to_element(values[j], element);
    if (vector && count == kQuad) {
      store_vector(target, quad);
    } else {
      LFM_UNROLL
      for (int j = 0; j < kQuad; ++j)
        if (j < count) target[j] = quad.values[j];
    }
  }
}

inline int64_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

inline bool is_aligned(const void* data, Element element) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(kQuad * bytes_of(element)) == 0;
}

// Rows of dense samples. `start` is a multiple of four.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
  Element element = Element::float32;
  bool vector = false;

  LFM_DEVICE bool given() const { return data != nullptr; }
  LFM_DEVICE Packed fetch(int64_t sample, int64_t start, int count) const {
    return fetch_quad(data, sample * stride + start, count, element, vector);
  }
  LFM_DEVICE void unpack(const Packed& packed, float (&out)[kQuad]) const { lfm_fast::unpack(packed, element, out); }
};

struct OutputRows {
  void* data = nullptr;
  int64_t stride = 0;
  Element element = Element::float32;
  bool vector = false;

  LFM_DEVICE bool given() const { return data != nullptr; }
  LFM_DEVICE void store(int64_t sample, int64_t start, int count, const float (&values)[kQuad]) const {
    store_quad(data, sample * stride + start, count, element, vector, values);
  }
};

// The rule of the CPU library: samples whose elements lie side by side are read in place, others from a copy.
inline Rows rows_of(Device& device, const Tensor& tensor, const char* name) {
  device.check(tensor, name);
  check_batched(tensor, name);
  const Element element = element_of(tensor, name);
  const Tensor dense = rows_are_dense(tensor) ? tensor : device.keep(torch::stable::contiguous(tensor));
  const void* data = dense.const_data_ptr();
  const int64_t stride = dense.stride(0);
  return {data, stride, element, is_aligned(data, element) && (dense.size(0) <= 1 || stride % kQuad == 0)};
}

inline OutputRows output_rows(const Tensor& tensor, const char* name) {
  const Element element = element_of(tensor, name);
  void* data = tensor.mutable_data_ptr();
  const int64_t stride = elements_per_sample(tensor);
  return {data, stride, element, is_aligned(data, element) && (tensor.size(0) <= 1 || stride % kQuad == 0)};
}

// A (rows,) or (rows, columns) table of numbers, any strides. It stays where it is: the host never reads it.
template <typename T>
struct Table {
  const T* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;

  LFM_DEVICE bool given() const { return data != nullptr; }
  LFM_DEVICE T at(int64_t row, int64_t column = 0) const { return data[row * row_stride + column * column_stride]; }
};

template <typename T>
Table<T> table_of(Device& device, const Tensor& tensor, const char* name, ScalarType dtype,
                  const std::vector<int64_t>& shape) {
  device.check(tensor, name);
  check_table(tensor, name, dtype, shape);
  return {tensor.const_data_ptr<T>(), tensor.stride(0), shape.size() > 1 ? tensor.stride(1) : 0};
}

inline Table<float> floats_of(Device& device, const Tensor& tensor, const char* name,
                              const std::vector<int64_t>& shape) {
  return table_of<float>(device, tensor, name, ScalarType::Float, shape);
}

// The noise of a call: a seed, a stream and the samples' indices.
struct Noise {
  Table<int64_t> index;
  int64_t seed = 0, stream = 0, offset = 0;

  LFM_DEVICE bool given() const { return index.given(); }
  LFM_DEVICE PhiloxKey key(int64_t sample) const { return philox_key(seed, stream, index.at(sample)); }
  LFM_DEVICE void quad(const PhiloxKey& key, int64_t start, float (&out)[kQuad]) const {
    normal_block(static_cast<uint32_t>(offset + start / kQuad), key, out);
  }
};

inline Noise noise_of(Device& device, const Tensor& index, int64_t samples, int64_t seed, int64_t stream,
                      int64_t offset) {
  return {table_of<int64_t>(device, index, "index", ScalarType::Long, {samples}), seed, stream, offset};
}

}  // namespace lfm_fast

// Channels in groups: what the kernels of group_norm_silu share.
//
// There are two layouts. With positions innermost (contiguous) a group of a sample is one run of memory, a slab, cut
// into chunks of at most 4096 elements. With channels innermost (channels_last) the slab is a whole sample, cut into
// chunks of 64 positions or, forward on large maps, 256. Sums are made chunk by chunk in float32 and added up in double,
// in order: chunks are constants of the definition, so any number of threads gives the same bits.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/elementwise.h"

namespace lfm_fast {

constexpr int64_t kPositions = 64;  // of a chunk where channels are innermost

struct GroupShape {
  int64_t samples, channels, groups, positions;
  bool channels_innermost;

  int64_t group_size() const { return channels / groups; }
  int64_t group_elements() const { return group_size() * positions; }
  int64_t elements() const { return samples * channels * positions; }
  int64_t slabs() const { return channels_innermost ? samples : samples * groups; }
  int64_t slab_elements() const { return channels_innermost ? channels * positions : group_elements(); }
  // What a mean over a group is divided by; a group without elements has mean 0.
  double count() const { return static_cast<double>(std::max<int64_t>(group_elements(), 1)); }
};

inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t i : {1, 3, 2, 0}) {
    if (x.size(i) != 1 && x.stride(i) != expected) return false;
    expected *= x.size(i);
  }
  return true;
}

inline GroupShape group_shape(const Tensor& x, int64_t num_groups) {
  LFM_CHECK(x.dim() >= 2, "x must have channels, (B, C, ...), got ", shape_text(x), ".");
  LFM_CHECK(num_groups >= 1 && x.size(1) % num_groups == 0, "num_groups must be a positive divisor of the ", x.size(1),
            " channels, got ", num_groups, ".");
  int64_t positions = 1;
  for (int64_t i = 2; i < x.dim(); ++i) positions *= x.size(i);
  return {x.size(0), x.size(1), num_groups, positions, positions == 1 || is_channels_last(x)};
}

// x itself if its layout is one of the two, else a contiguous copy.
inline Tensor in_group_layout(const Tensor& x) {
  return x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x);
}

// A fresh tensor of x's shape and type, in channels_last where x is.
inline Tensor empty_in_layout_of(const Tensor& x) {
  if (!is_channels_last(x)) return new_tensor(shape_of(x), x.scalar_type());
  const std::vector<int64_t> shape = shape_of(x);
  const int64_t channels = shape[1], height = shape[2], width = shape[3];
  const std::vector<int64_t> strides = {channels * height * width, 1, channels * width, channels};
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(x.scalar_type()));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// weight or bias in float32, or `otherwise` for every channel.
inline std::vector<float> channel_values(const std::optional<Tensor>& values, const char* name, int64_t channels,
                                         float otherwise) {
  std::vector<float> out(static_cast<size_t>(channels), otherwise);
  if (!values) return out;
  check_on_cpu(*values, name);
  const Element element = element_of(*values, name);
  LFM_CHECK(values->dim() == 1 && values->size(0) == channels, name, " must have shape (", channels, ",), got ",
            shape_text(*values), ".");
  const void* data = values->const_data_ptr();
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t at = c * values->stride(0);
    const uint16_t* low = static_cast<const uint16_t*>(data);
    float& value = out[static_cast<size_t>(c)];
    switch (element) {
      case Element::float32: value = static_cast<const float*>(data)[at]; break;
      case Element::bfloat16: value = bfloat16_to_float(low[at]); break;
      case Element::float16: value = float16_to_float(low[at]); break;
    }
  }
  return out;
}

// A kernel over slabs has three stages. Done slab by slab, the last finds in the cache what the first has read; where
// there are too few slabs for the threads, each stage goes over all chunks.
//   measure<level>(slab, chunk, scratch), finish(slab), apply<level>(slab, chunk, scratch)
enum class Stages { all, measuring, applying };

// Which of them is asked while it runs, so that each is compiled once: an item is a slab, or a chunk of one.
template <typename Kernel>
struct OverSlabs {
  const Kernel& kernel;
  Stages stages;

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    const bool whole = stages == Stages::all;
    const int64_t chunks = kernel.chunks();
    typename Kernel::Scratch scratch(kernel.shape, whole);
    for (int64_t item = first; item < last;) {
      const int64_t slab = whole ? item : item / chunks, begin = whole ? 0 : item % chunks;
      const int64_t end = whole ? chunks : std::min(chunks, begin + last - item);
      if (stages != Stages::applying)
        for (int64_t chunk = begin; chunk < end; ++chunk) kernel.template measure<level>(slab, chunk, scratch);
      if (whole) kernel.finish(slab);
      if (stages != Stages::measuring)
        for (int64_t chunk = begin; chunk < end; ++chunk) kernel.template apply<level>(slab, chunk, scratch);
      item += whole ? 1 : end - begin;
    }
  }
};

template <typename Kernel>
void run_stages(const Kernel& kernel) {
  constexpr int64_t worth_a_thread = 1 << 14;
  const int64_t slabs = kernel.shape.slabs(), chunks = kernel.chunks(), elements = kernel.shape.slab_elements();
  const auto grain = [](int64_t of_item) {
    return std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, of_item));
  };
  const auto run = [&](Stages stages, int64_t count, int64_t of_item) {
    run_kernel(OverSlabs<Kernel>{kernel, stages}, count, grain(of_item));
  };
  if (chunks <= 1 || slabs >= 2 * static_cast<int64_t>(torch::stable::get_num_threads()))
    return run(Stages::all, slabs, elements);
  run(Stages::measuring, slabs * chunks, elements / chunks);
  for (int64_t slab = 0; slab < slabs; ++slab) kernel.finish(slab);
  run(Stages::applying, slabs * chunks, elements / chunks);
}

// Elements of a tensor as float32: where they lie, or converted into `buffer`.
template <Element element>
LFM_HD const float* as_float(const typename Stored<element>::Type* from, float* buffer, int64_t n) {
  if constexpr (element == Element::float32) {
    return from;
  } else {
    widen_tile<element>(buffer, from, n);
    return buffer;
  }
}

}  // namespace lfm_fast

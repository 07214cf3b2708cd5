// adamw_ema: AdamW, the moving average and the low-precision copy of many tensors, in one parallel pass over all of
// them.
#include <optional>
#include <vector>

#include "common/adamw.h"
#include "common/registration.h"
#include "cpu/elementwise.h"

namespace lfm_fast {
namespace {

constexpr int64_t kStep = 64;    // elements between two requests for memory
constexpr int64_t kAhead = 256;  // elements from a request to its use

// One tensor's memory, from its first block on in the sequence of all tensors' blocks.
struct Slice {
  int64_t first_block, count;
  float *p, *m, *v, *averaged;  // averaged: null for none
  const void* gradient;
  void* low;  // null for none
  Element gradient_type, low_type;
};

struct AdamWEma {
  std::vector<Slice> slices;
  int64_t blocks;
  AdamW step;

  // A block is a tile of one tensor: threads get equal shares of them whether they lie in one tensor or in a thousand.
  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    size_t i = slice_of(first);
    for (int64_t block = first; block < last; ++i) {
      const Slice& slice = slices[i];
      const int64_t end = std::min((last - slice.first_block) * kTile, slice.count);
      for (int64_t start = (block - slice.first_block) * kTile; start < end; start += kStep) {
        fetch(slice, start + kAhead);
        update(slice, start, std::min(kStep, end - start));
      }
      block = i + 1 < slices.size() ? slices[i + 1].first_block : last;
    }
  }

  size_t slice_of(int64_t block) const {
    const auto after = std::upper_bound(slices.begin(), slices.end(), block,
                                        [](int64_t b, const Slice& slice) { return b < slice.first_block; });
    return static_cast<size_t>(after - slices.begin()) - 1;
  }

  // Asks for what comes next of every stream: the processor's own prefetcher starts anew in each page of each of them,
  // and there are five to nine.
  static LFM_HD void fetch(const Slice& slice, int64_t start) {
    if (start + kStep > slice.count) return;
    for (const float* stream : {slice.p, slice.m, slice.v, slice.averaged})
      for (int64_t j = 0; j < kStep && stream != nullptr; j += 16) __builtin_prefetch(stream + start + j);
    const int64_t width = slice.gradient_type == Element::float32 ? 4 : 2;
    const char* gradient = static_cast<const char*>(slice.gradient) + start * width;
    for (int64_t byte = 0; byte < kStep * width; byte += 64) __builtin_prefetch(gradient + byte);
  }

  LFM_HD void update(const Slice& slice, int64_t start, int64_t n) const {
    alignas(64) float widened[kStep];
    const float* __restrict gradient = widened;
    if (slice.gradient_type == Element::float32)
      gradient = static_cast<const float*>(slice.gradient) + start;
    else
      widen_tile<Element::bfloat16>(widened, static_cast<const uint16_t*>(slice.gradient) + start, n);
    float* __restrict p = slice.p + start;
    float* __restrict m = slice.m + start;
    float* __restrict v = slice.v + start;
    const AdamW w = step;
    if (slice.averaged == nullptr) {
      for (int64_t j = 0; j < n; ++j) adamw_element(w, gradient[j], p[j], m[j], v[j]);
    } else {
      float* __restrict averaged = slice.averaged + start;
      for (int64_t j = 0; j < n; ++j) {
        adamw_element(w, gradient[j], p[j], m[j], v[j]);
        averaged[j] = averaged_element(w, averaged[j], p[j]);
      }
    }
    if (slice.low == nullptr) return;
    uint16_t* low = static_cast<uint16_t*>(slice.low) + start;
    if (slice.low_type == Element::bfloat16)
      narrow_tile<Element::bfloat16>(low, p, n);
    else
      narrow_tile<Element::float16>(low, p, n);
  }
};

const Tensor& beside(const std::vector<Tensor>& tensors, size_t i, const char* name, const Tensor& parameter) {
  check_on_cpu(tensors[i], name);
  check_same_shape(tensors[i], name, parameter, "its parameter");
  LFM_CHECK(same_strides(tensors[i], parameter), "a tensor of ", name, " must have its parameter's strides.");
  return tensors[i];
}

float* changed(const std::vector<Tensor>& tensors, size_t i, const char* name, const Tensor& parameter) {
  const Tensor& tensor = beside(tensors, i, name, parameter);
  check_dtype(tensor, name, ScalarType::Float);
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// All that the slices read and change; their tensors fill their memory.
std::vector<Memory> memory_of(const std::vector<Slice>& slices) {
  std::vector<Memory> memory;
  const auto add = [&memory](const void* data, int64_t bytes, bool changed) {
    const char* begin = static_cast<const char*>(data);
    if (data != nullptr) memory.push_back({begin, begin + bytes, changed});
  };
  for (const Slice& slice : slices) {
    for (const float* data : {slice.p, slice.m, slice.v, slice.averaged}) add(data, slice.count * 4, true);
    add(slice.low, slice.count * 2, true);
    add(slice.gradient, slice.count * (slice.gradient_type == Element::float32 ? 4 : 2), false);
  }
  return memory;
}

void check_count(const std::vector<Tensor>& tensors, const char* name, size_t count) {
  LFM_CHECK(tensors.size() == count, name, " must hold ", count, " tensors, got ", tensors.size(), ".");
}

void adamw_ema(const Tensor& schedule, const std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients,
               const std::vector<Tensor>& exp_avg, const std::vector<Tensor>& exp_avg_sq,
               const std::vector<Tensor>& averaged, const std::vector<Tensor>& low, double beta1, double beta2,
               double eps, double weight_decay, const std::optional<Tensor>& gradient_scale) {
  const std::vector<double> scheduled = read_table<double>(schedule, "schedule", ScalarType::Double, {3});
  float scale = 1.0f;
  if (gradient_scale) {
    check_on_cpu(*gradient_scale, "gradient_scale");
    check_table(*gradient_scale, "gradient_scale", ScalarType::Float, {});
    scale = *gradient_scale->const_data_ptr<float>();
  }
  AdamWEma kernel{
      {}, 0, adamw_of(scheduled[0], scheduled[1], scheduled[2], beta1, beta2, eps, weight_decay, scale)};
  const size_t count = parameters.size();
  check_count(gradients, "gradients", count);
  check_count(exp_avg, "exp_avg", count);
  check_count(exp_avg_sq, "exp_avg_sq", count);
  if (!averaged.empty()) check_count(averaged, "averaged", count);
  if (!low.empty()) check_count(low, "low", count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = parameters[i];
    LFM_CHECK(fills_its_memory(p), "a tensor of parameters must fill its memory without gap or overlap.");
    Slice slice{kernel.blocks, p.numel(), changed(parameters, i, "parameters", p), changed(exp_avg, i, "exp_avg", p),
                changed(exp_avg_sq, i, "exp_avg_sq", p),
                averaged.empty() ? nullptr : changed(averaged, i, "averaged", p),
                beside(gradients, i, "gradients", p).const_data_ptr(), nullptr, element_of(gradients[i], "gradients"),
                Element::bfloat16};
    LFM_CHECK(slice.gradient_type != Element::float16, "gradients must be float32 or bfloat16, got float16.");
    if (!low.empty()) {
      slice.low_type = element_of(low[i], "low");
      LFM_CHECK(slice.low_type != Element::float32, "low must be bfloat16 or float16, got float32.");
      slice.low = beside(low, i, "low", p).mutable_data_ptr();
    }
    if (slice.count == 0) continue;
    kernel.blocks += (slice.count + kTile - 1) / kTile;
    kernel.slices.push_back(slice);
  }
  check_apart(memory_of(kernel.slices));
  run_kernel(kernel, kernel.blocks, (1 << 14) / kTile);
}

}  // namespace

LFM_REGISTER(CPU, adamw_ema, adamw_ema);

}  // namespace lfm_fast

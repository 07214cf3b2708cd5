// adamw_ema: AdamW, the moving average and the low-precision copy of many tensors, in one launch.
#include <array>
#include <utility>

#include <torch/csrc/stable/ops.h>

#include "common/adamw.h"
#include "cuda/device.h"
#include "cuda/rows.h"

namespace lfm_fast {
namespace {

// The tensors of one parameter, all in the same order in memory.
struct Entry {
  float* parameter;
  const void* gradient;
  float *exp_avg, *exp_avg_sq, *averaged;  // averaged and low may be null
  void* low;
  int64_t elements;
  uint32_t first;  // chunk of the launch
  uint8_t gradient_element, low_element, vector;
};

// The table travels as a kernel parameter, of which there are 32,764 bytes from CUDA 12.1 on: a captured graph holds it,
// and no copy to the device has to be waited for.
constexpr int kMostTensors = 500;

struct AdamWEma {
  struct Shared {
    AdamW step;
  };
  static constexpr int64_t kMostBlocks = 4096;  // few: each works out the powers of the bias corrections once

  Table<double> schedule;  // learning rate, step, decay of the average
  double beta1, beta2, eps, weight_decay;
  const float* gradient_scale;  // or null
  int tensors;
  int64_t chunks;
  Entry entries[kMostTensors];

  LFM_DEVICE void begin(Shared& shared, const Threads& threads) const {
    threads.each([&](int thread) {
      if (thread != 0) return;
      const float scale = gradient_scale == nullptr ? 1.0f : *gradient_scale;
      shared.step = adamw_of(schedule.at(0), schedule.at(1), schedule.at(2), beta1, beta2, eps, weight_decay, scale);
    });
  }

  LFM_DEVICE void item(int64_t item, Shared& shared, const Threads& threads) const {
    const Entry& entry = entries[find(item)];
    const int64_t begin = (item - entry.first) * kChunk, n = entry.elements - begin;
    threads.independently([&](int thread) {
      const AdamW step = shared.step;
      for (int i = 0; i < kQuadsPerThread; ++i) {
        const int start = quad_start(thread, i), count = quad_size(start, n);
        if (count == 0) return;
        quad(step, entry, begin + start, count);
      }
    });
  }

  // The last entry whose first chunk is not after `item`.
  LFM_DEVICE int find(int64_t item) const {
    int low = 0, high = tensors;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (entries[middle].first <= item)
        low = middle;
      else
        high = middle;
    }
    return low;
  }

  LFM_DEVICE static void quad(const AdamW& step, const Entry& entry, int64_t at, int count) {
    constexpr Element full = Element::float32;
    const bool vector = entry.vector != 0;
    float p[kQuad], g[kQuad], m[kQuad], v[kQuad], average[kQuad];
    const Element of_gradient = static_cast<Element>(entry.gradient_element);
    const Packed gradient = fetch_quad(entry.gradient, at, count, of_gradient, vector);
    const Packed parameter = fetch_quad(entry.parameter, at, count, full, vector);
    const Packed exp_avg = fetch_quad(entry.exp_avg, at, count, full, vector);
    const Packed exp_avg_sq = fetch_quad(entry.exp_avg_sq, at, count, full, vector);
    if (entry.averaged != nullptr) unpack(fetch_quad(entry.averaged, at, count, full, vector), full, average);
    unpack(gradient, of_gradient, g);
    unpack(parameter, full, p);
    unpack(exp_avg, full, m);
    unpack(exp_avg_sq, full, v);
    LFM_UNROLL
    for (int j = 0; j < kQuad; ++j) adamw_element(step, g[j], p[j], m[j], v[j]);
    store_quad(entry.parameter, at, count, full, vector, p);
    store_quad(entry.exp_avg, at, count, full, vector, m);
    store_quad(entry.exp_avg_sq, at, count, full, vector, v);
    if (entry.averaged != nullptr) {
      LFM_UNROLL
      for (int j = 0; j < kQuad; ++j) average[j] = averaged_element(step, average[j], p[j]);
      store_quad(entry.averaged, at, count, full, vector, average);
    }
    if (entry.low != nullptr) store_quad(entry.low, at, count, static_cast<Element>(entry.low_element), vector, p);
  }
};
static_assert(sizeof(AdamWEma) + sizeof(int64_t) <= 32764);

using Lists = std::array<const std::vector<Tensor>*, 6>;
constexpr const char* kNames[] = {"parameters", "gradients", "exp_avg", "exp_avg_sq", "averaged", "low"};
constexpr size_t kGradients = 1, kLow = 5;

void check_lists(const Device& device, const Lists& lists) {
  const std::vector<Tensor>& parameters = *lists[0];
  std::vector<Memory> memory;
  for (size_t k = 0; k < lists.size(); ++k) {
    const std::vector<Tensor>& list = *lists[k];
    if (k >= 4 && list.empty()) continue;
    LFM_CHECK(list.size() == parameters.size(), kNames[k], " holds ", list.size(), " tensors and parameters ",
              parameters.size(), ": give one for each.");
    for (size_t i = 0; i < list.size(); ++i) {
      device.check(list[i], kNames[k]);
      check_same_shape(list[i], kNames[k], parameters[i], "its parameter");
      const ScalarType dtype = list[i].scalar_type();
      const bool half = dtype == ScalarType::BFloat16 || (k == kLow && dtype == ScalarType::Half);
      const bool fits = k == kLow ? half : dtype == ScalarType::Float || (k == kGradients && half);
      LFM_CHECK(fits, kNames[k], " cannot be ", dtype_name(dtype), ".");
      memory.push_back(memory_of(list[i], k != kGradients));
    }
  }
  check_apart(std::move(memory));
}

// Copies of strided tensors: worked on in their place, then copied back.
using CopiesBack = std::vector<std::pair<Tensor, Tensor>>;

Entry entry_of(Device& device, const Lists& lists, size_t i, CopiesBack& back) {
  const Tensor& parameter = (*lists[0])[i];
  bool alike = fills_its_memory(parameter);
  for (const auto* list : lists)
    if (!list->empty()) alike = alike && same_strides((*list)[i], parameter);
  std::array<void*, 6> data = {};
  bool vector = true;
  for (size_t k = 0; k < lists.size(); ++k) {
    if (lists[k]->empty()) continue;
    const Tensor& given = (*lists[k])[i];
    const bool in_place = alike || given.is_contiguous();
    const Tensor used = in_place ? given : device.keep(torch::stable::contiguous(given));
    if (!in_place && k != kGradients) back.emplace_back(given, used);
    data[k] = k == kGradients ? const_cast<void*>(used.const_data_ptr()) : used.mutable_data_ptr();
    vector = vector && is_aligned(data[k], element_of(used, kNames[k]));
  }
  const auto element = [&](size_t k) {
    return static_cast<uint8_t>(lists[k]->empty() ? Element::float32 : element_of((*lists[k])[i], kNames[k]));
  };
  const auto floats = [&](size_t k) { return static_cast<float*>(data[k]); };
  return {floats(0), data[kGradients], floats(2),           floats(3),     floats(4), data[kLow],
          parameter.numel(), 0,        element(kGradients), element(kLow), vector};
}

void adamw_ema(const Tensor& schedule, const std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients,
               const std::vector<Tensor>& exp_avg, const std::vector<Tensor>& exp_avg_sq,
               const std::vector<Tensor>& averaged, const std::vector<Tensor>& low, double beta1, double beta2,
               double eps, double weight_decay, const std::optional<Tensor>& gradient_scale) {
  Device device("adamw_ema", schedule, "schedule");
  const Lists lists = {&parameters, &gradients, &exp_avg, &exp_avg_sq, &averaged, &low};
  check_lists(device, lists);
  AdamWEma kernel{};
  kernel.schedule = table_of<double>(device, schedule, "schedule", ScalarType::Double, {3});
  kernel.beta1 = beta1, kernel.beta2 = beta2, kernel.eps = eps, kernel.weight_decay = weight_decay;
  if (gradient_scale) {
    device.check(*gradient_scale, "gradient_scale");
    check_table(*gradient_scale, "gradient_scale", ScalarType::Float, {});
    kernel.gradient_scale = gradient_scale->const_data_ptr<float>();
  }
  CopiesBack back;
  const auto flush = [&] {
    device.launch(kernel, kernel.chunks);
    kernel.tensors = 0, kernel.chunks = 0;
  };
  for (size_t i = 0; i < parameters.size(); ++i) {
    const int64_t chunks = (parameters[i].numel() + kChunk - 1) / kChunk;
    if (chunks == 0) continue;
    if (kernel.tensors == kMostTensors || kernel.chunks + chunks > UINT32_MAX) flush();
    Entry entry = entry_of(device, lists, i, back);
    entry.first = static_cast<uint32_t>(kernel.chunks);
    kernel.entries[kernel.tensors++] = entry;
    kernel.chunks += chunks;
  }
  flush();
  for (auto& [given, used] : back) torch::stable::copy_(given, used);
}

}  // namespace

LFM_REGISTER_CUDA(adamw_ema, adamw_ema);

}  // namespace lfm_fast

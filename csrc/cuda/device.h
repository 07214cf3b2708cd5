// The few words of CUDA that our kernels use, and their stand-ins for a machine without a GPU.
//
// A kernel is a struct of plain values with
//     Shared                     a struct of what a block's threads exchange
//     kMostBlocks                the largest grid; beyond it, blocks take several items in turn
//     item(item, shared, threads) const
//     begin(shared, threads) const    optional: what a block does once, before its first item
// One block of kThreads threads does an item. Where threads exchange something, `item` is cut into phases by
// threads.each, which ends with a barrier: no result of one thread is read by another within a phase. Nothing else of
// CUDA appears in a kernel. So with LFM_EMULATED defined any C++ compiler makes a library for CPU tensors of the very
// same sources, in which blocks and threads are loops: all index arithmetic, every reduction's order and every access
// are tested, and watched by sanitizers, without a GPU.
//
// Both are compiled without contraction to fused multiply-adds (-fmad=false), so that noise and sums equal the CPU
// library's to the bit. That costs nothing: every kernel here waits for memory, except pure noise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"
#include "common/registration.h"
#include "common/tensors.h"

#if defined(LFM_EMULATED)
#include <cstring>
#include <memory>
#define LFM_DEVICE inline __attribute__((always_inline))
#define LFM_UNROLL
#define LFM_REGISTER_CUDA(name, function) LFM_REGISTER_IN(lfm_fast_emulated, CPU, name, function)
#else
#include <cuda_runtime.h>
#define LFM_DEVICE __device__ __forceinline__
#define LFM_UNROLL _Pragma("unroll")
#define LFM_REGISTER_CUDA(name, function) LFM_REGISTER(CUDA, name, function)
#endif

namespace lfm_fast {

constexpr int kThreads = 256;
constexpr int64_t kManyBlocks = 1 << 16;

struct NothingShared {};

#if defined(LFM_EMULATED)

// What a test may choose: no result may depend on either. Order 0 is first to last, 1 last to first, 2 neither.
struct Emulation {
  int order = 0;
  int64_t most_blocks = kManyBlocks;
};
Emulation& emulation();

struct Threads {
  template <typename Body>
  void each(const Body& body) const {
    const int order = emulation().order;
    for (int i = 0; i < kThreads; ++i)
      body(order == 0 ? i : order == 1 ? kThreads - 1 - i : static_cast<int>(i * 97 % kThreads));
  }
  template <typename Body>
  void independently(const Body& body) const {
    each(body);
  }
};

// Where an op's tensors are. (The emulation's: the CPU.)
class Device {
 public:
  Device(const char* op, const Tensor& first, const char* name) : op_(op) { check(first, name); }

  void check(const Tensor& tensor, const char* name) const {
    LFM_CHECK(tensor.is_cpu(), name, " must be on the CPU, where CUDA is emulated.");
  }

  // Filled with NaN, so that a place left out shows.
  Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) const {
    Tensor fresh = empty_tensor(shape, dtype, aoti_torch_device_type_cpu(), 0);
    if (fresh.numel() > 0)
      std::memset(fresh.mutable_data_ptr(), 0xff, static_cast<size_t>(fresh.numel()) * fresh.element_size());
    return fresh;
  }

  template <typename Kernel>
  void launch(const Kernel& kernel, int64_t items) const {
    const int64_t blocks = std::min({items, Kernel::kMostBlocks, emulation().most_blocks});
    const auto shared = std::make_unique<typename Kernel::Shared>();
    for (int64_t i = 0; i < blocks; ++i) {
      std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(typename Kernel::Shared));
      if constexpr (requires { kernel.begin(*shared, Threads{}); }) kernel.begin(*shared, Threads{});
      const int64_t block = emulation().order == 0 ? i : blocks - 1 - i;
      for (int64_t item = block; item < items; item += blocks) kernel.item(item, *shared, Threads{});
    }
  }

  Tensor keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

 private:
  const char* op_;
  std::vector<Tensor> kept_;
};

#else

struct Threads {
  // body(thread), then all of the block wait for each other.
  template <typename Body>
  LFM_DEVICE void each(const Body& body) const {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  // body(thread), whose result no other thread of the block reads.
  template <typename Body>
  LFM_DEVICE void independently(const Body& body) const {
    body(static_cast<int>(threadIdx.x));
  }
};

template <typename Kernel>
__global__ void __launch_bounds__(kThreads) run_blocks(const __grid_constant__ Kernel kernel, const int64_t items) {
  __shared__ typename Kernel::Shared shared;
  if constexpr (requires { kernel.begin(shared, Threads{}); }) kernel.begin(shared, Threads{});
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) kernel.item(item, shared, Threads{});
}

// The device of an op's tensors, current while this lives, and its current stream. Copies made for the call are kept
// until its launches are queued; then the caching allocator may hand their memory on, to later work on this stream.
class Device {
 public:
  Device(const char* op, const Tensor& first, const char* name)
      : op_(op), index_(index_of(first, name)), guard_(index_) {
    // This library has a CUDA runtime of its own, linked in so that torch may bring another version: it is told too.
    check_status(cudaSetDevice(index_), "its device cannot be made current");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  void check(const Tensor& tensor, const char* name) const {
    LFM_CHECK(index_of(tensor, name) == index_, name, " must be on cuda:", index_,
              " like the other arguments; move it with .to(\"cuda:", index_, "\").");
  }

  Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) const {
    return empty_tensor(shape, dtype, aoti_torch_device_type_cuda(), index_);
  }

  template <typename Kernel>
  void launch(const Kernel& kernel, int64_t items) const {
    if (items == 0) return;
    const auto blocks = static_cast<unsigned>(std::min(items, Kernel::kMostBlocks));
    void* arguments[] = {const_cast<Kernel*>(&kernel), &items};
    check_status(cudaLaunchKernel(reinterpret_cast<const void*>(&run_blocks<Kernel>), dim3(blocks), dim3(kThreads),
                                  arguments, 0, stream_),
                 "its kernel cannot be launched");
  }

  Tensor keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

 private:
  static int32_t index_of(const Tensor& tensor, const char* name) {
    LFM_CHECK(tensor.is_cuda(), name, " must be on a CUDA device like the other arguments; move it with .to(\"cuda\").");
    return tensor.get_device_index();
  }

  void check_status(cudaError_t status, const char* what) const {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // said here, so the next call does not find it again
    refuse(op_, ": ", what, " on cuda:", index_, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status),
           ").");
  }

  const char* op_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::vector<Tensor> kept_;
};

#endif

}  // namespace lfm_fast

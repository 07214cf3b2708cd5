// The CUDA sources as a library for CPU tensors, torch.ops.lfm_fast_emulated (see cuda/device.h). Made by tests only.
#define LFM_EMULATED 1

#include "cuda/device.h"

namespace lfm_fast {

Emulation& emulation() {
  static Emulation choice;
  return choice;
}

}  // namespace lfm_fast

extern "C" __attribute__((visibility("default"))) void lfm_fast_emulate(int order, int64_t most_blocks) {
  lfm_fast::emulation() = {order, most_blocks};
}

#include "cuda/adamw_ema.cu"
#include "cuda/guided_step.cu"
#include "cuda/interpolate.cu"
#include "cuda/library.cu"
#include "cuda/philox_normal.cu"
#include "cuda/posterior_interpolate.cu"
#include "cuda/velocity_loss.cu"

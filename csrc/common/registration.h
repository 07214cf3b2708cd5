// LFM_REGISTER(CPU, name, function): hands a kernel to torch.ops.lfm_fast_cpp and notes its signature.
#pragma once

#include <torch/csrc/stable/library.h>

#include "common/signatures.h"

#define LFM_REGISTER(device, name, function)                                                              \
  STABLE_TORCH_LIBRARY_IMPL(lfm_fast_cpp, device, library) { library.impl(#name, TORCH_BOX(&function)); } \
  static const lfm_fast::SignatureLine signature_line_of_##name { lfm_fast::signature(#name, &function) }

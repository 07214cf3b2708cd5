// LFM_REGISTER(CPU, name, function): hands a kernel to torch.ops.lfm_fast_cpp and notes its signature.
#pragma once

#include <torch/csrc/stable/library.h>

#include "common/signatures.h"

// Every library has a namespace of operators of its own.
#define LFM_NAMESPACE_CPU lfm_fast_cpp
#define LFM_NAMESPACE_CUDA lfm_fast_cuda

#define LFM_REGISTER(device, name, function) LFM_REGISTER_IN(LFM_NAMESPACE_##device, device, name, function)

#define LFM_REGISTER_IN(operators, device, name, function)                                             \
  STABLE_TORCH_LIBRARY_IMPL(operators, device, library) { library.impl(#name, TORCH_BOX(&function)); } \
  static const lfm_fast::SignatureLine signature_line_of_##name { lfm_fast::signature(#name, &function) }

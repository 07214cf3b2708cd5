#!/usr/bin/env bash
# Training on a GPU beside what else one would train with: images/s, share of the products' ceiling, memory.
#   bash scripts/gpu_bench_train.sh [gate] [xl] [small] [base] [latents] [large] [images] [--output FILE.json]
# in this order where none is named, each part at most 8 minutes (35 in all); what matters most comes first in a part, so
# that time that runs out leaves out the rest:
#     gate     loss curves of 500 steps of DiT-S/2 in bf16, bf16-pure and fp8, within those of two seeds in PyTorch
#     xl       DiT-XL/2, 128 images a step: the library in bf16, with a CUDA graph, in fp8 and bf16-pure; PyTorch through
#              torch.compile (max-autotune-no-cudagraphs, its fastest attention, fused AdamW, foreach average), eager in
#              bf16, TF32 and float32; the reference path; diffusers' DiT where it is installed. Each in a process of its
#              own, its gradient held against float64 first
#     small, base, large   the same for DiT-S/2, B/2 and L/2
#     latents  what cached latents cost a step, from a table on the device and from files
#     images   JPEGs decoded and encoded: how long the VAE waits for them
# and, only where it is named: batches, 32 and 256 images a step of XL/2, S/2 and B/2.
# The libraries have to be built: `bash scripts/gpu_check.sh build`. The table comes last; a part that runs out of time
# keeps the lines it has. The result file goes to test-results/gpu (LFM_FAST_GPU_RESULTS names another folder) as
# DATE-DEVICE-training.json, to be kept under benchmarks/results/; `--table FILE.json` prints its table again.
# --smoke runs as little as there is of each part, on a CPU too: whether it all works. PYTHON names the interpreter; it
# finds packages in a folder, such as diffusers, through PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu_training "$@"

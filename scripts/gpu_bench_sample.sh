#!/usr/bin/env bash
# Sampling on a GPU beside what else one would sample with: latency of an image, images/s, time at equal error, VAE.
#   bash scripts/gpu_bench_sample.sh [latency] [throughput] [error] [vae] [start] [batches] [--output FILE.json]
# in this order where none is named, each part at most 9 minutes; what matters most comes first in a part, so that time
# that runs out leaves out the rest:
#     latency     one image, 25 guided Heun steps of DiT-XL/2 and S/2: p50 and p99 of an evaluation, all steps in one CUDA
#                 graph, in bf16 and fp8; PyTorch through torch.compile (max-autotune, its own CUDA graphs) and eager;
#                 lfm_fast.sample as it is; diffusers' DiT where it is installed. Each in a process of its own, its latents
#                 held against float64
#     throughput  64 images of DiT-XL/2, decoded by sd-vae's network
#     error       the flow that ships: our method against torchdiffeq's dopri5 at no larger error of a sample
#     vae         sd-vae's network in bf16: images encoded and decoded a second
#     start       fresh processes to the first training step and the first image, cold and warm
#     batches     graphs compiled again over batches of 1 to 64
# The libraries have to be built: `bash scripts/gpu_check.sh build`. The table comes last; a part that runs out of time
# keeps the lines it has. The result file goes to test-results/gpu (LFM_FAST_GPU_RESULTS names another folder) as
# DATE-DEVICE-sampling.json, to be kept under benchmarks/results/; `--table FILE.json` prints its table again.
# --smoke runs as little as there is of each part, on a CPU too: whether it all works. PYTHON names the interpreter; it
# finds packages in a folder, such as diffusers, through PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu_sampling "$@"

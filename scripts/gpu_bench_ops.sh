#!/usr/bin/env bash
# Every op on a GPU: how close to the memory's limit, how much faster than PyTorch and Inductor, right and repeatable.
#   bash scripts/gpu_bench_ops.sh [noise] [repeatable] [rows] [optimizer] [attention] [compiled] [--output FILE.json]
# in this order where none is named, about 23 minutes in all, each part at most 8:
#     noise       within 4 units in the last place of the CPU's, over 10^7 draws
#     repeatable  the same bits in every run
#     rows        each row at the shapes of DiT-XL, S, L and B, bf16 and fp32, forward and backward: share of a copy's rate
#     optimizer   adamw_ema over DiT-XL/2's parameters
#     attention   every backend at 256 and 1024 tokens, and the table's choice beside the best
#     compiled    against torch.compile with max-autotune, in a process of its own
# and, only where they are named: counters, what ncu counts of each row's kernels, and code, the registers, stack and
# accesses of every kernel (no GPU is needed for that one).
# The libraries have to be built: `bash scripts/gpu_check.sh build`. The table comes last; a part that runs out of time
# keeps the lines it has. The result file goes to test-results/gpu (LFM_FAST_GPU_RESULTS names another folder) as
# DATE-DEVICE-ops.json, to be kept under benchmarks/results/; `--table FILE.json` prints its table again.
# --smoke runs as little as there is of each part, on a CPU too: whether it all works. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu_ops "$@"

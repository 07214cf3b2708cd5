#!/usr/bin/env bash
# Everything that needs a GPU to be checked, on a machine that has one and may have no network: builds both libraries,
# runs the tests on it, and prints one table.
#   bash scripts/gpu_check.sh [build] [kernels] [graphs] [rows] [triton] [sanitizer] [suite]       (default: all of them)
#     build      both libraries, in place, with the torch, CMake, ninja and nvcc that are there
#     kernels    the CUDA kernels against the CPU's bits; repeated runs, streams, a second device, 2^31 elements
#     graphs     every op captured into a CUDA graph and replayed on other numbers; a training step, and sampling
#     rows       the tests of every row, with the reference and with the cuda backend on GPU tensors
#     triton     the same with the Triton kernels, and their own
#     sanitizer  compute-sanitizer's memcheck, racecheck and initcheck over the kernels' tests. Each has to catch a fault
#                made on purpose first; where it cannot (some drivers allow none of them), the table says so
#     suite      all other tests that are not slow
# and, only where they are named: graph-times, a training step and sampling with and without CUDA graphs
# (benchmarks/graphs.py), autoencoder-times, encoding and decoding by sd-vae's network (benchmarks/autoencoders.py;
# wanted of an H200 at 256 px: 1,200 images encoded and 550 decoded a second), latent-times, cached latents in device
# memory drawn and interpolated (benchmarks/latents.py; wanted: 100,000 images a second), and image-times, JPEGs decoded by
# Pillow, a DataLoader, and DALI on the CPU and on the GPU (benchmarks/decoding.py)
# A failed test is named below the table: op, shape, dtype and backend are in its name. Logs and results go to
# test-results/gpu (LFM_FAST_GPU_RESULTS names another folder).
# Variables: PYTHON, the interpreter that has torch (default python3). It needs pytest, hypothesis, numpy and scipy for
# the ops, and for `suite` whatever `pip install .[test]` brings: packages in a folder are found through PYTHONPATH.
set -uo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
results="${LFM_FAST_GPU_RESULTS:-test-results/gpu}"
export LFM_FAST_REQUIRE_CPP=1 # a missing library is a failure, not a reason to skip
export PYTHONUNBUFFERED=1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: $python has no torch that sees a GPU; set PYTHON to one that does."
  exit 1
fi
phases=("$@")
if [ "${#phases[@]}" -eq 0 ]; then phases=(build kernels graphs rows triton sanitizer suite); fi
mkdir -p "$results"
rm -f "$results"/*.xml "$results"/*.log "$results"/{phases.tsv,table.txt}

# note NAME STATUS SECONDS [REMARK]: a line of the table; the counts come from NAME.xml where there is one
note() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >>"$results/phases.tsv"; }

# checked NAME COMMAND...: its output goes to NAME.log, of which a failure shows the end
checked() {
  local name="$1" start=$SECONDS status=0
  shift
  "$@" >"$results/$name.log" 2>&1 || status=$?
  if [ "$status" -ne 0 ]; then tail -n 40 "$results/$name.log"; fi
  note "$name" "$([ "$status" -eq 0 ] && echo ok || echo FAILED)" $((SECONDS - start))
  return "$status"
}

tests() { # NAME ARGUMENTS-OF-PYTEST...
  local name="$1"
  shift
  checked "$name" "$python" -m pytest -p no:cacheprovider --junitxml="$results/$name.xml" "$@"
}

build() {
  LFM_FAST_BUILD=require LFM_FAST_CUDA=on LFM_FAST_CMAKE="${LFM_FAST_CMAKE:--DLFM_FAST_WERROR=ON}" \
    "$python" setup.py -q build_ext --inplace &&
    "$python" -c 'from lfm_fast import _library; found = _library.load(), _library.load_cuda(); assert found == (None, None), found'
}

control() { # TOOL: it catches a fault of its own kind
  cat >"$results/control.cu" <<'CUDA'
__global__ void memcheck(int* a) { a[1 << 20] = 1; }
__global__ void racecheck(int* a) {
  __shared__ int s[64];
  s[threadIdx.x] = a[threadIdx.x];
  a[threadIdx.x] = s[63 - threadIdx.x];  // of the other warp, without waiting for it
}
__global__ void initcheck(int* a) { a[threadIdx.x] = a[threadIdx.x + 64] + 1; }
int main() {
  int* a = nullptr;
  if (cudaMalloc(&a, 1024) != cudaSuccess) return 3;
  KERNEL<<<1, 64>>>(a);
  cudaDeviceSynchronize();
  return 0;
}
CUDA
  nvcc -arch=native -DKERNEL="$1" "$results/control.cu" -o "$results/control" &&
    "$results/control" && # without the tool it ends well
    compute-sanitizer --tool "$1" --error-exitcode 86 "$results/control"
}

sanitize() { # TOOL SELECTION
  local tool="$1" start=$SECONDS status=0
  control "$tool" >"$results/$tool.log" 2>&1 || status=$?
  if [ "$status" -ne 86 ]; then
    note "$tool" "not run" $((SECONDS - start)) "it does not catch a fault made on purpose here (see $tool.log)"
    return
  fi
  # without PyTorch's cache: each tensor an allocation of its own, whose bounds the tool knows
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 checked "$tool" compute-sanitizer --tool "$tool" --error-exitcode 86 \
    --report-api-errors no "$python" -m pytest -p no:cacheprovider --junitxml="$results/$tool.xml" tests/ops/test_cuda.py -k "$2"
}

for phase in "${phases[@]}"; do
  case "$phase" in
  build) checked build build || break ;;
  kernels) tests kernels tests/ops/test_cuda.py -k "not captured" ;;
  graphs)
    tests graphs tests/ops/test_cuda.py tests/train/test_graphed.py tests/train/test_given_latents.py tests/test_sampler_graphed.py \
      -k "captured or on_a_gpu or host_read or reads_back"
    ;;
  graph-times) checked graph-times "$python" -m benchmarks.graphs --output "$results/graph-times.json" ;;
  autoencoder-times)
    checked autoencoder-times "$python" -m benchmarks.autoencoders --output "$results/autoencoder-times.json"
    ;;
  latent-times) checked latent-times "$python" -m benchmarks.latents --device cuda && cat "$results/latent-times.log" ;;
  image-times)
    checked image-times "$python" -m pytest -p no:cacheprovider benchmarks/test_data.py --benchmark-only -k decoding \
      --benchmark-json="$results/image-times.json"
    ;;
  rows) tests rows tests/ops -m "not slow" -k "cuda and not test_cuda and not triton" ;;
  triton) tests triton tests/ops -m "not slow" --ignore tests/ops/interpreter -k "triton and not test_cuda and not interpret" ;;
  sanitizer)
    sanitize memcheck "every_case or (odd_sizes and bfloat16)"
    sanitize racecheck "every_case"
    sanitize initcheck "every_case"
    ;;
  suite) tests suite -m "not slow" -k "not (ops and (cuda or triton))" ;;
  *)
    echo "gpu_check: there is no phase '$phase'."
    exit 2
    ;;
  esac
done

"$python" - "$results" <<'PYTHON' | tee "$results/table.txt"
import re
import subprocess
import sys
import xml.etree.ElementTree as tree
from pathlib import Path

import torch

folder = Path(sys.argv[1])


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip() or "unknown"
    except OSError:  # there is no such program
        return "unknown"


commit = said("git", "rev-parse", "HEAD")
driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
print(f"{torch.cuda.get_device_name()}, driver {driver}, torch {torch.__version__}, CUDA {torch.version.cuda}, {commit}")
print(f"{'phase':<17} {'result':<8} {'passed':>7} {'failed':>7} {'skipped':>7} {'seconds':>8}")
failures = []
for line in (folder / "phases.tsv").read_text().splitlines():
    name, status, seconds, remark = line.split("\t")
    counts = [""] * 3
    if (folder / f"{name}.xml").is_file():
        cases = list(tree.parse(folder / f"{name}.xml").iter("testcase"))
        bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        skipped = sum(case.find("skipped") is not None for case in cases)
        counts = [len(cases) - len(bad) - skipped, len(bad), skipped]
        for case in bad:
            found = case.find("failure") if case.find("failure") is not None else case.find("error")
            message = re.sub(r"\s+", " ", found.get("message") or "")[:160]
            failures.append(f"  {name}: {case.get('classname')}::{case.get('name')}: {message}")
    passed, failed, skips = counts
    print(f"{name:<17} {status:<8} {passed:>7} {failed:>7} {skips:>7} {seconds:>8} {remark}".rstrip())
print("\n".join(failures))
PYTHON
! grep -q "FAILED" "$results/phases.tsv"

#!/usr/bin/env bash
# Runs the ops' tests on a CPU library built with a sanitizer, and on the CUDA sources as loops (csrc/cuda/device.h).
#   bash scripts/sanitize.sh [quick|full] [address] [thread]      (default: full, both)
# address: AddressSanitizer and UndefinedBehaviorSanitizer. thread: ThreadSanitizer; it cannot see the barriers inside
# torch's OpenMP runtime, so that build forks and joins plain threads instead (csrc/common/parallel.h): it checks the
# kernels' bodies for races, not torch's thread pool. Python and torch themselves are not instrumented.
# Each sanitizer first has to catch a fault made on purpose, so that a run which checks nothing cannot pass.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

size=full
case "${1:-}" in quick | full)
  size="$1"
  shift
  ;;
esac
kinds=("$@")
if [ "${#kinds[@]}" -eq 0 ]; then kinds=(address thread); fi

python="$VENV/bin/python"
[ -x "$python" ] || python="${PYTHON:-python3}"
compiler="${CXX:-g++}"
if ! command -v "$compiler" >/dev/null || ! "$compiler" --version | grep -qiE 'gcc|g\+\+|free software'; then
  echo "sanitizers: need g++ (its runtimes are preloaded into Python); '$compiler' is not it"
  exit 1
fi

library_of() { "$compiler" -print-file-name="$1"; }

# under KIND COMMAND...: with the sanitizer's runtime in the process before Python. libstdc++ beside it, or the first C++
# exception inside torch finds no __cxa_throw to intercept. Leaks are Python's own habit.
under() {
  local kind="$1" runtime
  shift
  runtime="$(library_of "lib$([ "$kind" = address ] && echo asan || echo tsan).so") $(library_of libstdc++.so)"
  # without address randomisation: gcc's thread sanitizer refuses the memory maps of recent kernels
  setarch "$(uname -m)" -R env LD_PRELOAD="$runtime" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    TSAN_OPTIONS="halt_on_error=1 report_signal_unsafe=0 ignore_noninstrumented_modules=1" "$@"
}

control() { # KIND FOLDER: a fault on purpose, in a library called from Python, must end the process
  cat >"$2/control.cpp" <<'CPP'
#include <thread>
extern "C" int address(int i) { volatile int n = i; int* a = new int[n]; a[i] = 1; const int b = a[i]; delete[] a; return b; }
extern "C" int undefined(int i) { return i + 2147483647; }
extern "C" int thread(int i) {
  int sum = 0;
  auto add = [&] { for (int k = 0; k < 1000; ++k) sum += i; };
  std::thread first(add), second(add);
  first.join(), second.join();
  return sum;
}
CPP
  "$compiler" -std=c++20 -O1 -g -fPIC -shared -fno-sanitize-recover=all -fsanitize="$flags" -pthread "$2/control.cpp" -o "$2/control.so"
  local fault
  for fault in ${flags//,/ }; do
    if under "$1" "$python" -c "import ctypes; ctypes.CDLL('$2/control.so').$fault(4)" >"$2/control.log" 2>&1; then
      echo "the sanitizer did not catch a fault made on purpose ($fault)"
      return 1
    fi
    if ! grep -qE 'heap-buffer-overflow|signed integer overflow|data race' "$2/control.log"; then
      cat "$2/control.log"
      return 1
    fi
  done
}

build() { # KIND FOLDER
  local torch
  torch="$("$python" -c "import importlib.util; print(importlib.util.find_spec('torch').submodule_search_locations[0])")"
  local targets=(_C_cpu)
  if [ "$size" = full ]; then targets+=(_C_emulated); fi # the CUDA sources as loops
  cmake -S . -B "$2" -G Ninja -DLFM_FAST_TORCH="$torch" -DLFM_FAST_SANITIZE="$flags" -DLFM_FAST_CUDA=OFF &&
    cmake --build "$2" --target "${targets[@]}"
}

# What runs compiled code of ours. quick: every row's every case at every CPU level, and the lists of adamw_ema;
# under the thread sanitizer, where each call is spread over threads, every case at the machine's level.
check() { # KIND FOLDER
  local selection=(tests/ops --ignore=tests/ops/interpreter -k "not triton and not compile and not opcheck")
  case "$size $1" in
  "quick address")
    selection=(tests/ops/test_{cpu_levels,adamw_ema}.py -k "not reference and not compile and not torchs") ;;
  "quick thread") selection=(tests/ops/test_{cpu_levels,rows}.py -k "threads or (float64 and cpp)") ;;
  esac
  selection+=(-m "not slow")
  under "$1" env LFM_FAST_LIBRARY="$PWD/$2/_C_cpu.so" LFM_FAST_EMULATED_LIBRARY="$PWD/$2/_C_emulated.so" \
    LFM_FAST_SAMPLE="$size" OMP_NUM_THREADS="$([ "$1" = thread ] && echo 3 || echo 2)" \
    "$python" -m pytest -p no:cacheprovider --capture=sys -x "${selection[@]}"
}

export PATH="$(cd "$(dirname "$python")" && pwd):$PATH"
status=0
for kind in "${kinds[@]}"; do
  folder="build/sanitize-$kind"
  flags="$([ "$kind" = address ] && echo address,undefined || echo thread)"
  mkdir -p "$folder"
  { phase "sanitizer $kind: catches a planted fault" control "$kind" "$folder" &&
    phase "sanitizer $kind: build" build "$kind" "$folder" &&
    phase "sanitizer $kind: tests/ops ($size)" check "$kind" "$folder"; } || status=1
done
exit "$status"

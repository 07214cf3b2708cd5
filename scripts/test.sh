#!/usr/bin/env bash
# Makes the environment and runs the tests.
#   bash scripts/test.sh           every test not marked slow
#   bash scripts/test.sh --all     also kills, fuzzing, long statistics, the sanitizers and every way to install; leaves
#                                  a dated result file under test-results/
#   bash scripts/test.sh tests/ops further arguments go to pytest
# Variables: see scripts/environment.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

all=false
if [ "${1:-}" = "--all" ]; then
  all=true
  shift
fi

# run NAME COMMAND...: like phase, but the output is shown and kept
failed=()
run() {
  local name="$1" start=$SECONDS status=0
  shift
  echo "== $name"
  "$@" || status=$?
  if [ "$status" -ne 0 ]; then failed+=("$name"); fi
  printf '== %-41s %s %4d s\n' "$name" "$([ "$status" -eq 0 ] && echo 'ok    ' || echo FAILED)" $((SECONDS - start))
}

slow_tests() { LFM_FAST_SAMPLE=full run_tests -m "slow and not sanitizer" "$@"; }

everything() {
  run "tests not marked slow" run_tests -m "not slow" "$@"
  if $all; then
    run "slow tests, in full" slow_tests "$@"
    run "sanitizers, in full" bash scripts/sanitize.sh full
    run "every way to install" bash scripts/check_install.sh --all
  fi
  if [ "${#failed[@]}" -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    return 1
  fi
  echo "all passed"
}

make_environment test
if $all; then
  mkdir -p test-results
  result="test-results/$(date +%Y-%m-%d-%H%M%S).txt"
  {
    echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ' with local changes')"
    "$VENV/bin/python" -c "import platform, torch; print(platform.platform(), 'Python', platform.python_version(), 'torch', torch.__version__)"
    "$VENV/bin/python" -c "import os, torch; print(os.cpu_count(), 'cores', torch.backends.cpu.get_cpu_capability(), 'CUDA:', torch.cuda.is_available())"
  } >"$result"
  status=0
  everything "$@" 2>&1 | tee -a "$result" || status=1
  echo "result: $result"
  exit "$status"
fi
everything "$@"

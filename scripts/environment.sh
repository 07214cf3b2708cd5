# Shared by the scripts beside it: `source scripts/environment.sh`, from the repository's root.
#   phase NAME COMMAND...     run quietly, print one line with the seconds; on failure print the command's output too
#   make_environment EXTRA    the virtual environment with torch, the packages of that extra and the compiled library
#   run_tests ARGUMENTS...    pytest of that environment on all cores
# Variables a user may set:
#   LFM_FAST_VENV   the environment's folder (default .venv; reused when it is there)
#   PYTHON          the interpreter a new environment is made with (default python3)
#   TORCH_SPEC      what pip installs when there is no torch >= 2.10 yet (default torch==2.13.0). PyPI's Linux wheel brings
#                   several GB of CUDA along; without a GPU the small one does:
#                   TORCH_SPEC="torch==2.13.0 --index-url URL" with the CPU index that pytorch.org names

VENV="${LFM_FAST_VENV:-.venv}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

phase() {
  local name="$1" start=$SECONDS log status=0
  shift
  log="$(mktemp)"
  "$@" >"$log" 2>&1 || status=$?
  if [ "$status" -eq 0 ]; then
    printf '%-44s ok     %4d s\n' "$name" $((SECONDS - start))
  else
    tail -n 150 "$log"
    printf '%-44s FAILED %4d s\n' "$name" $((SECONDS - start))
  fi
  rm -f "$log"
  return "$status"
}

# torch_here PYTHON: prints the installed torch's version when it is one we can use (no import: that takes seconds)
torch_here() {
  "$1" - <<'PYTHON'
import sys
from importlib import metadata

try:
    version = metadata.version("torch")
except metadata.PackageNotFoundError:
    sys.exit(1)
print(version)
sys.exit(tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 10))
PYTHON
}

_new_environment() {
  local python="${PYTHON:-python3}" options=()
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "lfm_fast needs Python 3.10 or newer; '$python' is not. Set PYTHON to one that is."
    return 1
  fi
  # a torch that the machine's own Python has (a GPU image, say) is used instead of downloading another
  if torch_here "$python" >/dev/null; then options+=(--system-site-packages); fi
  "$python" -m venv ${options[@]+"${options[@]}"} "$VENV"
}

_install_torch() {
  # not quoted: it may hold options of pip
  torch_here "$VENV/bin/python" >/dev/null || "$VENV/bin/python" -m pip install -q ${TORCH_SPEC:-torch==2.13.0}
}

_install_packages() {
  local extra="$1" constraints status=0
  constraints="$(mktemp)"
  grep -v '^torch==' constraints.txt >"$constraints"
  echo "torch==$(torch_here "$VENV/bin/python")" >>"$constraints" # never exchange the torch that is there
  "$VENV/bin/python" -m pip install -q -c "$constraints" setuptools wheel cmake ninja &&
    LFM_FAST_BUILD=off "$VENV/bin/python" -m pip install -q -c "$constraints" --no-build-isolation -e ".[$extra]" ||
    status=$?
  rm -f "$constraints"
  return "$status"
}

# A torch with CUDA brings the Triton it was built for; beside one without, the tests' interpreter wants the release whose
# faults they know (tests/ops/interpreter/conftest.py). Not to be had on a platform, it is left out, and they skip.
_install_triton() {
  "$VENV/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)' ||
    "$VENV/bin/python" -m pip install -q triton==3.6.0 || echo "no Triton 3.6.0 for this platform: its tests are skipped"
}

make_environment() {
  local extra="$1" stamp wanted
  [ -x "$VENV/bin/python" ] || phase "virtual environment ($VENV)" _new_environment || return 1
  phase "torch (${TORCH_SPEC:-torch==2.13.0}, or the one there)" _install_torch || return 1
  stamp="$VENV/lfm_fast-$extra.stamp"
  wanted="$(pwd; cat pyproject.toml setup.py constraints.txt | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    phase "packages of lfm_fast[$extra]" _install_packages "$extra" || return 1
    if [ "$extra" = test ]; then phase "Triton" _install_triton; fi
    echo "$wanted" >"$stamp"
  fi
  # apart from pip, so that a second run compiles only what changed
  phase "compiled library" "$VENV/bin/python" setup.py -q build_ext --inplace || return 1
  "$VENV/bin/python" -m lfm_fast._library
}

# A process for each core, of one thread: threads of processes that share cores wait for each other.
run_tests() {
  OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$VENV/bin/python" -m pytest -n auto --maxprocesses=8 --dist worksteal "$@"
}

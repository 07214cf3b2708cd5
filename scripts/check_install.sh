#!/usr/bin/env bash
# Installs a copy of this tree in new virtual environments, each in one documented way, and makes each compute something.
#   bash scripts/check_install.sh         develop; editable without isolation; isolated, used from another folder
#   bash scripts/check_install.sh --all   also isolated editable, a wheel, and an install without a compiler
# Variables: PYTHON, TORCH_SPEC as in scripts/environment.sh. Needs a C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

# Not optimised: what is checked is how the library gets where it belongs; the tests have compiled it as users get it.
export LFM_FAST_CMAKE="${LFM_FAST_CMAKE:-} -DCMAKE_BUILD_TYPE=None"

if [ "${1:-}" = "--one" ]; then # how this script calls itself: one way, in a shell of its own that stops at an error
  work="$2" way="$3" tree="$2/$3" bin="$2/$3.venv/bin"
else
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
  mkdir "$work/elsewhere"
  ways=(develop editable isolated)
  if [ "${1:-}" = "--all" ]; then ways+=(isolated_editable wheel no_compiler); fi
fi

# What must hold after any install; its argument says whether the compiled library is to be expected.
[ -e "$work/use_it.py" ] || cat >"$work/use_it.py" <<'PYTHON'
import sys
import warnings

import torch

import lfm_fast
from lfm_fast import _library, ops

expected = sys.argv[1] == "compiled"
assert "elsewhere" not in lfm_fast.__file__
index = torch.tensor([0, 3, 2**40])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with ops.use_backend("reference"):
        reference = ops.philox_normal(index, 129, seed=7)
    if expected:
        assert _library.load() is None, _library.load()
        with ops.use_backend("cpp", ["philox_normal"]):
            assert torch.equal(ops.philox_normal(index, 129, seed=7), reference)
    else:
        assert "no C++ compiler" in _library.load(), _library.load()
    for _ in range(2):
        assert torch.equal(ops.philox_normal(index, 129, seed=7), reference)
said = [str(warning.message) for warning in caught if "lfm_fast" in str(warning.message)]
assert len(said) == (0 if expected else 1), said
print("lfm_fast", lfm_fast.__version__, "from", lfm_fast.__file__, *said)
PYTHON

copy_tree() { # the files git knows or would add, without anything built
  mkdir "$tree"
  git ls-files -z -co --exclude-standard | while IFS= read -r -d '' file; do
    if [ -e "$file" ]; then printf '%s\0' "$file"; fi
  done | tar -c --null -T - | tar -x -C "$tree"
}

new_environment() { # [further packages]: torch first, as the README says
  "${PYTHON:-python3}" -m venv "$work/$way.venv"
  "$bin/python" -m pip install -q --no-compile ${TORCH_SPEC:-torch==2.13.0} numpy "$@"
}

use_it() { # compiled|plain: with nothing of the environment on the PATH, from a folder that is not the source's
  (cd "$work/elsewhere" && PATH=/usr/bin:/bin "$bin/python" "$work/use_it.py" "$1")
}

develop() {
  new_environment
  (cd "$tree" && "$bin/python" setup.py develop --no-deps)
  use_it compiled
}

editable() {
  new_environment setuptools wheel cmake ninja
  (cd "$tree" && "$bin/pip" install --no-deps -e . --no-build-isolation)
  use_it compiled
}

isolated() { # with every dependency and the command line program; the source may go afterwards
  new_environment
  (cd "$tree" && "$bin/pip" install .)
  rm -rf "$tree"
  use_it compiled
  (cd "$work/elsewhere" && "$bin/lfm-fast" --help)
}

isolated_editable() {
  new_environment
  (cd "$tree" && "$bin/pip" install --no-deps -e .)
  use_it compiled
}

wheel() { # one for every Python from 3.10 on
  new_environment
  (cd "$tree" && "$bin/pip" wheel --no-deps -w "$tree/wheels" .)
  "$bin/pip" install --no-deps "$tree"/wheels/lfm_fast-*-cp310-abi3-*.whl
  use_it compiled
}

no_compiler() {
  new_environment
  (cd "$tree" && CC=/nonexistent CXX=/nonexistent "$bin/pip" install --no-deps .)
  use_it plain
}

if [ "${1:-}" = "--one" ]; then
  copy_tree
  "$way"
  exit
fi
status=0
for way in "${ways[@]}"; do
  phase "install: $way" bash scripts/check_install.sh --one "$work" "$way" || status=1
  rm -rf "${work:?}/$way" "$work/$way.venv"
done
exit "$status"

"""The CUDA sources as loops over CPU tensors: torch.ops.lfm_fast_emulated (csrc/cuda/device.h), built for the tests."""

import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from row_cases import ROWS

ROOT = Path(__file__).resolve().parents[2]
WITH_CUDA = {name: row for name, row in ROWS.items() if any(b.name == "cuda" for b in row.backends)}
_SCHEMAS = torch.library.Library("lfm_fast_emulated", "FRAGMENT")
for _row in WITH_CUDA.values():
    _SCHEMAS.define(_row.name + _row.schema)


def _tool(name):
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def _build(folder):
    """Returns the library's path; raises with the compiler's words if there is a compiler and it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    configure = [_tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"]
    configure += [f"-DLFM_FAST_TORCH={Path(torch.__file__).parent}", "-DLFM_FAST_CUDA=OFF"]
    with open(folder / "lock", "w") as lock:  # pytest's workers come here at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [_tool("cmake"), "--build", folder, "--target", "_C_emulated"]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"the emulated CUDA library does not build:\n{done.stdout}{done.stderr}"
    return folder / "_C_emulated.so"


@functools.cache
def load():
    """Build where need be, and load: the library, or the reason why there is none, as a string."""
    given = os.environ.get("LFM_FAST_EMULATED_LIBRARY")  # a sanitizer build, say
    missing = [name for name in ("cmake", "ninja", "c++") if _tool(name) is None]
    if not given and missing:
        return f"{' and '.join(missing)} not found: the CUDA sources cannot be compiled for the CPU"
    path = Path(given) if given else _build(ROOT / "build" / "emulated")
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def kernel_of(row):
    return getattr(torch.ops.lfm_fast_emulated, row.name).default


def choose(order=0, most_blocks=1 << 16):
    """The order of threads and blocks (0 first to last, 1 last to first, 2 neither), and how large a grid gets."""
    load().lfm_fast_emulate(order, ctypes.c_int64(most_blocks))


def signatures():
    function = load().lfm_fast_signatures
    function.restype = ctypes.c_char_p
    return function().decode()

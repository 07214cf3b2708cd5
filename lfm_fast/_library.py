"""The compiled libraries, one for the CPU and one for CUDA: finding and loading each once, and saying why not."""

import ctypes
import functools
import json
import os
import platform
import re
import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent
_FALLBACK = "the plain-PyTorch reference serves instead"
_BUILD_AGAIN = "build it again with `python setup.py build_ext --inplace`"
_NAMED_BY = {"cpu": "LFM_FAST_LIBRARY", "cuda": "LFM_FAST_CUDA_LIBRARY"}


def path(device: str = "cpu") -> Path:
    """The library's file: the one an environment variable names (a sanitizer build, say), else the package's own."""
    return Path(os.environ.get(_NAMED_BY[device]) or _FOLDER / f"_C_{device}.so")


def built_with(device: str = "cpu") -> dict:
    """What the build wrote down; {} if unknown.

    `torch`, `stable_abi` and `compiler`, or the `reason` why it made nothing; `cuda`, the version of nvcc, or
    `no_cuda`, the reason why it made no CUDA library.
    """
    try:
        return json.loads((path(device).parent / "_C_build.json").read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def load() -> str | None:
    """Load the compiled CPU library once.

    Returns:
        None when it is loaded, else the reason as one sentence (without its full stop). The first refusal in a process
        is also a RuntimeWarning, because everything still works, only slower.

    Example:
        >>> from lfm_fast import _library
        >>> _library.load() in (None, _library.load())
        True
    """
    return _warn(_why_not_loaded("cpu"))


@functools.cache
def load_cuda() -> str | None:
    """Load the compiled CUDA library once, where this torch has CUDA at all; returns and warns as `load` does.

    Example:
        >>> from lfm_fast import _library
        >>> _library.load_cuda() in (None, _library.load_cuda())
        True
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return _warn(_why_not_loaded("cuda"))


def signatures(device: str = "cpu") -> str:
    """Kernel signatures as the library itself states them, one a line; needs no GPU, and for CUDA no CUDA in torch."""
    function = _open_lazily(path(device)).lfm_fast_signatures
    function.restype = ctypes.c_char_p
    return function().decode()


@functools.cache
def lacks(backend: str, kernel: str, types: str) -> str | None:
    """Why a loaded library ("cpp" or "cuda") cannot serve a row: None where it has the kernel, with these types.

    Sources change under a library that was built before (a pull without a build). A kernel that is missing would end in
    NotImplementedError, and one whose arguments have changed since would read a pointer as a number.
    """
    device = {"cpp": "cpu"}.get(backend, backend)
    says = dict(re.match(r"(\w+)(\(.*)", line).groups() for line in signatures(device).splitlines())
    there = torch._C._dispatch_has_kernel_for_dispatch_key(f"lfm_fast_{backend}::{kernel}", device.upper())
    if there and says.get(kernel) == types:
        return None
    fault = "its kernel takes other arguments" if there else "it has no such kernel"
    _warn(f"the compiled library is older than the sources: {_BUILD_AGAIN}; {_FALLBACK}")
    return f"the compiled library is older than this row ({fault}): {_BUILD_AGAIN}"


@functools.cache
def has_tiles() -> bool:
    """Whether the loaded CPU library may use the processor's matrix tiles (AMX) for bfloat16."""
    function = getattr(ctypes.CDLL(str(path())), "lfm_fast_cpu_has_tiles", None)
    if function is None:  # a library from before there were kernels that ask
        return False
    function.restype = ctypes.c_bool
    return function()


def why_no_tiles() -> str | None:
    """None where compiled kernels may use matrix tiles, else the reason as a sentence (without its full stop)."""
    return load() or (None if has_tiles() else "this processor, or its system, has no AMX to give")


def _open_lazily(library: Path) -> ctypes.CDLL:
    """Functions that this torch lacks (those of CUDA) are looked for when they are called, which here is never."""
    dlopen, dlerror = ctypes.CDLL(None).dlopen, ctypes.CDLL(None).dlerror
    dlopen.restype, dlopen.argtypes, dlerror.restype = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int], ctypes.c_char_p
    handle = dlopen(os.fsencode(library), os.RTLD_LAZY)
    if not handle:
        raise OSError(dlerror().decode())
    return ctypes.CDLL(str(library), handle=handle)


def _warn(reason: str | None) -> str | None:
    if reason:
        warnings.warn(f"lfm_fast: {reason}.", RuntimeWarning, stacklevel=3)
    return reason


def _why_not_loaded(device: str = "cpu") -> str | None:
    library = path(device)
    record, which = built_with(device), "compiled CUDA library" if device == "cuda" else "compiled library"
    if not library.is_file():
        why = f"{library.name} is not beside the package: run `python setup.py develop`"
        why = record.get("reason", record.get("no_cuda", why) if device == "cuda" else why)
        return f"the {which} is not installed: {why}; {_FALLBACK}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        torch_built, abi, compiler = (record.get(key, "unknown") for key in ("torch", "stable_abi", "compiler"))
        nvcc = f", nvcc {record.get('cuda', 'unknown')}" if device == "cuda" else ""
        built = f"built against torch {torch_built} (stable ABI {abi}, compiler {compiler}{nvcc})"
        running = f"running torch {torch.__version__} on {platform.system()} {platform.machine()}"
        return f"the {which} could not be loaded: {built}, {running}: {error.__cause__ or error}; {_FALLBACK}"
    return None


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal, cuda_refusal = load(), load_cuda()
    print(f"lfm_fast: {refusal}." if refusal else f"lfm_fast: compiled library loaded ({path().name}).")
    if torch.version.cuda is not None:
        loaded = f"compiled CUDA library loaded ({path('cuda').name})"
        print(f"lfm_fast: {cuda_refusal or loaded}.")

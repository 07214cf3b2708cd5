"""The compiled CPU library: finding it, loading it once, and saying why when it cannot be."""

import ctypes
import functools
import json
import os
import platform
import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent
_FALLBACK = "the plain-PyTorch reference serves instead"


def path() -> Path:
    """The library's file: the one named by LFM_FAST_LIBRARY (a sanitizer build, say), else the package's own."""
    return Path(os.environ.get("LFM_FAST_LIBRARY") or _FOLDER / "_C_cpu.so")


def built_with() -> dict:
    """What the build wrote down: `torch`, `stable_abi`, `compiler`, or the `reason` it made nothing; {} if unknown."""
    try:
        return json.loads((path().parent / "_C_build.json").read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def load() -> str | None:
    """Load the compiled library once.

    Returns:
        None when it is loaded, else the reason as one sentence (without its full stop). The first refusal in a process
        is also a RuntimeWarning, because everything still works, only slower.

    Example:
        >>> from lfm_fast import _library
        >>> _library.load() in (None, _library.load())
        True
    """
    reason = _why_not_loaded()
    if reason:
        warnings.warn(f"lfm_fast: {reason}.", RuntimeWarning, stacklevel=2)
    return reason


def signatures() -> str:
    """Kernel signatures as the library itself states them, one a line; only after `load()` returned None."""
    function = ctypes.CDLL(str(path())).lfm_fast_signatures
    function.restype = ctypes.c_char_p
    return function().decode()


def _why_not_loaded() -> str | None:
    record = built_with()
    if not path().is_file():
        why = record.get("reason", f"{path().name} is not beside the package: run `python setup.py develop`")
        return f"the compiled library is not installed: {why}; {_FALLBACK}"
    try:
        torch.ops.load_library(str(path()))
    except OSError as error:
        torch_built, abi, compiler = (record.get(key, "unknown") for key in ("torch", "stable_abi", "compiler"))
        built = f"built against torch {torch_built} (stable ABI {abi}, compiler {compiler})"
        running = f"running torch {torch.__version__} on {platform.system()} {platform.machine()}"
        return f"the compiled library could not be loaded: {built}, {running}: {error.__cause__ or error}; {_FALLBACK}"
    return None


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal = load()
    print(f"lfm_fast: {refusal}." if refusal else f"lfm_fast: compiled library loaded ({path().name}).")

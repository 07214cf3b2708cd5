"""The compiled library uses the stable ABI alone, and a refused load says why."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lfm_fast import _library

ROOT = Path(__file__).resolve().parents[2]
STABLE = re.compile(r"torch/csrc/(stable/|inductor/aoti_torch/c/shim\.h)|torch/headeronly/")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def unstable_includes(source):
    """Includes of torch, or of Python, that the stable ABI does not cover."""
    ours = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/|Python\.h")
    return [name for name in INCLUDE.findall(source) if ours.match(name) and not STABLE.match(name)]


def test_sources_include_the_stable_abi_only():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    assert {path.name: unstable_includes(path.read_text()) for path in sources} == {path.name: [] for path in sources}


def test_an_unstable_include_is_seen():
    names = ("torch/extension.h", "ATen/ATen.h", "Python.h", "torch/csrc/stable/ops.h")
    source = "".join(f"# include <{name}>\n" for name in names)
    assert unstable_includes(source) == ["torch/extension.h", "ATen/ATen.h", "Python.h"]


@pytest.fixture
def library():
    if reason := _library.load():
        pytest.skip(reason)
    return _library.path()


def tool_output(name, *arguments):
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    return subprocess.run([name, *arguments], check=True, capture_output=True, text=True).stdout


def test_library_wants_no_unstable_symbol(library):
    """C++ symbols of torch change with every release; the stable ABI is C functions (torch_*, aoti_torch_*)."""
    wanted = tool_output("nm", "-D", "-C", "--undefined-only", str(library)).splitlines()
    assert any(" aoti_torch_" in line for line in wanted)
    unstable = re.compile(r"\b(at|c10|torch|caffe2)::|\b_?Py[A-Z_]")
    assert [line for line in wanted if unstable.search(line)] == []


def test_library_brings_no_python_no_openmp_and_no_path(library):
    dynamic = tool_output("readelf", "-d", str(library))
    assert "libtorch_cpu.so" in dynamic
    assert not re.search(r"libpython|libgomp|libomp|libiomp|RPATH|RUNPATH", dynamic)


def test_signatures_are_exported(library):
    assert "philox_normal(" in _library.signatures()


def test_a_torch_without_cuda_needs_no_cuda_library(monkeypatch):
    monkeypatch.setattr(_library.torch.version, "cuda", None)
    _library.load_cuda.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _library.load_cuda().endswith("is built without CUDA")
    _library.load_cuda.cache_clear()


def test_missing_cuda_library_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(_library.torch.version, "cuda", "13.0")
    monkeypatch.setenv("LFM_FAST_CUDA_LIBRARY", str(tmp_path / "_C_cuda.so"))
    (tmp_path / "_C_build.json").write_text(json.dumps({"torch": "2.13.0", "no_cuda": "nvcc was not found"}))
    _library.load_cuda.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="compiled CUDA library is not installed: nvcc was not found"):
            reason = _library.load_cuda()
        (tmp_path / "_C_cuda.so").write_bytes(b"not a library")
        assert "nvcc unknown" in _library._why_not_loaded("cuda")
    finally:
        _library.load_cuda.cache_clear()
    assert reason.endswith("the plain-PyTorch reference serves instead")


def test_the_gpu_check_says_that_there_is_no_gpu():
    if _library.torch.cuda.is_available():
        pytest.skip("there is one")
    command = ["bash", "scripts/gpu_check.sh"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "no torch that sees a GPU" in done.stdout


def test_missing_library_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("LFM_FAST_LIBRARY", str(tmp_path / "_C_cpu.so"))
    assert "python setup.py develop" in _library._why_not_loaded()
    (tmp_path / "_C_build.json").write_text(json.dumps({"reason": "no C++ compiler was found"}))
    assert "no C++ compiler was found" in _library._why_not_loaded()


def test_unloadable_library_says_built_against_and_running(monkeypatch, tmp_path):
    broken = tmp_path / "_C_cpu.so"
    broken.write_bytes(b"not a library")
    record = {"torch": "2.99.1", "stable_abi": "2.98", "compiler": "Acme 7"}
    (tmp_path / "_C_build.json").write_text(json.dumps(record))
    monkeypatch.setenv("LFM_FAST_LIBRARY", str(broken))
    reason = _library._why_not_loaded()
    for part in ("built against torch 2.99.1", "2.98", "Acme 7", "running torch", str(broken)):
        assert part in reason


def test_refusal_warns_once(monkeypatch, tmp_path):
    monkeypatch.setenv("LFM_FAST_LIBRARY", str(tmp_path / "none.so"))
    _library.load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="the compiled library is not installed") as caught:
            assert _library.load() == _library.load()
        assert len(caught) == 1
    finally:
        _library.load.cache_clear()


def test_a_library_from_before_there_were_tiles_has_none(monkeypatch):
    monkeypatch.setattr(_library.ctypes, "CDLL", lambda path: object())
    assert _library.has_tiles.__wrapped__() is False

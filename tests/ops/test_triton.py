"""The Triton kernels without a GPU: run by Triton's interpreter, compiled by its compiler."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from row_cases import ROWS

from benchmarks import gpu_code
from lfm_fast.ops import _triton

INTERPRETED = Path(__file__).with_name("interpreter")
WITH_TRITON = {name: row for name, row in ROWS.items() if any(b.name == "triton" for b in row.backends)}
SIXTEEN_BYTES = r"(v4\.b32|v2\.b64|v8\.b16|v4\.f32)"
FULL = os.environ.get("LFM_FAST_SAMPLE") == "full"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
TRITON = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else ""
with_known_interpreter = pytest.mark.skipif(
    not TRITON.startswith("3.6."), reason=f"the interpreter's faults are known of Triton 3.6; this is {TRITON}"
)


def run_interpreted(marks):
    """In a process of its own: see interpreter/conftest.py."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marks, "--tb=short", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, cwd=INTERPRETED.parents[2], capture_output=True, text=True)
    print(result.stdout[-20_000:], result.stderr[-5_000:], sep="\n")
    assert result.returncode == 0, "a kernel fails in the interpreter: its report is above"


@with_known_interpreter
def test_every_row_in_the_interpreter():
    run_interpreted("not slow")


@with_known_interpreter
@pytest.mark.slow
@pytest.mark.fuzz
def test_very_many_calls_in_the_interpreter():
    run_interpreted("slow")


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """(row, case, capability, configuration) -> what its kernels compile to, by the path that launches them."""
    if _triton.interpreting():
        pytest.skip("in this process Triton interprets (TRITON_INTERPRET=1)")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compiled(row, case, capability, number=0):
        with gpu_code.compiling_for(capability):
            return gpu_code.compiled(row, case, number)

    return compiled


def check_code(kernels, capability):
    for kernel in kernels:
        asm = kernel.asm
        assert asm["cubin"][:4] == b"\x7fELF"
        assert f".target sm_{capability}" in asm["ptx"]
        if not kernel.metadata.enable_fp_fusion:
            assert "fma.rn.f32" not in asm["ptx"], "contracted: other bits than the other backends"
        assert ".local" not in asm["ptx"], "an array that registers cannot index"


@pytest.mark.parametrize("row", WITH_TRITON.values(), ids=WITH_TRITON)
def test_kernels_compile_for_a_gpu(row, compile_for):
    """An odd case and a benchmarked size, whose accesses must be 16 bytes wide."""
    kernels = compile_for(row, row.cases[0], 90)
    assert kernels
    check_code(kernels, 90)
    large = compile_for(row, row.sizes[0], 90)
    check_code(large, 90)
    wide = [re.search(rf"st\.global\S*\.{SIXTEEN_BYTES}", k.asm["ptx"]) for k in large]
    assert any(wide), "no store of 16 bytes"


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("row", WITH_TRITON.values(), ids=WITH_TRITON)
def test_every_case_compiles_in_every_configuration(row, capability, compile_for):
    """With LFM_FAST_SAMPLE=full; else one odd case and one size."""
    module = importlib.import_module(f"lfm_fast.kernels.triton.{row.name}")
    most = max(len(getattr(value, "configurations", ())) for value in vars(module).values())
    for case in (*row.cases, *row.sizes) if FULL else (row.cases[0], row.sizes[-1]):
        for number in range(most):
            check_code(compile_for(row, case, capability, number), capability)


def test_the_fastest_configuration_is_kept(monkeypatch):
    """One timing for each key and device, none while a CUDA graph is captured; ties and failures go to the first."""
    import torch

    from lfm_fast.kernels.triton import _tuning

    first, second, third = (_tuning.Configuration({"BLOCK": block}) for block in (1, 2, 3))
    kernel = _tuning.Tuned(None, first, second, third)
    seconds, timed, capturing = {1: 3.0, 2: 1.0, 3: 2.0}, [], [True]

    def time(run, configuration):
        timed.append(configuration.constants["BLOCK"])
        return seconds[timed[-1]]

    monkeypatch.setattr(_tuning, "_seconds", time)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    device, other = torch.device("cuda", 0), torch.device("cuda", 1)
    assert kernel._choose(None, device, (4,)) is first
    assert timed == []
    capturing[0] = False
    assert [kernel._choose(None, device, (4,)) for _ in range(2)] == [second, second]
    assert timed == [1, 2, 3]
    seconds.update({1: float("inf"), 2: float("inf"), 3: float("inf")})
    assert kernel._choose(None, other, (4,)) is first
    assert kernel._choose(None, device, (5,)) is first
    capturing[0] = True
    assert kernel._choose(None, device, (4,)) is second
    with _tuning.use_configuration(5):
        assert kernel._choose(None, device, (4,)) is third


def test_a_configuration_that_does_not_fit_is_never_the_fastest(monkeypatch):
    import triton

    from lfm_fast.kernels.triton import _tuning

    def fails(*args, **kwargs):
        raise triton.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(triton.testing, "do_bench", fails)
    assert _tuning._seconds(print, _tuning.Configuration()) == float("inf")

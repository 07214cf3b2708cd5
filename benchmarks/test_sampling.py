"""Sampling: guided Heun on DiT-S/2, and the solvers against the true solution (group `solvers`)."""

import pytest

from benchmarks.catalogue import build
from benchmarks.measure import COMPILED, FAST_COMPILED, compare
from benchmarks.settings import FULL, QUICK, seconds_for
from lfm_fast.pipeline import EMBEDDED_FOLDER, INDEX

# about as many evaluations each; dopri5 takes what its tolerance of 1e-5 asks for
METHODS = {"euler": 48, "midpoint": 24, "heun": 24, "rk4": 12, "dopri5": 1}
BATCH_SIZES = {"mixture": 16, "embedded": 2}
REFERENCE_STEPS = {"mixture": 200 if QUICK else 1000, "embedded": 64}  # of RK4 in float64; its own error is recorded


@pytest.mark.benchmark(group="guided sampling")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"] if FULL else ["bfloat16"])
def test_guided_heun(benchmark, precision):
    # two images are four network rows, the batch of test_dit.py: Inductor's kernels are compiled once for both
    batch_size, num_steps = (1, 2) if QUICK else (2, 3)
    specification = ("sampling", {"batch_size": batch_size, "num_steps": num_steps, "precision": precision})
    compare(
        benchmark,
        f"DiT-S/2, Heun x {num_steps}, guided, {batch_size} x 256 px, {precision}",
        build(specification),
        seconds=seconds_for(full=15.0, quick=3.0),
        specification=specification,
        compiled="quick mode" if QUICK else (COMPILED, FAST_COMPILED),
    )


@pytest.mark.benchmark(group="solvers")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", ["mixture", "embedded"])
def test_solver(benchmark, field, method):
    if field == "embedded" and not FULL:
        pytest.skip("the mixture alone, unless in full")
    if field == "embedded" and not (EMBEDDED_FOLDER / INDEX).is_file():
        pytest.skip("this installation has no weights of the embedded flow")
    settings = {"field_name": field, "method": method, "num_steps": METHODS[method]}
    settings |= {"batch_size": BATCH_SIZES[field], "reference_steps": REFERENCE_STEPS[field]}
    compare(
        benchmark,
        f"{field}, {method}" + ("" if method == "dopri5" else f" x {METHODS[method]}"),
        build(("solver", settings)),
        seconds=seconds_for(full=5.0, quick=1.5),
    )

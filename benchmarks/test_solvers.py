"""Group `solvers`: the solvers against the true solution."""

import pytest

from benchmarks.catalogue import build
from benchmarks.measure import compare
from benchmarks.settings import FULL, QUICK, seconds_for
from lfm_fast.pipeline import EMBEDDED_FOLDER, INDEX

# about as many evaluations each; dopri5 takes what its tolerance of 1e-5 asks for
METHODS = {"euler": 48, "midpoint": 24, "heun": 24, "rk4": 12, "dopri5": 1}
BATCH_SIZES = {"mixture": 16, "embedded": 2}
REFERENCE_STEPS = {"mixture": 200 if QUICK else 1000, "embedded": 64}  # of RK4 in float64; its own error is recorded


@pytest.mark.benchmark(group="solvers")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", ["mixture", "embedded"] if FULL else ["mixture"])
def test_solver(benchmark, field, method):
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

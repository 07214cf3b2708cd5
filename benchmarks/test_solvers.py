"""Group `solvers`: the solvers against the true solution and torchdiffeq, and what a step costs beside the model."""

import pytest

from benchmarks import accuracy
from benchmarks.catalogue import build
from benchmarks.measure import compare
from benchmarks.settings import FULL, QUICK, seconds_for
from benchmarks.solving import AT_EQUAL_ERROR, solution
from lfm_fast.pipeline import EMBEDDED_FOLDER, INDEX

# 48 evaluations each; those of a tolerance take what 1e-5 asks for
METHODS = {"euler": 48, "midpoint": 24, "heun": 24, "rk4": 12, "ab2": 47, "ab3": 46, "dpmpp_2m": 48, "unipc": 48}
METHODS |= {"abm5": 48, "dopri5": None, "dopri8": None, "bosh3": None, "tsit5": None, "adams": None}
REFERENCE_STEPS = {"mixture": 200 if QUICK else 1000, "embedded": 48}  # of RK4 in float64; its own error is recorded
MIXTURE, EMBEDDED, FEW = 16, 64, 16  # samples; few for the many solves of a sweep

needs_the_embedded_flow = pytest.mark.skipif(
    not (EMBEDDED_FOLDER / INDEX).is_file(), reason="this installation has no weights of the embedded flow"
)
in_full = pytest.mark.skipif(not FULL, reason="takes minutes: LFM_FAST_BENCH=full")


@pytest.mark.benchmark(group="solvers")
@pytest.mark.parametrize("method", METHODS)
def test_solver(benchmark, method):
    settings = {"field_name": "mixture", "method": method, "num_steps": METHODS[method] or 1, "batch_size": MIXTURE}
    settings["reference_steps"] = REFERENCE_STEPS["mixture"]
    title = f"mixture, {method}" + (f" x {METHODS[method]}" if METHODS[method] else "")
    compare(benchmark, title, build(("solver", settings)), seconds=seconds_for(full=5.0, quick=1.0))


@pytest.mark.benchmark(group="solvers")
@pytest.mark.parametrize("method", ["euler", "heun", "ab3", "unipc"])
def test_overhead(benchmark, method):
    workload = build(("overhead", {"method": method, "num_steps": 250}))
    compare(benchmark, f"a field at no cost, {method} x 250", workload, seconds=seconds_for(full=3.0, quick=0.5))


@pytest.mark.benchmark(group="solvers")
def test_error_over_evaluations_mixture(benchmark):
    truth, note = solution("mixture", MIXTURE, REFERENCE_STEPS["mixture"])
    accuracy.sweep(benchmark, "mixture, error over evaluations", accuracy.points(), "mixture", truth, note)


@in_full
@needs_the_embedded_flow
@pytest.mark.benchmark(group="solvers")
@pytest.mark.parametrize("what", ["error over evaluations", "time grids"])
def test_error_over_evaluations(benchmark, what):
    truth, note = solution("embedded", EMBEDDED, REFERENCE_STEPS["embedded"])
    chosen = accuracy.points() if what == "error over evaluations" else accuracy.grids(10)
    accuracy.sweep(benchmark, f"embedded, {what}", chosen, "embedded", truth[:FEW], note)


@in_full
@needs_the_embedded_flow
@pytest.mark.benchmark(group="solvers")
def test_evaluations_beside_heun(benchmark):
    truth, note = solution("embedded", EMBEDDED, REFERENCE_STEPS["embedded"])
    accuracy.sweep(benchmark, "embedded, beside Heun", accuracy.against_heun(), "embedded", truth, note)


@in_full
@needs_the_embedded_flow
@pytest.mark.benchmark(group="solvers")
def test_time_at_equal_error(benchmark):
    settings = {"field_name": "embedded", "ours": AT_EQUAL_ERROR, "batch_size": EMBEDDED, "rounds": 2}
    settings["reference_steps"] = REFERENCE_STEPS["embedded"]
    words = ", ".join(f"{value}" if name == "method" else f"{name} {value}" for name, value in AT_EQUAL_ERROR.items())
    title = f"embedded, {EMBEDDED} samples, {words} against torchdiffeq's dopri5 at 1e-5"
    workload = build(("at equal error", settings))
    compare(benchmark, title, workload, seconds=0)
    workload.check()

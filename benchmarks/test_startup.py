"""Group `startup`: fresh processes, up to the first image and the first training step."""

import pytest

from benchmarks.catalogue import build
from benchmarks.measure import compare
from benchmarks.settings import FULL, QUICK
from benchmarks.starting import IMAGE, STEP

COMMANDS = {"first image": (IMAGE, 2), "first training step": (STEP, 1)}


@pytest.mark.benchmark(group="startup")
def test_import(benchmark):
    compare(benchmark, "import lfm_fast", build(("import", {"rounds": 10 if FULL else 1 if QUICK else 3})), seconds=0)


@pytest.mark.benchmark(group="startup")
@pytest.mark.parametrize("name", list(COMMANDS)[: 1 if QUICK else 2])
def test_first(benchmark, name):
    command, rounds = COMMANDS[name]
    workload = build(("start", {"command": command, "rounds": 5 if FULL else 1 if QUICK else rounds}))
    compare(benchmark, f"{name}, from the start of the process", workload, seconds=0)

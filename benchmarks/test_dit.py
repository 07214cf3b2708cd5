"""DiT-S/2 on two kinds of numbers: a forward and a training step."""

import pytest

from benchmarks.catalogue import build
from benchmarks.measure import COMPILED, FAST_COMPILED, compare
from benchmarks.settings import FULL, QUICK, seconds_for

BATCH_SIZE = 1 if QUICK else 4
PRECISIONS = ("float32", "bfloat16")


@pytest.mark.benchmark(group="DiT-S/2")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_forward(benchmark, precision):
    specification = ("forward", {"batch_size": BATCH_SIZE, "precision": precision})
    compare(
        benchmark,
        f"forward, {BATCH_SIZE} x 256 px, {precision}",
        build(specification),
        seconds=seconds_for(full=8.0, quick=2.0),
        specification=specification,
        compiled="quick mode" if QUICK else (COMPILED,),
    )


@pytest.mark.benchmark(group="DiT-S/2")
@pytest.mark.parametrize("precision", PRECISIONS if FULL else PRECISIONS[1:])
def test_training_step(benchmark, precision):
    specification = ("training", {"batch_size": BATCH_SIZE, "precision": precision})
    compare(
        benchmark,
        f"training step, {BATCH_SIZE} x 256 px, {precision}",
        build(specification),
        seconds=seconds_for(full=15.0, quick=3.0),
        specification=specification,
        compiled="quick mode" if QUICK else (COMPILED, FAST_COMPILED),
    )

"""DiT-S/2 on two kinds of numbers: groups `forward`, `train_step` and `sampling`."""

import pytest

from benchmarks.catalogue import build
from benchmarks.measure import compare
from benchmarks.names import COMPILED, DIFFUSERS_COMPILED, FAST_COMPILED
from benchmarks.settings import FULL, QUICK, seconds_for

PRECISIONS = ("float32", "bfloat16") if FULL else ("bfloat16",)
BATCH_SIZE = 2 if QUICK else 16
FORWARDS = [(precision, BATCH_SIZE) for precision in PRECISIONS]
FORWARDS += [("bfloat16", other) for other in (1, 4, 64) if FULL]
# in sampling: images (two network rows each, so the forward's batch) and steps of a run in bfloat16 and float32
IMAGES = 2 if QUICK else 8
STEPS = {"bfloat16": 25, "float32": 5} if FULL else {"bfloat16": 2}


def run(benchmark, kind, title, seconds, compiled, **arguments):
    specification = (kind, arguments)
    compare(
        benchmark,
        title,
        build(specification),
        seconds=seconds_for(full=seconds, quick=2.0),
        specification=specification,
        compiled="quick mode" if QUICK else compiled,
    )


@pytest.mark.benchmark(group="forward")
@pytest.mark.parametrize(("precision", "batch_size"), FORWARDS)
def test_forward(benchmark, precision, batch_size):
    title = f"forward, {batch_size} x 256 px, {precision}"
    compiled = (COMPILED, DIFFUSERS_COMPILED)
    run(benchmark, "forward", title, 15.0, compiled, batch_size=batch_size, precision=precision)


@pytest.mark.benchmark(group="train_step")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_step(benchmark, precision):
    title = f"training step, {BATCH_SIZE} x 256 px, {precision}"
    compiled = (COMPILED, DIFFUSERS_COMPILED, FAST_COMPILED)
    run(benchmark, "training", title, 60.0, compiled, batch_size=BATCH_SIZE, precision=precision)


@pytest.mark.benchmark(group="sampling")
@pytest.mark.parametrize("method", ["heun", "euler"] if FULL else ["heun"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_guided_sampling(benchmark, precision, method):
    num_steps = STEPS[precision]
    title = f"{method} x {num_steps}, guided, {IMAGES} x 256 px, {precision}"
    arguments = {"batch_size": IMAGES, "num_steps": num_steps, "precision": precision, "method": method}
    run(benchmark, "sampling", title, 15.0, (COMPILED, DIFFUSERS_COMPILED), **arguments)

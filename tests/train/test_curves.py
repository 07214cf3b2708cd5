"""60 or 200 steps on the fast path against the reference path: as close as two reference runs that round otherwise."""

import os

import pytest
from tiny_run import SETTINGS, TinySource

from benchmarks.curves import MOST, compare
from lfm_fast import ops

STEPS = 200 if os.environ.get("LFM_FAST_SAMPLE") == "full" else 60


def curves(precision, steps):
    settings = {**SETTINGS, "num_classes": 3, "label_dropout": 0.3, "precision": precision, "steps": steps}
    return compare(settings, TinySource())


def assert_alike(found):
    step = 2.0**-22  # between two float32 losses, which are below 4
    assert found["off"] < MOST * found["spread"] + step, {k: v for k, v in found.items() if k != "curves"}
    assert 0 < found["spread"] < 0.1 * found["other_seed"]  # the spread is one of rounding


@pytest.mark.slow
@pytest.mark.statistics
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fast_paths_losses_are_the_references(precision):
    found = curves(precision, STEPS)
    assert_alike(found)
    learned = found["curves"]["fast path"]
    assert sum(learned[-20:]) < (0.8 if STEPS == 200 else 0.95) * sum(learned[:20])


def test_paths_are_compared_and_not_one_with_itself():
    """A few steps; the fast path takes other kernels, hence other bits."""
    found = curves("fp32", 5)
    assert found["off"] < 1e-5
    if ops.explain("gelu_tanh").backend != "reference":
        assert found["off"] > 0

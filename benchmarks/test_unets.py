"""Forwards of the U-Nets: group `unets`."""

import pytest

from benchmarks.names import COMPILED
from benchmarks.settings import FULL, QUICK
from benchmarks.test_networks import PRECISIONS, run

NAMES = ("adm-original", "adm-layout", "adm", "ddpm++", "ncsn++") if FULL else ("adm-original",)
BATCH_SIZES = (1, 4) if FULL else (1,) if QUICK else (4,)


@pytest.mark.benchmark(group="unets")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_forward(benchmark, name, batch_size, precision):
    title = f"{name}, forward, {batch_size} x 256 px, {precision}"
    arguments = {"name": name, "batch_size": batch_size, "precision": precision}
    compiled = (COMPILED,) if FULL else "full mode alone: a U-Net compiles for minutes"
    run(benchmark, "u-net", title, 15.0, compiled, **arguments)

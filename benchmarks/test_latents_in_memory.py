"""Group `data`: from cached latents in memory to what a training step's network is called with."""

import pytest

from benchmarks.catalogue import build
from benchmarks.measure import compare
from benchmarks.settings import FULL, QUICK, seconds_for


@pytest.mark.benchmark(group="data")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_latents(benchmark, dtype):
    count, batch_size = (64, 8) if QUICK else (16384 if FULL else 8192, 256)
    workload = build(("resident latents", {"num_items": count, "batch_size": batch_size, "dtype": dtype}))
    title = f"latents in memory in {dtype}, drawn and interpolated, batches of {batch_size}"
    compare(benchmark, title, workload, seconds=seconds_for(full=16.0, quick=1.0))

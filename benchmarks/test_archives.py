"""Group `data`: pictures read at random from archives, before anything is decoded."""

import pytest

from benchmarks.catalogue import build
from benchmarks.measure import compare
from benchmarks.settings import QUICK, seconds_for


@pytest.mark.benchmark(group="data")
@pytest.mark.parametrize("side", [64, 256])
def test_reading_archives(benchmark, tmp_path, monkeypatch, side):
    pytest.importorskip("lmdb")
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "notes"))  # where a tar's index is remembered
    count = 32 if QUICK else {64: 4096, 256: 1024}[side]
    batch = min(count, 256)
    arguments = {"folder": str(tmp_path / "forms"), "side": side, "count": count, "batch": batch}
    title = f"{batch} of {count} pictures of {side} px, bare RGB, at random places"
    compare(benchmark, title, build(("archives", arguments)), seconds=seconds_for(full=6.0, quick=1.0))

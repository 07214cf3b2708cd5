"""Group `data`: batches from a latent cache, and from a folder of images through the embedded VAE."""

import pytest

from benchmarks.catalogue import build
from benchmarks.measure import compare
from benchmarks.settings import QUICK, seconds_for

BATCH_SIZE = 2 if QUICK else 16


@pytest.mark.benchmark(group="data")
def test_cached_latents(benchmark, tmp_path):
    workload = build(("cached latents", {"folder": str(tmp_path / "cache"), "batch_size": BATCH_SIZE}))
    compare(benchmark, f"cached latents, batches of {BATCH_SIZE}", workload, seconds=seconds_for(full=4.0, quick=1.0))


@pytest.mark.benchmark(group="data")
def test_image_folder(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "notes"))  # where the folder's check is remembered
    workload = build(("image folder", {"folder": str(tmp_path / "images"), "batch_size": BATCH_SIZE}))
    title = f"64 px PNGs through the embedded VAE, 4 batches of {BATCH_SIZE}"
    compare(benchmark, title, workload, seconds=seconds_for(full=8.0, quick=1.0))


@pytest.mark.benchmark(group="data")
@pytest.mark.parametrize("side", [256, 1024])
def test_decoding(benchmark, tmp_path, monkeypatch, side):
    pytest.importorskip("nvidia.dali")
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "notes"))
    count, batch_size = (8, 8) if QUICK else ({256: 512, 1024: 64}[side], 32)
    arguments = {"side": side, "image_size": 256, "count": count, "batch_size": batch_size}
    arguments["folder"] = str(tmp_path / "images")
    workload = build(("decoding", arguments))
    title = f"{count} JPEGs of {side} px to 256 px, batches of {batch_size}"
    compare(benchmark, title, workload, seconds=seconds_for(full=16.0, quick=1.0))

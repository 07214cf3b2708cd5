"""Group `data`: images to latents and back."""

import pytest

from benchmarks.names import DIFFUSERS_COMPILED
from benchmarks.settings import FULL, QUICK
from benchmarks.test_networks import run

PRECISIONS = ("bfloat16",) if QUICK else ("bfloat16", "float32")
SIZES = (
    [("narrow", 1, 32)]
    if QUICK
    else [("sd-vae", 1, 256), *([("sd-vae", 4, 256), ("embedded", 16, 64)] if FULL else [])]
)


@pytest.mark.benchmark(group="data")
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "batch_size", "side"), SIZES)
def test_autoencoder(benchmark, name, batch_size, side, precision, direction):
    title = f"{direction} by {name}'s network, {batch_size} x {side} px, {precision}"
    arguments = {"name": name, "direction": direction, "batch_size": batch_size, "side": side, "precision": precision}
    sd_vae = name == "sd-vae" and batch_size == 1
    compiled = (DIFFUSERS_COMPILED,) if FULL and sd_vae else "full mode alone: an autoencoder compiles for a minute"
    run(benchmark, "autoencoder", title, 12.0, compiled, **arguments)

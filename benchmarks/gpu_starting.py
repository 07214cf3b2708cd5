"""How long a fresh process takes on a GPU to its first training step and its first image, and what it compiles again.

`python -m benchmarks.gpu_starting {step,image} NETWORK` is such a process, timed from outside.
"""

import sys
import tempfile
import time

import torch

import lfm_fast
from benchmarks import autoencoders, gpu, networks
from benchmarks.gpu_contenders import taking
from benchmarks.starting import run_fresh
from benchmarks.training import TrainingStep
from lfm_fast.autoencoder import Autoencoder
from lfm_fast.train.config import TrainConfig
from lfm_fast.train.loop import build_state
from lfm_fast.train.step import train_step

COLD, WARM = 15.0, 4.0  # seconds wanted at most
SIZES = (2, 1, 3, 5, 8, 16, 31, 48, 64)  # batches, in the order in which they come
_SMALL = "DiT-Emoji/4"


def start(results: gpu.Results) -> None:
    """Fresh processes up to the first step and the first image, with and without what the compilers keep."""
    for network in (_SMALL,) if results.smoke else ("DiT-XL/2", "DiT-S/2"):
        for what in ("step", "image"):
            with tempfile.TemporaryDirectory() as cache:
                for words, wanted in (("cold", COLD), ("warm", WARM)):
                    title, began = f"{network}, first {what}, {words}", time.perf_counter()
                    try:
                        run_fresh(("-m", "benchmarks.gpu_starting", what, network), cache)
                    except AssertionError as error:
                        results.not_run(title, (str(error).strip() or "it failed").rpartition("\n")[2])
                    else:
                        results.add(title, time.perf_counter() - began, "s", wanted, at_most=True)


def recompilations(results: gpu.Results) -> None:
    """Batches of 1 to 64 through one network whose blocks are compiled: how many graphs it makes after the first."""
    network, options = (_SMALL, {"backend": "eager"}) if results.smoke else ("DiT-S/2", {})
    sizes = SIZES[:3] if results.smoke else SIZES
    with taking("all"), torch.no_grad():
        model = networks.fast_network("bfloat16", network, results.device)
        model.compile("block", **options)
        counts = [_graphs()]
        for size in sizes:
            z, y = networks.latents(size, results.device)
            model(torch.linspace(0.1, 0.9, size, device=results.device), z, y)
            counts.append(_graphs())
    title = f"{network}, graphs after the first, batches of {', '.join(map(str, sizes))}"
    first = counts[1] - counts[0]  # or nothing was compiled, and nothing was seen
    results.add(title, counts[-1] - counts[1], "graphs", 0, at_most=True, right=first > 0, first=first)


def _graphs() -> int:
    """How many Dynamo has made in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def first_step(network: str) -> None:
    """Of 32 latents, as `lfm-fast train` with its defaults takes it: blocks compiled on a GPU."""
    device = gpu.device()
    workload = TrainingStep(32 if device.type == "cuda" else 2, "bfloat16", network, device)
    config = TrainConfig(**workload.settings, compile="block" if device.type == "cuda" else "off")
    with torch.device(device):
        state = build_state(config, workload.source, workload.world)
    train_step(state, workload.source, config, workload.path, workload.world)
    gpu.wait(device)


def first_image(network: str) -> None:
    """Of 25 guided steps, decoded by sd-vae's network."""
    device = gpu.device()
    shape = "sd-vae" if device.type == "cuda" else "narrow"
    model = networks.fast_network("bfloat16", network, device)
    z_1, y = networks.latents(1, device)
    settings = {"guidance_scale": 1.5, "null_label": networks.NUM_CLASSES, "method": "heun"}
    z_0 = lfm_fast.sample(model, z_1, y=y, num_steps=25 if device.type == "cuda" else 2, **settings)
    Autoencoder(autoencoders.network(shape).to(device), shape, "bf16").decode(z_0)
    gpu.wait(device)


if __name__ == "__main__":
    with taking("all"):
        {"step": first_step, "image": first_image}[sys.argv[1]](sys.argv[2])

"""What training waits for on a GPU: cached latents beside drawn ones, and image files on their way through the VAE."""

import tempfile
from pathlib import Path

import torch

from benchmarks import gpu
from benchmarks.autoencoders import images_of, network
from benchmarks.decoding import write_photographs
from benchmarks.feeding import SEED, write_cache
from benchmarks.gpu_contenders import host_times, taking
from benchmarks.gpu_parts import attempt
from benchmarks.measure import spread
from benchmarks.training import Ours, TrainingStep
from lfm_fast.autoencoder import Autoencoder
from lfm_fast.data.decoders import dali_is_there
from lfm_fast.data.folder import FolderImages
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.latents import EncodedImages
from lfm_fast.data.resident import of_cache

OF_THE_STEP, WAIT = 0.01, 0.03  # wanted at most
DRAWN, TABLE, MAPPED = "drawn latents", "a table on the device", "files, mapped"
SMOKE_NETWORK = "DiT-Emoji/4"
_ROUNDS, _AT_ONCE = 3, 5  # so that both networks fit the part's time


def latents(results: gpu.Results) -> None:
    """Steps on cached latents, from a table on the device and from files, beside steps on drawn ones."""
    networks = [(SMOKE_NETWORK, 3, 32)] if results.smoke else [("DiT-XL/2", 128, 16384), ("DiT-S/2", 256, 16384)]
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), networks[0][2])
        cache = LatentCache.open(folder)
        for name, batch_size, _ in networks:
            with attempt(results, f"{name}, {batch_size} images"):
                _feed(results, name, batch_size, cache)
            gpu.release(results.device)


def _feed(results: gpu.Results, name: str, batch_size: int, cache: LatentCache) -> None:
    """The same step on each source in turns; what a source costs is what its steps take longer."""
    device, at_once, fewest = results.device, 1 if results.smoke else _AT_ONCE, 1 if results.smoke else 2
    title = f"{name}, {batch_size} images"
    with taking("all"):
        workload = TrainingStep(batch_size, "bfloat16", name, device, num_items=4 * batch_size)
        runner = Ours(workload, "off" if results.smoke else "block")
        sources = {DRAWN: workload.source}
        for words, keep in ((TABLE, "device"), (MAPPED, "mapped")):
            with attempt(results, f"{title}, {words}"):
                workload.source = of_cache(cache, flip=False, device=device, keep=keep)
                runner.step()
                sources[words] = workload.source
        seconds, waited = {words: [] for words in sources}, dict.fromkeys(sources, 0.0)
        for _ in range(1 if results.smoke else _ROUNDS):
            for words, source in sources.items():
                workload.source, runner.state.data_seconds = source, 0.0
                seconds[words] += host_times(runner.step, device, 0.0, at_once, fewest)
                waited[words] += runner.state.data_seconds
    drawn = seconds.pop(DRAWN)
    for words in seconds:
        share = gpu.median(seconds[words]) / gpu.median(drawn) - 1
        facts = {"seconds": spread(seconds[words]), "drawn": spread(drawn), "host_waited": waited[words]}
        results.add(f"{title}, {words}", share, "of the step more", OF_THE_STEP, at_most=True, **facts)


def images(results: gpu.Results) -> None:
    """JPEGs of 256 px decoded and encoded by sd-vae's network in bfloat16; how long the network waits for them."""
    shape, count, side, batch_size = ("narrow", 8, 32, 4) if results.smoke else ("sd-vae", 2048, 256, 64)
    device = results.device
    with tempfile.TemporaryDirectory() as folder, taking("all"):
        write_photographs(Path(folder), count, side)
        autoencoder = Autoencoder(network(shape).to(device), shape, "bf16")
        pictures = images_of(batch_size, side).to(device)
        budget = 0.0 if results.smoke else 3.0
        alone = gpu.median(host_times(lambda: autoencoder.encode(pictures), device, budget, 1))
        results.add("encoding alone", batch_size / alone, "images/s")
        for decoder in ("pil", "auto", "dali"):
            title = f"JPEGs decoded by {decoder}"
            if decoder == "dali" and not dali_is_there():
                results.not_run(title, "DALI is not installed")
                continue
            with attempt(results, title):
                files = FolderImages(folder, side, decoder=decoder, device=device, check="headers")
                seconds = _passing(EncodedImages(files, autoencoder), batch_size, device, budget)
                wanted = WAIT if decoder == "dali" else None
                results.add(title, batch_size / gpu.median(seconds), "images/s", seconds=spread(seconds))
                share = max(0.0, 1 - alone / gpu.median(seconds))
                results.add(f"{title}, waited for", share, "of the time", wanted, at_most=True)


def _passing(source: EncodedImages, batch_size: int, device: torch.device, budget: float) -> list[float]:
    """Seconds of a batch, one following the other."""
    taken = 0

    def call():
        nonlocal taken
        source.batch(torch.arange(taken, taken + batch_size), SEED)
        taken += batch_size

    return host_times(call, device, budget, 1)

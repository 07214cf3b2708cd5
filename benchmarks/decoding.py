"""Image files to batches of square pictures: Pillow and DALI, in threads, in torch's worker processes, on a GPU."""

import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.names import AGAIN, DATA_LOADER, FAST
from benchmarks.settings import QUICK
from benchmarks.workloads import Contender, Workload
from lfm_fast.data.dali import DaliDecoder
from lfm_fast.data.decoders import PillowDecoder, decoder_named
from lfm_fast.data.folder import FolderImages
from lfm_fast.data.reading import centre_crop

PILLOW, DALI, DALI_GPU = "Pillow, threads", "DALI, CPU", "DALI, GPU"
WORKERS = (0, 1) if QUICK else (0, 1, 2, 4, 8, 16)  # of a DataLoader, as far as there are cores, and once beyond
LARGEST_DIFFERENCE = 2.0  # of 255, on the average: what a crop may differ by from Pillow's whole one


class Decoding(Workload):
    """A pass over `count` JPEGs of side x side pixels, in batches, each picture cut and scaled to image_size.

    The fast path is what decoder="auto" takes for a large set. Errors are the mean difference from Pillow's decoding
    at full resolution, as a share of 255.
    """

    measures_memory = False  # threads and processes of others

    def __init__(self, folder: str, side: int, image_size: int, count: int, batch_size: int):
        self.images, self.batch_size, self.side = count, batch_size, side
        write_photographs(Path(folder), count, side)
        self.folder = FolderImages(folder, image_size, decoder="pil", check="headers")
        self.fast = decoder_named("auto", count=10**6)

    def passing(self, decoder):
        def call():
            self.folder.decoder = decoder
            for first in range(0, self.images, self.batch_size):
                self.folder.batch(range(first, first + self.batch_size))

        return call

    def result_of(self, decoder):
        def result():
            self.folder.decoder = decoder
            return [self.folder.batch(range(self.batch_size)).float().cpu()]

        return result

    def truth(self):
        self.folder.decoder = PillowDecoder()
        return [self.folder.batch(range(self.batch_size)).double()]

    def contenders(self):
        decoders = {FAST: self.fast, AGAIN: self.fast, PILLOW: PillowDecoder(), DALI: DaliDecoder()}
        if torch.cuda.is_available():
            decoders[DALI_GPU] = DaliDecoder("cuda")
        found = {name: Contender(self.passing(decoder), self.result_of(decoder)) for name, decoder in decoders.items()}
        loader = best_loader(_Squares(self.folder), self.batch_size)
        self.note = f"the DataLoader has {loader.num_workers} workers, its fastest"
        found[DATA_LOADER] = Contender(lambda: _exhaust(loader), lambda: [_squares(next(iter(loader))).float()])
        return found

    def largest_error(self, errors):
        (truth,) = self.truth_of(FAST)
        return LARGEST_DIFFERENCE / float(truth.square().mean().sqrt())


class _Squares(torch.utils.data.Dataset):
    """The same crops as one writes them for torch's DataLoader, one file at a time."""

    def __init__(self, folder: FolderImages):
        self.paths = [folder.store.path / name for name in folder.names]
        self.image_size = folder.image_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        with Image.open(self.paths[item]) as file:
            return torch.from_numpy(centre_crop(file.convert("RGB"), self.image_size))


def _squares(batch):
    return batch.permute(0, 3, 1, 2)


def _exhaust(loader):
    for batch in loader:
        _squares(batch)


def best_loader(dataset, batch_size: int):
    """The DataLoader whose second pass over the data is fastest, by number of workers; they stay between passes."""
    seconds = {}
    for workers in WORKERS:
        if workers > 2 * (os.cpu_count() or 1):
            break
        loader = _loader(dataset, batch_size, workers)
        _exhaust(loader)
        start = time.perf_counter()
        _exhaust(loader)
        seconds[workers] = time.perf_counter() - start
    return _loader(dataset, batch_size, min(seconds, key=seconds.get))


def _loader(dataset, batch_size, workers):
    return torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers, persistent_workers=workers > 0)


def write_photographs(folder: Path, count: int, side: int) -> None:
    """JPEGs of quality 90 in one class, with the spectrum of photographs: amplitudes fall as 1 / frequency."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(photograph(side, side, seed)) for seed in range(min(count, 8))]
    for number in range(count):
        pictures[number % 8].save(folder / f"{number:05d}.jpg", quality=90)


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """(H, W, 3) uint8 noise of a photograph's spectrum, its colours correlated."""
    generator = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequencies[0, 0] = np.inf
    spectrum = np.fft.rfft2(generator.standard_normal((3, height, width))) / frequencies
    planes = np.fft.irfft2(spectrum, (height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    mixed = np.einsum("ij,jhw->hwi", [[0.9, 0.3, 0.1], [0.9, 0, -0.2], [0.9, -0.3, 0.1]], planes)
    return (128 + 48 * mixed).clip(0, 255).astype(np.uint8)

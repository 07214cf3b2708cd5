"""What training waits for before each step: batches from cached latents, and from images on disk."""

import functools
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.names import DATA_LOADER, EAGER
from benchmarks.networks import LATENT_SHAPE
from benchmarks.plain import WITHOUT_OPS
from benchmarks.training import Ours, TrainingStep
from benchmarks.workloads import Contender, Workload, exact_normals
from lfm_fast.autoencoder import Posterior, load_autoencoder
from lfm_fast.data import ImageSource
from lfm_fast.data.encoding import encode_images, to_model_range
from lfm_fast.data.folder import FolderImages
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.latents import CachedLatents, EncodedImages
from lfm_fast.data.order import item_of
from lfm_fast.ops.streams import STREAM_POSTERIOR

SEED = 0
IMAGE_SIZE = 64  # what the embedded VAE was trained on


@functools.cache
def step_seconds(batch_size: int, precision: str = "bfloat16") -> float:
    """Of a training step by the fast path: the faster of two, after one to warm up."""
    ours = Ours(TrainingStep(batch_size, precision), "off")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        ours.step()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


class Feeding(Workload):
    """source.batch of consecutive samples; each contender takes its own way through the same items.

    Its share of a training step of as many DiT-S/2 samples stands beside it.
    """

    measures_memory = False  # it reads in other threads

    def __init__(self, batch_size: int):
        self.images = self.batch_size = batch_size
        self.numbers = torch.arange(batch_size)
        self.step_seconds = step_seconds(batch_size)
        self.note = f"a training step of DiT-S/2 takes {self.step_seconds * 1e3:.0f} ms here"

    def facts(self, name, seconds):
        return {"share_of_step": seconds / self.step_seconds}

    def noise(self, shape) -> Tensor:
        """What the posterior is sampled with, in float64."""
        numel = shape[1] * shape[2] * shape[3]
        return exact_normals(self.numbers, numel, SEED, STREAM_POSTERIOR, 0).view(shape)

    def result(self) -> list[Tensor]:
        return [self.source.batch(self.numbers, SEED)[0]]


class CacheFeeding(Feeding):
    """CachedLatents of 32 x 32 x 4 posteriors in safetensors shards."""

    num_items = 512

    def __init__(self, folder: str, batch_size: int):
        super().__init__(batch_size)
        write_cache(Path(folder), self.num_items)
        self.cache = LatentCache.open(folder)
        self.source = CachedLatents(self.cache)
        self.taken = 0

    def call(self):
        numbers = self.numbers + self.taken
        self.taken += self.batch_size
        batch = self.source.batch(numbers, SEED)
        self.source._ahead._expected[2].result()  # or the next contender would run beside it
        return batch

    def truth(self):
        mean, log_variance = (x.double() for x in self.cache.read(item_of(self.numbers, self.num_items, SEED)))
        return [mean + torch.exp(log_variance / 2) * self.noise(mean.shape)]

    def others(self):
        loader = _Forever(_Posteriors(self.cache), self.batch_size)
        return {DATA_LOADER: (loader.next, None)}  # its noise is another


class _Posteriors(torch.utils.data.Dataset):
    """A cache as one writes it for torch's DataLoader: one posterior at a time, sampled with torch's generator."""

    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return self.cache.num_items

    def __getitem__(self, item):
        mean, log_variance = self.cache.read(torch.tensor([item]))
        return mean[0] + torch.exp(log_variance[0] / 2) * torch.randn(mean.shape[1:]), self.cache.labels[item]


class _Forever:
    """Batches of a shuffled DataLoader, epoch after epoch."""

    def __init__(self, dataset, batch_size: int):
        self.loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
        self.batches = iter(())

    def next(self):
        for batch in self.batches:
            return batch
        self.batches = iter(self.loader)
        return next(self.batches)


class FolderFeeding(Feeding):
    """Images decoded from a folder and encoded by the embedded VAE: four batches and the one read ahead."""

    num_items, batches = 160, 4

    def __init__(self, folder: str, batch_size: int):
        super().__init__(batch_size)
        self.images = batch_size * self.batches
        write_images(Path(folder), self.num_items)
        self.folder = FolderImages(folder, IMAGE_SIZE)
        self.autoencoder = load_autoencoder("embedded")

    def facts(self, name, seconds):
        return {"share_of_step": seconds / self.batches / self.step_seconds}

    @property
    def source(self):
        return EncodedImages(self.folder, self.autoencoder)

    def call(self):
        source = self.source
        for k in range(self.batches):
            source.batch(self.numbers + k * self.batch_size, SEED)
        source._ahead._expected[2].result()  # or the next contender would run beside it

    def truth(self):
        images = self.folder.batch(item_of(self.numbers, self.num_items, SEED).tolist())
        network = load_autoencoder("embedded").double()
        posterior = network.encode(to_model_range(images).double())
        mean, log_variance = posterior.mean.double(), posterior.log_variance.double()
        return [mean + torch.exp(log_variance / 2) * self.noise(mean.shape)]

    def contenders(self):
        loader = _Forever(_Pictures(self.folder), self.batch_size)

        def call():
            for _ in range(self.batches):
                images, _ = loader.next()
                posterior = self.autoencoder.encode(images)
                posterior.mean + torch.exp(posterior.log_variance / 2) * torch.randn_like(posterior.mean)

        return {**super().contenders(), f"{DATA_LOADER}, {EAGER}": Contender(call, None, WITHOUT_OPS)}


class _AnyImages(ImageSource):
    """As many items as asked for, without a picture."""

    def __init__(self, count: int):
        super().__init__(8, torch.arange(count) % 10, [str(k) for k in range(10)], [str(k) for k in range(count)])

    def load(self, position):
        return torch.zeros(3, 8, 8, dtype=torch.uint8)


class _AnyPosteriors(nn.Module):
    """An autoencoder whose posteriors are drawn: means of unit variance, standard deviations of e^-2."""

    name, fingerprint, downsampling, latent_channels = "drawn", "drawn", 8, LATENT_SHAPE[0]

    def encode(self, images) -> Posterior:
        mean = torch.randn(len(images), *LATENT_SHAPE)
        return Posterior(mean, 0.1 * torch.randn_like(mean) - 4)


def write_cache(folder: Path, count: int) -> None:
    """A latent cache of 256-pixel images, two shards."""
    torch.manual_seed(1)
    encode_images(_AnyImages(count), _AnyPosteriors(), folder, shard_size=count // 2, progress=False)


def write_images(folder: Path, count: int, side: int = 96) -> None:
    """Smooth coloured PNGs in two classes; decoding one is some filtering, as with photographs."""
    generator = torch.Generator().manual_seed(2)
    for number in range(count):
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
        file = folder / str(number % 2) / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels[0]).byte().permute(1, 2, 0).numpy()).save(file)


class _Pictures(torch.utils.data.Dataset):
    """A folder of images as one writes it for torch's DataLoader."""

    def __init__(self, folder: FolderImages):
        self.paths = [folder.store.path / name for name in folder.names]
        self.labels = folder.labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        with Image.open(self.paths[item]) as file:
            picture = file.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1, self.labels[item]

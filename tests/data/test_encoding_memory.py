"""Tens of thousands of items are encoded and read in the memory of a batch."""

import threading
from pathlib import Path

import pytest
import torch
from small_images import Pooling
from torch import nn

from lfm_fast.autoencoder import Posterior
from lfm_fast.data.encoding import copy_latents, encode_images
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.latents import CachedLatents
from lfm_fast.data.source import ImageSource

COUNT, BATCH = 20_000, 100
MOST = 80e6  # a shard and the whole are 164 MB of posteriors, a batch 0.8 MB; allocators keep some tens that were freed
STATUS = Path("/proc/self/status")


class Flat(ImageSource):
    def __init__(self):
        super().__init__(8, torch.arange(COUNT) % 5, list("abcde"), list(map(str, range(COUNT))))

    def batch(self, positions):
        return (torch.tensor(list(positions)) % 251).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


class Wide(Pooling):
    """Latents (4, 16, 16) of one value each, that of its image."""

    def encode(self, images):
        mean = nn.functional.pad(images[:, :1, :1, :1] * 2, (0, 15, 0, 15), mode="replicate").repeat(1, 4, 1, 1)
        return Posterior(mean, torch.full_like(mean, -4.0))


class Memory:
    """Context in which a thread watches this process's own memory, no page of a mapped file; `.most` bytes it grew."""

    def __enter__(self):
        self.most, self._before, self._done = 0, self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.002):
            self.most = max(self.most, self._now() - self._before)

    @staticmethod
    def _now():
        return 1024 * int(STATUS.read_text().split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not STATUS.exists(), reason="the memory of a process is read from /proc")
def test_memory_holds_batches_however_large_the_shards(tmp_path):
    with Memory() as encoding:
        encode_images(Flat(), Wide(), tmp_path / "a", batch_size=BATCH, shard_size=COUNT, progress=False)
    assert encoding.most < MOST
    with Memory() as reading:
        cache = LatentCache.open(tmp_path / "a", verify=True)
        latents = CachedLatents(cache)
        for first in range(0, COUNT, BATCH):
            z_0, _ = latents.batch(torch.arange(first, first + BATCH), 0)
    assert reading.most < MOST
    assert z_0.shape == (BATCH, 4, 16, 16)
    mean, _ = cache.read(torch.tensor([0, 300, COUNT - 1]))
    expected = (torch.tensor([0, 300, COUNT - 1]) % 251).float() / 127.5 - 1
    torch.testing.assert_close(mean[:, 3, 15, 15], 2 * expected)
    with Memory() as copying:
        copy_latents(cache, tmp_path / "b", dtype=torch.bfloat16, shard_size=7000, progress=False)
    assert copying.most < MOST

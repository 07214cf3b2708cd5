"""Latents as a table on a device: the very rows of the cache, and z_t as from any other source."""

import pytest
import torch
from torch import nn

from lfm_fast import ops
from lfm_fast.autoencoder import Posterior
from lfm_fast.data import resident
from lfm_fast.data.encoding import encode_images
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.latents import CachedLatents, EncodedImages
from lfm_fast.data.resident import ResidentLatents, of_cache
from lfm_fast.data.source import ImageSource
from lfm_fast.flow.paths import Linear

CPU = torch.device("cpu")
NUMBERS = torch.tensor([0, 5, 12, 13, 200, 4, 1_000_003])


class Images(ImageSource):
    """13 random 8-pixel images in 3 classes."""

    def __init__(self):
        self.pixels = torch.randint(256, (13, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
        super().__init__(8, torch.arange(13) % 3, list("abc"), [str(k) for k in range(13)])

    def load(self, position):
        return self.pixels[position]


class Averages(nn.Module):
    """An autoencoder in name: averages of 2 x 2 pixels; log-variances that differ from place to place."""

    name, fingerprint, downsampling, latent_channels = "averages", "0123456789ab", 2, 3

    def encode(self, images):
        mean = 3.5 * nn.functional.avg_pool2d(images, 2)
        return Posterior(mean, 2 * mean.roll(1, 1) - 4)


def caches(folder, flip=True):
    """On the disk in several shards, one of them in bfloat16 and one of fixed latents."""
    made = {"posterior": {}, "bfloat16": {"dtype": torch.bfloat16}, "latents": {"store": "latents"}}
    for name, settings in made.items():
        encode_images(Images(), Averages(), folder / name, flip=flip, shard_size=4, progress=False, **settings)
        yield LatentCache.open(folder / name)


@pytest.mark.parametrize("flip", [False, True])
def test_the_table_is_the_cache_to_the_bit(tmp_path, monkeypatch, flip):
    monkeypatch.setattr(resident, "PIECE", 5)
    for cache in caches(tmp_path):
        table = ResidentLatents(cache, flip=flip)
        assert table.mean.dtype == cache.dtype
        assert table.mean.shape == ((2 if flip else 1) * 13, 3, 4, 4)
        everything = torch.arange(13)
        for mirrored in range(2 if flip else 1):
            read = cache.read(everything, torch.full((13,), bool(mirrored)))
            for part, rows in zip((table.mean, table.log_variance), read):
                assert part is None if rows is None else torch.equal(part[13 * mirrored :][:13].float(), rows)
        held = sum(x.numel() * x.element_size() for x in (table.mean, table.log_variance) if x is not None)
        assert resident.bytes_of(cache, flip) == table.nbytes == held
        assert (table.num_items, table.num_classes, table.latent_shape) == (13, 3, (3, 4, 4))


@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_those_of_the_files_to_the_bit(tmp_path, flip):
    """z_0, and z_t with its target: whichever way a cache is read, and nearly so from the images themselves."""
    t = torch.linspace(0.1, 0.9, 7)
    for cache in caches(tmp_path):
        mapped, table = CachedLatents(cache, flip=flip), ResidentLatents(cache, flip=flip)
        z_0, y = mapped.batch(NUMBERS, 11)
        for got, want in zip(table.batch(NUMBERS, 11), (z_0, y)):
            assert torch.equal(got, want)
        coefficients = Linear().coefficients(t)
        made = [
            source.interpolate(source.posteriors(NUMBERS, 11)[0], coefficients, NUMBERS, 11)
            for source in (mapped, table)
        ]
        want = ops.interpolate(z_0, coefficients, index=NUMBERS, seed=11)
        for from_files, from_table, plain in zip(*made, want):
            assert torch.equal(from_files, from_table)
            torch.testing.assert_close(from_table, plain, rtol=0, atol=1e-5)  # exp of another library: 2 ulp of 20
        if cache.is_posterior and cache.dtype == torch.float32:
            images = EncodedImages(Images(), Averages(), flip=flip)
            torch.testing.assert_close(images.batch(NUMBERS, 11)[0], z_0, rtol=0, atol=1e-5)


def test_posteriors_go_to_a_gpu_in_their_own_dtype_from_pinned_memory(tmp_path, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x)
    monkeypatch.setattr(resident, "_free_bytes", lambda device, sharing: 0)
    for cache, count in zip(caches(tmp_path), (2, 2, 1)):
        source = of_cache(cache, flip=True, device=torch.device("cuda"))
        posteriors, _ = source.posteriors(NUMBERS, 3)
        source._ahead._pool.shutdown()
        assert posteriors.dtype == cache.dtype
        assert posteriors.shape == pinned[0] == (7, count, 3, 4, 4)
        pinned.clear()
        of_cache(cache, flip=True, device=CPU).posteriors(NUMBERS, 3)
        assert not pinned


def test_mirrors_that_are_not_there_are_refused(tmp_path):
    cache = next(caches(tmp_path, flip=False))
    with pytest.raises(ValueError, match="flip=True needs a cache of mirrored images"):
        ResidentLatents(cache, flip=True)


def test_the_cache_is_let_go(tmp_path):
    """A table beside the shards it was made of would take twice the memory."""
    import weakref

    cache = next(caches(tmp_path))
    table, gone = ResidentLatents(cache), weakref.ref(cache)
    del cache
    assert gone() is None
    assert table.posteriors(NUMBERS, 0)[0].shape == (7,)


def test_a_table_takes_a_quarter_of_a_gpu_and_an_eighth_of_a_machine(monkeypatch):
    monkeypatch.setattr(resident, "_free_bytes", lambda device, sharing: 800 // sharing)
    for device, most in (("cuda", 200), ("cpu", 100)):
        for sharing in (1, 2):
            fits = [
                resident.is_table(most // sharing + k, device=torch.device(device), sharing=sharing) for k in (0, 1)
            ]
            assert fits == [True, False]


def test_where_a_cache_is_kept(tmp_path, monkeypatch):
    cache = next(caches(tmp_path))
    needed = resident.bytes_of(cache, True)
    rooms = {"device": needed, "auto": 8 * needed}
    for keep, room in rooms.items():
        for free, kind in ((room, ResidentLatents), (room - 1, CachedLatents)):
            monkeypatch.setattr(resident, "_free_bytes", lambda device, sharing, free=free: free)
            if (keep, kind) == ("device", CachedLatents):
                with pytest.raises(
                    ValueError, match=r"latents take 10\.0 kB, but cpu has room for 10\.0 kB: keep them map"
                ):
                    of_cache(cache, flip=True, device=CPU, keep=keep)
            else:
                assert type(of_cache(cache, flip=True, device=CPU, keep=keep)) is kind
    monkeypatch.undo()
    assert type(of_cache(cache, flip=True, device=CPU, keep="mapped")) is CachedLatents
    whole = resident._free_bytes(CPU, 1)
    assert 2**30 < whole < 2**50
    assert resident._free_bytes(CPU, 4) == whole // 4

"""Cached latents wholly on a device: one table, of which a training step gathers, samples and interpolates rows."""

import os

import torch
from torch import Tensor

from lfm_fast import ops
from lfm_fast.autoencoder import Posterior
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.latents import CachedLatents, OfCache, ReadAhead, flips_of
from lfm_fast.data.order import item_of

PIECE = 1024  # items that are read at a time


class ResidentLatents(OfCache):
    """Training batches as rows of a table on a device, where z_0 and its noise are never written.

    Row k is the posterior of item k, row N + k that of its mirror image; both in the cache's own dtype. What a batch
    brings to the device are the numbers of its rows.

    Attributes: mean (N or 2 N, C, h, w); log_variance, the same, or None where latents are fixed.

    Args:
        cache: an open `LatentCache`; it is read once, from the first item to the last, and not kept.
        flip: mirror half of the samples; the cache must hold mirrored images.
        device: where the table is; None is the CPU.

    Raises:
        ValueError: flip asked of a cache without mirrored images.
    """

    def __init__(self, cache: LatentCache, *, flip: bool = False, device=None):
        super().__init__(cache, flip)
        self.mean, self.log_variance = _table(cache, flip, device)
        self._ahead = ReadAhead(self._rows)  # a new epoch's order takes 0.15 s for a million items

    @property
    def nbytes(self) -> int:
        """What the table takes."""
        return self.mean.nbytes + (0 if self.log_variance is None else self.log_variance.nbytes)

    def posteriors(self, sample_numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The rows (B,) int64 of the table and y (B,) int64 of the global sample numbers (B,) int64, on the CPU."""
        return self._ahead.get(sample_numbers, seed)

    def interpolate(self, rows: Tensor, coefficients: Tensor, index: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(z_t, target) of the samples numbered index (B,), all on the table's device; coefficients as of a path."""
        return ops.posterior_interpolate(self.mean, rows, index, coefficients, self.log_variance, seed)

    def batch(self, sample_numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """z_0 (B, C, h, w) float32 on the table's device and y (B,) int64 on the CPU."""
        rows, y = self.posteriors(sample_numbers, seed)
        rows = rows.to(self.mean.device)
        mean = self.mean[rows].float()
        if self.log_variance is None:
            return mean, y
        return Posterior(mean, self.log_variance[rows].float()).sample(sample_numbers.to(mean.device), seed), y

    def _rows(self, sample_numbers, seed):
        items = item_of(sample_numbers, self.num_items, seed)
        rows = items + self.num_items * flips_of(sample_numbers, seed) if self.flip else items
        return rows, self.labels[items]


def of_cache(cache: LatentCache, *, flip: bool, device: torch.device, keep: str = "auto", sharing: int = 1):
    """The source of training that reads `cache`: a table on `device`, or files as they are asked for.

    Args:
        keep: "device", "mapped", or "auto": the table where it takes at most a quarter of a GPU's free memory (there is
            no network in it yet), or, of all that share a CPU's memory, an eighth of it.
        sharing: how many processes of this run are on this machine.

    Raises:
        ValueError: flip asked of a cache without mirrored images, or a table asked for that does not fit.
    """
    if is_table(bytes_of(cache, flip), device=device, keep=keep, sharing=sharing):
        return ResidentLatents(cache, flip=flip, device=device)
    return CachedLatents(cache, flip=flip, pin=device.type == "cuda")


def is_table(size: int, *, device: torch.device, keep: str = "auto", sharing: int = 1) -> bool:
    """Whether cached latents of so many bytes are a table on `device`. Arguments and errors as of `of_cache`."""
    if keep == "mapped":
        return False
    free = _free_bytes(device, sharing)
    if keep == "device":
        if size > free:
            raise ValueError(
                f"the latents take {size_text(size)}, but {device} has room for {size_text(free)}: keep them mapped."
            )
        return True
    return size <= free * (0.25 if device.type == "cuda" else 0.125)


def bytes_of(cache: LatentCache, flip: bool) -> int:
    """What the table of a cache takes."""
    return table_bytes(cache.num_items, cache.latent_shape, cache.dtype, flip=flip, posterior=cache.is_posterior)


def table_bytes(num_items: int, latent_shape, dtype=torch.float32, *, flip: bool, posterior: bool = True) -> int:
    """What a table of so many items takes; the defaults are those of images that are encoded into memory."""
    return num_items * torch.Size(latent_shape).numel() * (1 + posterior) * (1 + flip) * dtype.itemsize


def size_text(size: float) -> str:
    """A number of bytes for people.

    Example:
        >>> size_text(21.24e9), size_text(4608), size_text(12)
        ('21.2 GB', '4.6 kB', '12 bytes')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"


def _free_bytes(device, sharing) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not hasattr(os, "sysconf"):  # Windows
        return 16 * 2**30 // sharing
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // sharing


def _table(cache, flip, device) -> tuple[Tensor, Tensor | None]:
    count = cache.num_items
    shape = (2 * count if flip else count, *cache.latent_shape)
    tables = [torch.empty(shape, dtype=cache.dtype, device=device) for _ in range(2 if cache.is_posterior else 1)]
    for mirrored in (False, True) if flip else (False,):
        for items in torch.arange(count).split(PIECE):
            flips = torch.full(items.shape, mirrored) if flip else None
            place = slice(int(items[0]) + mirrored * count, int(items[-1]) + 1 + mirrored * count)
            for table, values in zip(tables, cache.read(items, flips)):
                table[place] = values  # to the dtype that they were read from: exact
    return tables[0], tables[1] if len(tables) == 2 else None

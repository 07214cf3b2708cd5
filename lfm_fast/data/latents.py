"""What training reads: z_0 and label of each global sample number, from a cache or encoded on the fly.

All sources (a third is in `lfm_fast.data.resident`) give the same z_0 for the same (sample number, seed): the item
from the epoch's permutation, the mirror from stream 4 and the posterior's noise from stream 2 of the counter-based
generator, whatever the batch or the rank.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from lfm_fast import ops
from lfm_fast.autoencoder import Posterior
from lfm_fast.data.encoding import check_sizes, device_of, encode_in_memory, images_digest, to_model_range
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.order import item_of
from lfm_fast.ops.streams import STREAM_AUGMENTATION


def flips_of(sample_numbers: torch.Tensor, seed: int) -> torch.Tensor:
    """Whether each sample is mirrored: (B,) int64 -> (B,) bool, true with probability 1/2."""
    return ops.philox_uniform(sample_numbers, 1, seed, STREAM_AUGMENTATION)[:, 0] < 0.5


def check_flip(cache: LatentCache, flip: bool) -> None:
    """Raises ValueError for mirrors asked of a cache that does not hold them."""
    if flip and not cache.has_flip:
        raise ValueError("flip=True needs a cache of mirrored images too: encode again with flip=True.")


class OfCache:
    """What a source of training tells of the `LatentCache` it reads. Raises ValueError for mirrors it does not hold.

    Besides `batch` such a source has `posteriors(sample_numbers, seed) -> (B, ...), y` and `interpolate(posteriors,
    coefficients, index, seed) -> (z_t, target)`: a training step then draws z_0 and goes on to z_t in one pass.
    """

    def __init__(self, cache: LatentCache, flip: bool):
        check_flip(cache, flip)
        self.flip = flip
        self.num_items = cache.num_items
        self.latent_shape = cache.latent_shape
        self.class_names = cache.class_names
        self.num_classes = len(cache.class_names)
        self.labels = cache.labels
        self.provenance = cache.provenance

    @classmethod
    def from_images(cls, source, autoencoder, *, flip: bool = False, batch_size: int = 32, **where):
        """Encode every image of `source` into memory: for sets that fit, such as the embedded one."""
        return cls(encode_in_memory(source, autoencoder, flip=flip, batch_size=batch_size), flip=flip, **where)


class CachedLatents(OfCache):
    """Training batches from a `LatentCache`, the posterior sampled anew at every visit.

    The batch that is likely to come next is read in a thread, so that nobody waits for the disk.

    Args:
        cache: an open `LatentCache`.
        flip: mirror half of the samples; the cache must hold mirrored images.
        pin: give posteriors in pinned memory, from which a GPU copies while the host goes on.

    Raises:
        ValueError: flip asked of a cache without mirrored images.
    """

    def __init__(self, cache: LatentCache, *, flip: bool = False, pin: bool = False):
        super().__init__(cache, flip)
        self.cache, self._pin, self._ahead = cache, pin, ReadAhead(self._read)

    def batch(self, sample_numbers: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """z_0 (B, C, h, w) float32 and y (B,) int64 of the global sample numbers (B,) int64, on the CPU."""
        posteriors, y = self.posteriors(sample_numbers, seed)
        parts = posteriors.float().unbind(1)
        return parts[0] if len(parts) == 1 else Posterior(*parts).sample(sample_numbers, seed), y

    def posteriors(self, sample_numbers: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 2, C, h, w), mean and log-variance of each sample, or (B, 1, C, h, w) of fixed latents, in the cache's
        dtype; y (B,) int64."""
        return self._ahead.get(sample_numbers, seed)

    def interpolate(self, posteriors, coefficients, index, seed) -> tuple[torch.Tensor, torch.Tensor]:
        """(z_t, target) of the samples numbered index (B,), all on one device; coefficients (4, B) as of a path."""
        mean, log_variance = (*posteriors.unbind(1), None)[:2]
        rows = torch.arange(len(mean), device=mean.device)
        return ops.posterior_interpolate(mean, rows, index, coefficients, log_variance, seed)

    def _read(self, sample_numbers, seed):
        items = item_of(sample_numbers, self.num_items, seed)
        parts = self.cache.read(items, flips_of(sample_numbers, seed) if self.flip else None)
        posteriors = torch.stack([part for part in parts if part is not None], 1).to(self.cache.dtype)  # exact
        return posteriors.pin_memory() if self._pin else posteriors, self.labels[items]


class EncodedImages:
    """Training batches straight from images: decoded ahead in threads, encoded when asked for.

    For image sets too large to encode first, or augmentations that no cache can hold. z_0 is left on the
    autoencoder's device.

    Args:
        source: an `ImageSource`.
        autoencoder: encode(images in [-1, 1]) -> Posterior.
        flip: mirror half of the samples; None follows `source.flip`.
    """

    def __init__(self, source, autoencoder, *, flip: bool | None = None):
        check_sizes(source, autoencoder)
        self.source, self.autoencoder = source, autoencoder
        self.flip = source.flip if flip is None else flip
        self.num_items = len(source)
        side = source.image_size // autoencoder.downsampling
        self.latent_shape = (autoencoder.latent_channels, side, side)
        self.class_names = source.class_names
        self.num_classes = len(source.class_names)
        self.labels = source.labels
        self._ahead = ReadAhead(self._images)

    @property
    def provenance(self) -> dict:
        """Of what a cache's says, what its latents are of."""
        fingerprint = getattr(self.autoencoder, "fingerprint", None)
        return {"images_digest": images_digest(self.source), "fingerprint": fingerprint}

    def batch(self, sample_numbers: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """z_0 (B, C, h, w) float32 on the autoencoder's device and y (B,) int64 on the CPU."""
        return self.of_images(*self._ahead.get(sample_numbers, seed), sample_numbers, seed)

    def of_images(self, images, items, sample_numbers, seed):
        """The batch of images (B, 3, H, W) uint8 that somebody has read already, those of `items` (B,)."""
        posterior = self.autoencoder.encode(to_model_range(images, device_of(self.autoencoder)))
        return posterior.sample(sample_numbers.to(posterior.mean.device), seed), self.labels[items]

    def _images(self, sample_numbers, seed):
        return drawn_images(self.source, sample_numbers, seed, self.flip)


def drawn_images(source, sample_numbers, seed, flip):
    """(images (B, 3, H, W) uint8, items (B,)) of an `ImageSource` that the samples are of, some mirrored if `flip`."""
    items = item_of(sample_numbers, len(source), seed)
    images = source.batch(items.tolist())
    if flip:
        flips = flips_of(sample_numbers, seed)
        images[flips] = images[flips].flip(-1)
    return images, items


class ReadAhead:
    """Calls `load(sample_numbers, seed)` for the batch it expects next while the caller works on this one.

    The step from one batch to the next repeats, and so do their sizes (with gradient accumulation: as a cycle), so the
    next ones are taken to be those that followed the last time these were seen. A wrong guess costs time, never
    correctness.
    """

    def __init__(self, load):
        self._load = load
        self._pool = None
        self._expected = None  # (sample numbers, seed, future)
        self._previous, self._moves = None, []  # the moves: (step from batch to batch, samples)

    def get(self, sample_numbers, seed):
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        expected, self._expected = self._expected, None
        if expected and expected[1] == seed and torch.equal(expected[0], sample_numbers):
            result = expected[2].result()
        else:
            if expected:
                expected[2].cancel()
            result = self._load(sample_numbers, seed)
        upcoming = self._upcoming(sample_numbers)
        if upcoming.numel() and int(upcoming.min()) >= 0:
            self._expected = (upcoming, seed, self._pool.submit(self._load, upcoming, seed))
        return result

    def _upcoming(self, sample_numbers) -> torch.Tensor:
        """The batch that is likely to come next; empty where nothing is known of it."""
        count = len(sample_numbers)
        if count == 0:
            return sample_numbers
        first = int(sample_numbers[0])
        if self._previous is None:
            self._previous = first
            return sample_numbers + count
        move, self._previous = (first - self._previous, count), first
        following = [after for before, after in zip(self._moves, self._moves[1:] + [move]) if before == move]
        self._moves = (self._moves + [move])[-16:]
        step, size = following[-1] if following else move
        return sample_numbers + step if size == count else torch.arange(first + step, first + step + size)

"""Images through the autoencoder, once: into a latent cache on disk, or into memory."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lfm_fast.data.latent_cache import FORMAT, LATENTS, POSTERIOR, LatentCache, moments, sums_of
from lfm_fast.data.latent_writing import LatentWriter
from lfm_fast.distributed import World

STORES = ("posterior", "latents", "samples")  # what of a posterior is kept: `encode_images` says it
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
_COPIED_AT_ONCE = 256


def encode_images(
    source,
    autoencoder,
    folder,
    *,
    flip: bool | None = None,
    store: str = "posterior",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    batch_size: int = 32,
    shard_size: int = 4096,
    progress: bool = True,
    world: World | None = None,
) -> LatentCache:
    """Encode every image of `source` into a latent cache at `folder`, shard by shard, and open it.

    A shard is written whole or not at all; calling again after an interruption makes only the missing and the damaged
    ones. With a `world` of several ranks every rank calls this, on a folder that all of them see, and each encodes its
    share; the files are the same for any number of ranks.

    Args:
        source: an `ImageSource`.
        autoencoder: encode(images in [-1, 1]) -> posterior in latent units; see `lfm_fast.autoencoder`.
        folder: where the shards go; empty, new, or begun by the same call.
        flip: encode the mirrored images as well; None follows `source.flip`.
        store: "posterior" (mean and log-variance, sampled anew at every visit), "latents" (the mode alone) or
            "samples" (one draw: that of sample number i for image i of N, and of N + i for its mirror image).
        dtype: of the stored tensors, float32, float16 or bfloat16.
        seed: of the draws of store="samples".
        batch_size, shard_size: images per forward, and per file.
        world: the ranks that encode; None is this process alone.

    Raises:
        ValueError: bad argument, a folder begun with other images or another autoencoder, an image that cannot be read
            any more, or non-finite latents.
        OSError: the disk is full, or the folder cannot be written.
        RuntimeError: another rank has died.
    """
    check_sizes(source, autoencoder)
    if store not in STORES:
        raise ValueError(f"store={store!r} is not known: choose 'posterior', 'latents' or 'samples'.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not one to store latents in: choose float32, float16 or bfloat16.")
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"batch_size={batch_size} and shard_size={shard_size} must be at least 1.")
    flip = source.flip if flip is None else flip
    provenance = _provenance(source, autoencoder, flip, store, dtype, shard_size)
    if store == "samples":
        provenance["seed"] = int(seed)

    def rows(chunks):
        return encoded_rows(source, autoencoder, chunks, store, flip, dtype, seed)

    how = {"batch_size": batch_size, "shard_size": shard_size, "progress": progress, "world": world or World()}
    writer = LatentWriter(Path(folder).expanduser(), source.labels, source.class_names, provenance, rows, **how)
    return _checked(writer.write())


def copy_latents(cache: LatentCache, folder, *, dtype=None, shard_size: int = 4096, progress=True, world=None):
    """Write any open cache, such as one of another tool's files, into a cache of ours at `folder`, and open it.

    Labels and their order stay; latents are stored as `dtype` (None: as they are) in the unit that `cache` has them in.

    Raises:
        ValueError, OSError: as `encode_images`.
    """
    names, mirrored = POSTERIOR if cache.is_posterior else LATENTS, (False, True) if cache.has_flip else (False,)
    dtype = dtype or cache.dtype

    def rows(chunks):
        for chunk in chunks:
            items, found = torch.arange(chunk.start, chunk.stop), {}
            for flipped in mirrored:
                flips = torch.ones(len(items), dtype=torch.bool) if flipped else None
                for name, values in zip(names, cache.read(items, flips)):
                    found[name + "_flip" * flipped] = values.to(dtype)
            yield found

    made = {"format": FORMAT, "dtype": str(dtype).removeprefix("torch."), "shard_size": shard_size}
    provenance = cache.provenance | made | {"copied_from": cache.provenance["format"]}
    how = {"batch_size": _COPIED_AT_ONCE, "shard_size": shard_size, "progress": progress, "world": world or World()}
    return LatentWriter(Path(folder).expanduser(), cache.labels, cache.class_names, provenance, rows, **how).write()


def encode_in_memory(source, autoencoder, *, flip: bool | None = None, batch_size: int = 32) -> LatentCache:
    """The same without files: every posterior of `source` as float32 in memory."""
    check_sizes(source, autoencoder)
    flip = source.flip if flip is None else flip
    chunks = [range(k, min(k + batch_size, len(source))) for k in range(0, len(source), batch_size)]
    shard = {}
    with contextlib.closing(encoded_rows(source, autoencoder, chunks, "posterior", flip, torch.float32)) as rows:
        for chunk, found in zip(chunks, rows):
            for name, values in found.items():
                if name not in shard:
                    shard[name] = torch.empty(len(source), *values.shape[1:])
                shard[name][chunk.start : chunk.stop] = values
    shard["labels"] = source.labels.clone()
    provenance = _provenance(source, autoencoder, flip, "posterior", torch.float32, len(source))
    return _checked(LatentCache([shard], source.class_names, *moments([sums_of(shard, POSTERIOR)]), provenance))


def _checked(cache: LatentCache) -> LatentCache:
    """Warns of latents far from unit variance."""
    if cache.variance_note():
        warnings.warn(cache.variance_note(), stacklevel=3)
    return cache


def check_sizes(source, autoencoder) -> None:
    """Refuse an empty source, or an image size that the autoencoder cannot halve often enough."""
    if len(source) == 0:
        raise ValueError("There is no image to encode.")
    if source.image_size % autoencoder.downsampling:
        raise ValueError(
            f"image_size={source.image_size} is not a multiple of {autoencoder.downsampling}, "
            f"by which the autoencoder {autoencoder.name} divides: choose one that is."
        )


def to_model_range(images: torch.Tensor, device=None) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> float32 in [-1, 1] on the device: x / 127.5 - 1."""
    return images.to(device).float() / 127.5 - 1


def device_of(autoencoder):
    """Where the autoencoder's weights are."""
    parameter = next(autoencoder.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def encoded_rows(source, autoencoder, chunks, store, flip, dtype, seed=0) -> Iterator[dict[str, torch.Tensor]]:
    """For each chunk of positions the tensors that a shard keeps of it (and `_flip`), (b, C, h, w), on the CPU."""
    with contextlib.closing(_read_ahead(source, chunks)) as read:
        for chunk, images in read:
            yield _kept(source, autoencoder, chunk, images, store, flip, dtype, seed)


def _kept(source, autoencoder, chunk, images, store, flip, dtype, seed) -> dict[str, torch.Tensor]:
    names = POSTERIOR if store == "posterior" else LATENTS
    images, rows = to_model_range(images, device_of(autoencoder)), {}
    for suffix in ("", "_flip") if flip else ("",):
        posterior = autoencoder.encode(images.flip(-1) if suffix else images)
        if store == "posterior":
            values = posterior.mean, posterior.log_variance
        elif store == "latents":
            values = (posterior.mode(),)
        else:
            index = torch.arange(chunk.start, chunk.stop, device=posterior.mean.device)
            values = (posterior.sample(index + len(source) if suffix else index, seed),)
        for name, value in zip(names, values):
            rows[name + suffix] = _finite(value.to(dtype), source, chunk).cpu()
    return rows


def _read_ahead(source, chunks):
    """(chunk, its images), while a thread reads the next one's."""

    def read(chunk):
        try:
            return source.batch(chunk)
        except OSError as error:  # a sentence of ours: it is no fault of the shard that is being written
            names = f"{source.names[chunk[0]]} to {source.names[chunk[-1]]}"
            raise ValueError(f"An image of {source.name} cannot be read, among {names}: {error}.") from error

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as ahead:
        waiting = [ahead.submit(read, chunk) for chunk in chunks[:1]]
        for number, chunk in enumerate(chunks):
            images = waiting.pop().result()
            waiting += [ahead.submit(read, following) for following in chunks[number + 1 : number + 2]]
            yield chunk, images


def _finite(value, source, chunk):
    bad = (~value.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"The autoencoder gives a latent that is not finite for {source.names[chunk[bad[0]]]}: "
            "run it, and store its latents, in float32 or bfloat16 (float16 overflows on some images)."
        )
    return value


def images_digest(source) -> str:
    """Which images in which order, by name and label."""
    digest = hashlib.sha256(json.dumps([source.names, source.labels.tolist(), source.class_names]).encode())
    return digest.hexdigest()[:16]


def _provenance(source, autoencoder, flip, store, dtype, shard_size) -> dict:
    decoded = {} if source.decoded_by is None else {"decoder": source.decoded_by}
    return decoded | {
        "format": FORMAT,
        "autoencoder": autoencoder.name,
        "fingerprint": autoencoder.fingerprint,
        "image_size": source.image_size,
        "source": source.name,
        "num_items": len(source),
        "images_digest": images_digest(source),
        "flip": bool(flip),
        "store": store,
        "dtype": str(dtype).removeprefix("torch."),
        "shard_size": shard_size,
        "crop": source.crop,
        "precision": getattr(autoencoder, "precision", None)
        or _PRECISIONS[getattr(autoencoder, "dtype", torch.float32)],
    }

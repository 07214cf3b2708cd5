"""Images through the autoencoder, once: into a latent cache on disk, or into memory."""

import hashlib
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from lfm_fast.checkpoint import atomic_write
from lfm_fast.data.latent_cache import (
    FORMAT,
    LATENTS,
    POSTERIOR,
    STATS_FILE,
    LatentCache,
    file_checksum,
    moments,
    read_header,
)


def encode_images(
    source,
    autoencoder,
    folder,
    *,
    flip: bool | None = None,
    store: str = "posterior",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    shard_size: int = 4096,
    progress: bool = True,
) -> LatentCache:
    """Encode every image of `source` into a latent cache at `folder`, shard by shard, and open it.

    A shard is written whole or not at all; calling again after an interruption makes only the missing shards.

    Args:
        source: an `ImageSource`.
        autoencoder: encode(images in [-1, 1]) -> posterior in latent units; see `lfm_fast.autoencoder`.
        folder: where the shards go; empty, new, or begun by the same call.
        flip: encode the mirrored images as well; None follows `source.flip`.
        store: "posterior" (mean and log-variance, sampled anew at every visit) or "latents" (the mode alone).
        dtype: of the stored tensors, float32, float16 or bfloat16.
        batch_size, shard_size: images per forward, and per file.

    Raises:
        ValueError: bad argument, a folder begun with other images or another autoencoder, or non-finite latents.
    """
    check_sizes(source, autoencoder)
    if store not in ("posterior", "latents"):
        raise ValueError(f"store={store!r} is not known: choose 'posterior' or 'latents'.")
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"batch_size={batch_size} and shard_size={shard_size} must be at least 1.")
    folder = Path(folder).expanduser()
    flip = source.flip if flip is None else flip
    names = POSTERIOR if store == "posterior" else LATENTS
    provenance = _provenance(source, autoencoder, flip, store, dtype, shard_size)
    ranges = [range(k, min(k + shard_size, len(source))) for k in range(0, len(source), shard_size)]
    missing = [k for k in range(len(ranges)) if not _stands(folder, k, provenance)]
    bar = tqdm(total=sum(len(ranges[k]) for k in missing), desc="encoding", unit="image", disable=not progress or None)
    with bar:
        for k in missing:
            shard = encode_range(source, autoencoder, ranges[k], names, flip, batch_size, dtype, bar)
            _write_shard(_shard_path(folder, k), shard, provenance | {"shard": k})
    if missing or not (folder / STATS_FILE).is_file():
        _write_stats(folder, ranges, names, source, provenance)
    return _checked(LatentCache.open(folder))


def encode_in_memory(source, autoencoder, *, flip: bool | None = None, batch_size: int = 32) -> LatentCache:
    """The same without files: every posterior of `source` as float32 in memory."""
    check_sizes(source, autoencoder)
    flip = source.flip if flip is None else flip
    shard = encode_range(source, autoencoder, range(len(source)), POSTERIOR, flip, batch_size, torch.float32)
    provenance = _provenance(source, autoencoder, flip, "posterior", torch.float32, len(source))
    return _checked(LatentCache([shard], source.class_names, *moments([shard], POSTERIOR), provenance))


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


def encode_range(source, autoencoder, positions, names, flip, batch_size, dtype, bar=None) -> dict[str, torch.Tensor]:
    """One shard: tensors `names` (and `_flip`) of shape (n, C, h, w) and labels (n,), on the CPU."""
    chunks = [positions[k : k + batch_size] for k in range(0, len(positions), batch_size)]
    parts = {}
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as ahead:
        waiting = ahead.submit(source.batch, chunks[0])
        for number, chunk in enumerate(chunks):
            images = waiting.result()
            if number + 1 < len(chunks):  # the next batch is decoded while this one is encoded
                waiting = ahead.submit(source.batch, chunks[number + 1])
            images = to_model_range(images, device_of(autoencoder))
            for suffix in ("", "_flip") if flip else ("",):
                posterior = autoencoder.encode(images.flip(-1) if suffix else images)
                for name, value in zip(names, (posterior.mean, posterior.log_variance)):
                    parts.setdefault(name + suffix, []).append(_finite(value, source, chunk).to(dtype).cpu())
            if bar is not None:
                bar.update(len(chunk))
    shard = {name: torch.cat(values).contiguous() for name, values in parts.items()}
    shard["labels"] = source.labels[list(positions)].clone()
    return shard


def _finite(value, source, chunk):
    bad = (~value.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"The autoencoder gives a latent that is not finite for {source.names[chunk[bad[0]]]}: "
            "run it in float32 (half precision overflows on some images)."
        )
    return value


def _provenance(source, autoencoder, flip, store, dtype, shard_size) -> dict:
    digest = hashlib.sha256(json.dumps([source.names, source.labels.tolist(), source.class_names]).encode())
    return {
        "format": FORMAT,
        "autoencoder": autoencoder.name,
        "fingerprint": autoencoder.fingerprint,
        "image_size": source.image_size,
        "source": source.name,
        "num_items": len(source),
        "images_digest": digest.hexdigest()[:16],  # which images in which order, by name and label
        "flip": bool(flip),
        "store": store,
        "dtype": str(dtype).removeprefix("torch."),
        "shard_size": shard_size,
    }


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


def _stands(folder: Path, number: int, provenance: dict) -> bool:
    """Whether the shard is there already; refuses a folder begun with something else."""
    header = read_header(_shard_path(folder, number))
    if header is None:
        return False
    for key, value in (provenance | {"shard": number}).items():
        if header.get(key) != value:
            raise ValueError(
                f"{folder} holds latents with {key}={header.get(key)!r}, but {key}={value!r} is asked for: "
                "choose another folder, or delete this one."
            )
    return True


def _write_shard(path: Path, shard: dict, header: dict) -> None:
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        save_file(shard, temporary, metadata={"lfm_fast": json.dumps(header)})


def _write_stats(folder: Path, ranges, names, source, provenance) -> None:
    """Statistics over all shards, read back from disk one at a time, and each file's size and checksum."""
    from safetensors.torch import load_file

    paths = [_shard_path(folder, k) for k in range(len(ranges))]
    mean, std = moments((load_file(path) for path in paths), names)
    rows = [
        {"file": path.name, "items": len(items), "bytes": path.stat().st_size, "crc32": file_checksum(path)}
        for path, items in zip(paths, ranges)
    ]
    stats = {"format": FORMAT, "mean": mean, "std": std, "class_names": source.class_names}
    stats |= {"provenance": provenance, "shards": rows}
    with atomic_write(folder / STATS_FILE) as temporary:
        temporary.write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")

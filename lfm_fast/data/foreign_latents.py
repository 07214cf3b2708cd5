"""Latents that other tools have cached, read as a `LatentCache` is.

lightningdit: `*.safetensors` with `latents` and `latents_flip` (n, C, h, w) and `labels` (n,), one sample each as the
    autoencoder gives it, not scaled; beside them `latents_stats.pt` with `mean` and `std` (1, C, 1, 1).
fast-dit: `NAME_features/K.npy` (n, C, h, w), one sample each, scaled by the autoencoder's factor, some of mirrored
    images; and `NAME_labels/K.npy` (n,).

Neither says which autoencoder made it, nor has checksums: what can be held against the autoencoder in use is.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from lfm_fast.data.latent_cache import LATENTS, STATS_FILE, LatentCache, layout_of, moments, sums_of
from lfm_fast.data.npy import read_npy
from lfm_fast.data.shards import open_shard, read_header
from lfm_fast.data.store import MAX_LABEL

OURS, LIGHTNINGDIT, FAST_DIT = "lfm_fast", "lightningdit", "fast-dit"
STATISTICS = "latents_stats.pt"
_LOOKED_AT = 1024  # latents, evenly spread, that statistics are taken of
_THREADS = min(16, 2 * (os.cpu_count() or 1))


def latent_layout(folder) -> str | None:
    """Whose latents lie in a folder: "lfm_fast", "lightningdit", "fast-dit", or None where there are none.

    Raises:
        ValueError: it may not be looked into.
    """
    folder = Path(folder).expanduser()
    try:
        return _layout_of(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror}).") from error


def _layout_of(folder: Path) -> str | None:
    if (folder / STATS_FILE).is_file():
        return OURS
    if not folder.is_dir():
        return None
    if _feature_folders(folder):
        return FAST_DIT
    for path in _shards(folder)[:1]:
        if read_header(path) is None and _holds_latents(path):
            return LIGHTNINGDIT
    return None


def open_latents(folder, *, autoencoder=None, image_size=None, scaling=None, verify=None) -> LatentCache:
    """Open any folder of latents: a finished cache of `encode_images`, LightningDiT's shards or fast-DiT's files.

    Args:
        folder: see `latent_layout`.
        autoencoder: whose latents they must be. Of a cache of ours its fingerprint is compared; other tools' files
            are taken to be of it if channels, side and spread fit.
        image_size: side of the images that they were made from.
        scaling: of other tools' files; z becomes (z - shift) scale, the unit that the flow works in. A number is the
            scale. "stats" takes mean and 1 / std per channel from `latents_stats.pt`; the autoencoder cannot decode
            such latents before they are turned back, for which `provenance["scaling"]` has both. None is what the
            layout implies: for LightningDiT's the autoencoder's scaling_factor (without one "stats"), for fast-DiT's
            1, since they are scaled already.
        verify: as in `LatentCache.open`.

    Raises:
        ValueError: no latents, damaged ones, or ones that do not fit the autoencoder, the image size or each other.
    """
    folder = Path(folder).expanduser()
    layout = latent_layout(folder)
    if layout not in (LIGHTNINGDIT, FAST_DIT):
        if scaling is not None:
            raise ValueError(f"scaling={scaling!r} is for other tools' latents, but {folder} holds none of these.")
        fingerprint = None if autoencoder is None else autoencoder.fingerprint
        return LatentCache.open(folder, fingerprint=fingerprint, image_size=image_size, verify=verify)
    shards, files = _lightningdit(folder) if layout == LIGHTNINGDIT else _fast_dit(folder)
    _require_fit(folder, shards[0]["latents"].shape[1:], autoencoder, image_size)
    shift, scale = _scaling(folder, layout, scaling, autoencoder, shards)
    shards = [_scaled(shard, shift, scale) for shard in shards]
    labels = torch.cat([shard["labels"] for shard in shards])
    wrong = labels[(labels < 0) | (labels > MAX_LABEL)].tolist()
    if wrong:
        raise ValueError(f"{folder} has the label {wrong[0]}: labels count classes, from 0 to {MAX_LABEL} at the most.")
    mean, std = moments([sums_of(_spread(shards), LATENTS)])
    if scaling is None:
        _require_spread(folder, std, autoencoder, layout)
    provenance = {
        "format": layout,
        "source": folder.name,
        "num_items": len(labels),
        "images_digest": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16],
        "image_size": image_size,
        "autoencoder": getattr(autoencoder, "name", None),  # as the caller has it: the files do not say
        "fingerprint": getattr(autoencoder, "fingerprint", None),
        "flip": "latents_flip" in shards[0],
        "store": "samples",
        "scaling": {"shift": shift.tolist(), "scale": scale.tolist()},
    }
    return LatentCache(shards, [str(k) for k in range(int(labels.max()) + 1)], mean, std, provenance)


# -- LightningDiT's shards


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def _holds_latents(path: Path) -> bool:
    try:
        return {"latents", "labels"} <= open_shard(path).keys()
    except ValueError:
        return False


def _lightningdit(folder: Path):
    shards, files = [], []
    for path in _shards(folder):
        try:
            shard = open_shard(path)
        except ValueError as error:
            raise ValueError(f"Shard {path} is damaged ({error}): make or copy it again.") from error
        layout = layout_of(shard)
        numbers = layout and shard["latents"].is_floating_point() and not shard["labels"].is_floating_point()
        if not numbers or any(len(shard[name]) != len(shard["labels"]) for name in shard):
            found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(shard.items()))
            raise ValueError(
                f"{path} holds {found}; expected latents (n, C, h, w), labels (n,) and perhaps latents_flip, as in the "
                "other shards."
            )
        if shards and layout[:2] != layout_of(shards[0])[:2]:
            raise ValueError(f"{path} holds latents of another kind or shape than {files[0][0]}: put it elsewhere.")
        if len(shard["labels"]):
            shards.append(shard | {"labels": shard["labels"].long()})
            files.append((path.name, len(shard["labels"])))
    if not shards:
        raise ValueError(f"The shards in {folder} hold no latent.")
    return shards, files


def _statistics(folder: Path, channels: int):
    path = folder / STATISTICS
    if not path.is_file():
        raise ValueError(f"scaling='stats' needs {path}, which is not there: give the autoencoder, or a number.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (content[name].detach().double().flatten() for name in ("mean", "std"))
    except Exception as error:  # the unpickler meets damaged bytes with errors of any kind
        raise ValueError(f"{path} is damaged, or no dict of tensors mean and std ({type(error).__name__}).") from error
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"{path} is of {len(mean)} channels, but the shards beside it have {channels}.")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(f"{path} has means or standard deviations that cannot be: make it again.")
    return mean, std


# -- fast-DiT's files


def _feature_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*_features") if _labels_of(path).is_dir())


def _labels_of(features: Path) -> Path:
    return features.with_name(features.name.removesuffix("_features") + "_labels")


def _fast_dit(folder: Path):
    folders = _feature_folders(folder)
    if len(folders) > 1:
        raise ValueError(f"{folder} holds {len(folders)} sets, {folders[0].name} the first: give each a folder.")
    features, labels = _npy_sizes(folders[0]), _npy_sizes(_labels_of(folders[0]))
    single = sorted(features.keys() ^ labels.keys())
    if single or not features:
        what = f"{single[0]} and {len(single) - 1} more have no partner" if single else "there is no .npy file"
        raise ValueError(f"{folders[0]} and {_labels_of(folders[0]).name} do not pair: {what}.")
    names = sorted(features, key=lambda name: (len(name), name))  # 2.npy before 10.npy
    with ThreadPoolExecutor(_THREADS) as pool:
        values = list(pool.map(lambda name: _read_labels(_labels_of(folders[0]) / name), names))
    rows = NpyRows([folders[0] / name for name in names], [len(value) for value in values])
    rows.require_sizes([features[name] for name in names])
    return [{"latents": rows, "labels": torch.cat(values)}], [(name, features[name]) for name in names]


def _npy_sizes(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if _is_npy(entry.name)}


def _is_npy(name: str) -> bool:
    return name.endswith(".npy") and not name.startswith(".")


def _read_labels(path: Path) -> torch.Tensor:
    values = read_npy(path)
    if values.ndim > 1 or values.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {values.dtype} of shape {values.shape}; expected whole numbers of shape (n,).")
    return torch.from_numpy(np.atleast_1d(values).astype(np.int64))


class NpyRows:
    """Latents in many .npy files as the rows of one tensor (N, C, h, w), read in threads when they are asked for."""

    def __init__(self, paths: list[Path], counts: list[int]):
        self._paths, self._counts = paths, torch.tensor(counts)
        self._ends = self._counts.cumsum(0)
        first = read_npy(paths[0])
        if first.ndim not in (3, 4) or first.dtype.kind != "f" or (first.ndim == 3 and counts[0] != 1):
            raise ValueError(f"{paths[0]} holds {first.dtype} of shape {first.shape}; expected latents (n, C, h, w).")
        self.dtype, self._item_bytes = torch.float32, first.dtype.itemsize
        self.shape = torch.Size([int(self._ends[-1]), *first.shape[-3:]])
        self._pool = None

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows) -> torch.Tensor:
        """(b, C, h, w) float32 of a slice or a tensor of row numbers."""
        rows = torch.arange(len(self), device="cpu")[rows]
        files = torch.searchsorted(self._ends, rows, right=True)
        wanted = files.unique().tolist()
        self._pool = self._pool or ThreadPoolExecutor(_THREADS, thread_name_prefix="npy")
        found = torch.empty(len(rows), *self.shape[1:], device="cpu")
        for file, values in zip(wanted, self._pool.map(self._read, wanted)):
            here = files == file
            found[here] = values[rows[here] - (self._ends[file] - self._counts[file])]
        return found

    def require_sizes(self, sizes: list[int]) -> None:
        """Refuse the first file that is longer or shorter than its labels say."""
        row = self._item_bytes * self.shape[1:].numel()
        heads = torch.tensor(sizes) - row * self._counts
        for file in (heads != heads[0]).nonzero().flatten().tolist()[:1]:
            raise ValueError(
                f"{self._paths[file]} has {sizes[file]} bytes, which are not {int(self._counts[file])} latents as in "
                f"{self._paths[0].name}: make or copy it again."
            )

    def _read(self, file: int) -> torch.Tensor:
        values = read_npy(self._paths[file])
        shape = (int(self._counts[file]), *self.shape[1:])
        if values.dtype.kind != "f" or values.size != torch.Size(shape).numel() or values.shape[-3:] != shape[1:]:
            raise ValueError(f"{self._paths[file]} holds {values.dtype} of shape {values.shape}, not {shape}.")
        return torch.from_numpy(values.reshape(shape).astype(np.float32))


# -- units


class ScaledRows:
    """Rows of a stored tensor in the flow's unit, (z - shift) scale per channel, computed when they are asked for."""

    def __init__(self, rows, shift, scale):
        self._rows, self.shape, self.dtype = rows, rows.shape, torch.float32
        self._shift, self._scale = (value.float().view(-1, 1, 1) for value in (shift, scale))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows) -> torch.Tensor:
        return (self._rows[rows].float() - self._shift) * self._scale


def _scaled(shard, shift, scale):
    if not shift.any() and (scale == 1).all():
        return shard
    return {name: rows if name == "labels" else ScaledRows(rows, shift, scale) for name, rows in shard.items()}


def _scaling(folder, layout, scaling, autoencoder, shards):
    """(shift, scale), each (C,) float64."""
    channels = shards[0]["latents"].shape[1]
    if scaling is None and layout == LIGHTNINGDIT and autoencoder is not None:
        unit = (torch.as_tensor(value, dtype=torch.float64).flatten() for value in autoencoder.unit())
        return tuple(value.expand(channels) for value in unit)
    if scaling is None:
        scaling = "stats" if layout == LIGHTNINGDIT else 1.0
    if scaling == "stats":
        mean, std = _statistics(folder, channels)
        _require_statistics(folder, mean, std, shards)
        return mean, 1 / std
    if isinstance(scaling, bool | str) or not 0 < scaling < float("inf"):
        raise ValueError(f"scaling={scaling!r} is not known: give a positive number or 'stats'.")
    return torch.zeros(channels, dtype=torch.float64), torch.full((channels,), float(scaling), dtype=torch.float64)


def _spread(shards) -> dict:
    """Latents evenly spread over all shards, as one shard."""
    total = sum(len(shard["labels"]) for shard in shards)
    parts, before = [], 0
    for shard in shards:
        count = len(shard["labels"])
        step = max(1, total // _LOOKED_AT)
        rows = torch.arange(-before % step, count, step)
        if len(rows):
            parts.append(shard["latents"][rows].float())
        before += count
    return {"latents": torch.cat(parts)}


def _require_statistics(folder, mean, std, shards):
    """The statistics are of these latents: a channel's mean within half a deviation, deviations within a factor 1.5.

    That is far more than a thousand latents can be off by chance, and less than another unit would make.
    """
    found_mean, found_std = (torch.tensor(x).double() for x in moments([sums_of(_spread(shards), LATENTS)]))
    ratio = found_std / std
    if ((found_mean - mean).abs() > 0.5 * std).any() or (ratio > 1.5).any() or (ratio < 1 / 1.5).any():
        raise ValueError(f"{folder / STATISTICS} is not of the latents beside it: make it again, or give a number.")


def _require_fit(folder, shape, autoencoder, image_size):
    if autoencoder is None:
        return
    side = None if image_size is None else image_size // autoencoder.downsampling
    expected = (autoencoder.latent_channels, side or shape[1], side or shape[2])
    if tuple(shape) != expected:
        raise ValueError(
            f"The latents in {folder} have shape {tuple(shape)}, but those of the autoencoder {autoencoder.name} "
            f"{f'at {image_size} pixels ' if side else ''}have {expected}: they are of another one, or another size."
        )


def _require_spread(folder, std, autoencoder, layout):
    spread = float(torch.tensor(std).square().mean().sqrt())
    if not 0.5 <= spread <= 2.0:
        done = "as they are, since such files are scaled already"
        if layout == LIGHTNINGDIT and autoencoder is not None:
            done = f"times the scaling_factor {autoencoder.scaling_factor:g} of {autoencoder.name}"
        raise ValueError(
            f"The latents in {folder}, {done}, have a standard deviation of {spread:.3g} where the flow needs about 1: "
            "they are of another autoencoder, or scaled otherwise; if you know how, give scaling."
        )

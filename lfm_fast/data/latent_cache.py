"""Encoded images on disk: safetensors shards, memory-mapped, with statistics, provenance and checksums beside them.

A folder holds `latents-00000.safetensors`, ... and `stats.json`. A shard has `mean` and `log_variance` (n, C, h, w), or
`latents` alone; the same with `_flip` for mirrored images if they were encoded; and `labels` (n,). All in latent units.
"""

import json
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lfm_fast.data.cache import read_note, write_note

FORMAT = 1
STATS_FILE = "stats.json"
POSTERIOR, LATENTS = ("mean", "log_variance"), ("latents",)


class LatentCache:
    """Posteriors (or fixed latents) of N images, read by item number.

    Attributes: num_items; latent_shape (C, h, w); labels (N,) int64; class_names; mean and std, per channel (C,) over
    posterior draws; provenance, a dict; has_flip, whether mirrored images were encoded too; is_posterior, whether there
    are log-variances; dtype, of what is stored.
    """

    def __init__(self, shards: list[dict[str, torch.Tensor]], class_names, mean, std, provenance: dict):
        self._shards = shards
        self._names = LATENTS if "latents" in shards[0] else POSTERIOR
        counts = torch.tensor([len(shard["labels"]) for shard in shards])
        self._ends = counts.cumsum(0)
        self.num_items = int(self._ends[-1])
        self.latent_shape = tuple(shards[0][self._names[0]].shape[1:])
        self.labels = torch.cat([shard["labels"] for shard in shards])
        self.class_names = list(class_names)
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        self.provenance = dict(provenance)
        self.has_flip = f"{self._names[0]}_flip" in shards[0]
        self.is_posterior = self._names == POSTERIOR
        self.dtype = shards[0][self._names[0]].dtype

    def read(self, items: torch.Tensor, flips: torch.Tensor | None = None):
        """Posteriors of `items` (B,) int64, mirrored where `flips` (B,) bool says so.

        Returns:
            (mean, log_variance), each (B, C, h, w) float32; log_variance is None for a cache of fixed latents.
        """
        outputs = [torch.empty(len(items), *self.latent_shape) for _ in self._names]
        shard_of = torch.searchsorted(self._ends, items, right=True)
        for number in shard_of.unique().tolist():
            shard = self._shards[number]
            first = int(self._ends[number]) - len(shard["labels"])
            for flipped in (False, True) if flips is not None else (False,):
                here = shard_of == number
                if flips is not None:
                    here &= flips == flipped
                for name, output in zip(self._names, outputs):
                    source = shard[f"{name}_flip" if flipped else name]
                    output[here] = source[items[here] - first].float()
        return outputs[0], outputs[1] if len(outputs) == 2 else None

    def check(self, *, fingerprint: str | None = None, image_size: int | None = None) -> None:
        """Refuse a cache made by another autoencoder or at another image size.

        Raises:
            ValueError: one sentence with what the cache holds and what was expected.
        """
        _check_provenance(self.provenance, fingerprint, image_size)

    def variance_note(self) -> str | None:
        """A sentence if a channel is far from unit variance, which the flow's noise schedule assumes; else None."""
        far = [c for c, value in enumerate(self.std.tolist()) if not 0.5 <= value <= 2.0]
        if not far:
            return None
        values = ", ".join(f"{value:.3g}" for value in self.std.tolist())
        return (
            f"Latent channels {far} are far from unit variance (standard deviations {values}): "
            "check the autoencoder's scaling_factor."
        )

    @classmethod
    def open(cls, folder, *, fingerprint=None, image_size=None, verify: bool | None = None) -> "LatentCache":
        """Open a folder that `encode_images` has finished.

        Args:
            folder: where stats.json and the shards are.
            fingerprint, image_size: if given, what the latents must have been made with.
            verify: compare every shard's checksum: True always, False never, None once per file and machine.

        Raises:
            ValueError: not a finished cache, a damaged or missing shard, or another autoencoder or size.
        """
        folder = Path(folder).expanduser()
        stats = _read_stats(folder)
        _check_provenance(stats["provenance"], fingerprint, image_size)  # before gigabytes are read
        _verify(folder, stats["shards"], verify)
        shards = [_map_shard(folder / row["file"], row["items"]) for row in stats["shards"]]
        return cls(shards, stats["class_names"], stats["mean"], stats["std"], stats["provenance"])


def moments(shards, names) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of posterior draws: var = E[mean^2] - E[mean]^2 + E[exp(log_variance)].

    `shards` yields dicts of tensors (n, C, h, w); sums run in float64.
    """
    count, total, squares = 0, 0.0, 0.0
    for shard in shards:
        mean = shard[names[0]].double()
        count += mean.numel() // mean.shape[1]
        total = total + mean.sum(dim=(0, 2, 3))
        squares = squares + mean.square().sum(dim=(0, 2, 3))
        if len(names) == 2:
            squares = squares + shard[names[1]].double().exp().sum(dim=(0, 2, 3))
    average = total / count
    return average.tolist(), (squares / count - average.square()).clamp(min=0).sqrt().tolist()


def file_checksum(path) -> int:
    """CRC-32 of a file's bytes: finds a flipped bit, at the speed of the disk."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def read_header(path) -> dict | None:
    """The provenance inside a shard, or None where the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["lfm_fast"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _check_provenance(provenance: dict, fingerprint, image_size) -> None:
    made_by, side = provenance.get("fingerprint"), provenance.get("image_size")
    if fingerprint is not None and fingerprint != made_by:
        raise ValueError(
            f"These latents were made by the autoencoder {provenance.get('autoencoder')} with fingerprint {made_by}, "
            f"but the one in use has {fingerprint}: encode the images again."
        )
    if image_size is not None and image_size != side:
        raise ValueError(
            f"These latents were made from {side}-pixel images, but {image_size} pixels are asked for: "
            "encode the images again at that size."
        )


def _read_stats(folder: Path) -> dict:
    if not folder.is_dir():
        raise ValueError(f"The latent cache {folder} does not exist: make it with encode_images or `lfm-fast encode`.")
    path = folder / STATS_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {STATS_FILE}: it is no latent cache, or its encoding was interrupted; "
            "encode again and it goes on where it stopped."
        )
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        lists = [stats["class_names"], stats["mean"], stats["std"], stats["shards"]]
        rows = [(str(row["file"]), int(row["items"]), int(row["bytes"]), int(row["crc32"])) for row in stats["shards"]]
        known = stats["format"] == FORMAT and isinstance(stats["provenance"], dict) and rows
        whole = known and all(isinstance(part, list) for part in lists) and all(map(math.isfinite, stats["std"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it and encode again.") from error
    if not whole:
        raise ValueError(f"{path} is not of format {FORMAT}, which this version reads: encode the images again.")
    return stats


def _verify(folder: Path, rows: list[dict], verify: bool | None) -> None:
    """Sizes always; checksums where asked, or where this machine has not yet compared this very file."""
    known = read_note("shards", folder)
    new = []
    for row in rows:
        path = folder / row["file"]
        if not path.is_file():
            raise ValueError(f"Shard {path} is missing: encode again into the same folder and only it is made anew.")
        status = path.stat()
        if status.st_size != row["bytes"]:
            raise _damaged(path, f"it has {status.st_size} bytes instead of {row['bytes']}")
        key = [status.st_size, status.st_mtime_ns, row["crc32"]]
        if verify or (verify is None and known.get(row["file"]) != key):
            new.append((path, row, key))
    with ThreadPoolExecutor(4) as pool:
        for (path, row, key), value in zip(new, pool.map(file_checksum, (path for path, _, _ in new))):
            if value != row["crc32"]:
                raise _damaged(path, "its checksum differs from the one in stats.json")
            known[row["file"]] = key
    if new:
        write_note("shards", folder, known)


def _damaged(path, why) -> ValueError:
    return ValueError(f"Shard {path} is damaged ({why}): delete it, encode again, and only it is made anew.")


def _map_shard(path: Path, items: int) -> dict[str, torch.Tensor]:
    """The shard's tensors, memory-mapped: rows are read from the disk when they are asked for."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    if len(shard.get("labels", ())) != items or not ("latents" in shard or "mean" in shard):
        raise _damaged(path, f"it does not hold {items} items with labels")
    return shard

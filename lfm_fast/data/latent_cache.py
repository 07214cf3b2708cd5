"""Encoded images on disk: safetensors shards, read row by row, with statistics, provenance and checksums beside them.

A folder holds `latents-00000.safetensors`, ... and `stats.json`. A shard has `mean` and `log_variance` (n, C, h, w), or
`latents` alone; the same with `_flip` for mirrored images if they were encoded; and `labels` (n,). All in latent units.
"""

import json
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lfm_fast.checkpoint import atomic_write
from lfm_fast.data.cache import file_state, read_note, write_note
from lfm_fast.data.shards import file_checksum, open_shard

FORMAT = 1
STATS_FILE = "stats.json"
POSTERIOR, LATENTS = ("mean", "log_variance"), ("latents",)
_NUMBERS_AT_ONCE = 1 << 18  # summed in float64 at a time


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
        outputs = [torch.empty(len(items), *self.latent_shape, device="cpu") for _ in self._names]
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
        shards = [_map(folder / row["file"], row["items"]) for row in stats["shards"]]
        if len({layout_of(shard) for shard in shards}) > 1:
            raise ValueError(f"{folder} holds shards of different kinds: delete it and encode again.")
        cache = cls(shards, stats["class_names"], stats["mean"], stats["std"], stats["provenance"])
        if not 0 <= int(cache.labels.min()) <= int(cache.labels.max()) < len(cache.class_names):
            raise ValueError(f"{folder} has labels beyond its {len(cache.class_names)} classes: encode again.")
        return cache


def sums_of(shard: dict, names) -> tuple[int, list[float], list[float]]:
    """(elements per channel, sum of E[z], sum of E[z^2]) of posterior draws of a shard, per channel, in float64.

    E[z^2] = mean^2 + exp(log_variance). A few rows at a time: a shard may be larger than the memory.
    """
    rows = shard[names[0]]
    count, total, squares = 0, 0.0, 0.0
    step = max(1, _NUMBERS_AT_ONCE // max(1, rows.shape[1:].numel()))
    for first in range(0, len(rows), step):
        mean = rows[first : first + step].double()
        count += mean.numel() // mean.shape[1]
        total = total + mean.sum(dim=(0, 2, 3))
        squares = squares + mean.square().sum(dim=(0, 2, 3))
        if len(names) == 2:
            squares = squares + shard[names[1]][first : first + step].double().exp().sum(dim=(0, 2, 3))
    return count, total.tolist(), squares.tolist()


def moments(sums) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of what `sums_of` gave for all shards, added in their order."""
    counts, totals, squares = zip(*sums)
    count = sum(counts)
    average = torch.tensor(totals, dtype=torch.float64).sum(0) / count
    square = torch.tensor(squares, dtype=torch.float64).sum(0) / count
    return average.tolist(), (square - average.square()).clamp(min=0).sqrt().tolist()


def write_stats(folder: Path, content: dict) -> None:
    """stats.json, with a checksum over all that it says; with it the cache is finished."""
    content = {"format": FORMAT} | content
    with atomic_write(folder / STATS_FILE) as temporary:
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


def known_checksums(folder: Path) -> dict[str, int]:
    """The checksum of each shard that stats.json knows; none where there is no such file that can be read."""
    try:
        return {row["file"]: row["crc32"] for row in _read_stats(folder)["shards"]}
    except ValueError:
        return {}


def note_checksums(folder: Path, rows, states) -> None:
    """Remember that this machine has compared these files, when they were in these states."""
    write_note("shards", folder, {row["file"]: [*state, row["crc32"]] for row, state in zip(rows, states)})


def _check_provenance(provenance: dict, fingerprint, image_size) -> None:
    made_by, side = provenance.get("fingerprint"), provenance.get("image_size")
    if made_by is None and isinstance(provenance.get("format"), str):
        return  # another tool's files do not say what they were made with
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
        known = stats["format"] == FORMAT
        if known:
            _require_whole(stats)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it and encode again.") from error
    if not known:
        raise ValueError(f"{path} is not of format {FORMAT}, which this version reads: encode the images again.")
    return stats


def _require_whole(stats: dict) -> None:
    """Raise an error of some kind for statistics that `write_stats` would not have written."""
    if "checksum" in stats:  # older ones have none
        content = {name: value for name, value in stats.items() if name != "checksum"}
        if stats["checksum"] != _checksum(content):
            raise ValueError("checksum")
    rows, mean, std = stats["shards"], stats["mean"], stats["std"]
    counts = [int(number) for row in rows for number in (row["items"], row["bytes"], row["crc32"])]
    names = [row["file"] == shard_name(number) for number, row in enumerate(rows)]
    if not (rows and all(names) and min(counts) >= 0 and len(mean) == len(std) > 0):
        raise ValueError("rows")
    if not all(math.isfinite(value) for value in [*mean, *std]) or not isinstance(stats["provenance"], dict):
        raise ValueError("values")
    if not (isinstance(stats["class_names"], list) and all(isinstance(name, str) for name in stats["class_names"])):
        raise ValueError("class names")


def _checksum(content: dict) -> int:
    """CRC-32 of the content itself, not of how it is laid out."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def shard_name(number: int) -> str:
    """The file of a shard, numbered from 0 in the order of the items."""
    return f"latents-{number:05d}.safetensors"


def _verify(folder: Path, rows: list[dict], verify: bool | None) -> None:
    """Sizes always; checksums where asked, or where this machine has not yet compared this very file."""
    known = read_note("shards", folder)
    new = []
    for row in rows:
        path = folder / row["file"]
        if not path.is_file():
            raise ValueError(f"Shard {path} is missing: encode again into the same folder and only it is made anew.")
        state = [*file_state(path.stat()), row["crc32"]]
        if state[0] != row["bytes"]:
            raise _damaged(path, f"it has {state[0]} bytes instead of {row['bytes']}")
        if verify or (verify is None and known.get(row["file"]) != state):
            new.append((path, row, state))
    with ThreadPoolExecutor(4) as pool:
        for (path, row, state), value in zip(new, pool.map(file_checksum, (path for path, _, _ in new))):
            if value != row["crc32"]:
                raise _damaged(path, "its checksum differs from the one in stats.json")
            known[row["file"]] = state
    if new:
        write_note("shards", folder, known)


def _damaged(path, why) -> ValueError:
    return ValueError(f"Shard {path} is damaged ({why}): encode again into the same folder and only it is made anew.")


def _map(path: Path, items: int) -> dict[str, torch.Tensor]:
    try:
        shard = open_shard(path)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if any(len(tensor) != items for tensor in shard.values()) or not layout_of(shard):
        raise _damaged(path, f"it does not hold {items} items with labels")
    return shard


def names_in(shard: dict) -> tuple[str, ...]:
    """The tensors that a latent of the shard is made of: a posterior's two, or the latent itself."""
    return POSTERIOR if "mean" in shard else LATENTS


def layout_of(shard: dict) -> tuple | None:
    """What the shards of a cache have in common: tensors, types, and shape of a latent; None if they are none."""
    names = names_in(shard)
    whole = [name + suffix for suffix in (("", "_flip") if f"{names[0]}_flip" in shard else ("",)) for name in names]
    if sorted(shard) != sorted([*whole, "labels"]) or shard["labels"].ndim != 1:
        return None
    shapes = {tuple(shard[name].shape[1:]) for name in whole}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        return None
    return tuple(sorted(whole)), shapes.pop(), *(str(shard[name].dtype) for name in (names[0], "labels"))

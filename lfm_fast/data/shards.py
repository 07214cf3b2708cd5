"""A shard of latents: one safetensors file, written a batch at a time, checked whole, and read memory-mapped.

The format is eight bytes with the length of a JSON header, the header, and the tensors' bytes in the header's order.
Beside the tensors the header says what the shard is of (`lfm_fast`) and has the CRC-32 of every tensor (`crc32`), which
is why it is put in place last.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lfm_fast.checkpoint import atomic_write

_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_PIECE = 1 << 22  # bytes looked at in one go


@contextlib.contextmanager
def write_shard(path: Path, labels: Tensor, provenance: dict) -> Iterator["ShardWriter"]:
    """Give a writer for the shard of `labels` (n,); the file is in place, whole, when the block ends without an error.

    Memory holds the rows of one `append` and never a shard. Raises OSError with one sentence where it cannot be
    written.

        with write_shard(path, labels, provenance) as shard:
            shard.append({"mean": mean, "log_variance": log_variance})  # (b, C, h, w) each, until there are n
    """
    with atomic_write(path) as temporary, open(temporary, "wb", buffering=0) as file:
        writer = ShardWriter(file, labels, provenance)
        yield writer
        writer.finish()


class ShardWriter:
    """Puts rows where they belong in the file of a shard, whose layout the first rows decide."""

    def __init__(self, file, labels: Tensor, provenance: dict):
        self._file, self._labels, self._provenance = file, labels, provenance
        self._places = None  # by name: (dtype, shape of a row, offset of the tensor), in the order of the file
        self._sums, self._done = {}, 0

    @property
    def missing(self) -> int:
        """How many rows are still to come."""
        return len(self._labels) - self._done

    def append(self, rows: dict[str, Tensor]) -> None:
        """The next rows of every tensor but the labels, (b, ...) each, on any device."""
        if self._places is None:
            self._lay_out(rows)
        for name, values in rows.items():
            self._put(name, values, self._done)
        self._done += len(next(iter(rows.values())))

    def finish(self) -> None:
        """The labels, and the header with every checksum."""
        assert self.missing == 0, f"{self.missing} rows were not written"
        self._put("labels", self._labels, 0)
        _write_at(self._file, self._header(), 0)

    def _lay_out(self, rows):
        tensors = {"labels": self._labels} | rows
        # widest numbers first: every tensor then lies at a multiple of its numbers' size
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        self._places, offset = {}, 0
        for name in order:
            dtype, shape = tensors[name].dtype, tuple(tensors[name].shape[1:])
            self._places[name] = (dtype, shape, offset)
            self._sums[name] = 0
            offset += len(self._labels) * _row_bytes(dtype, shape)

    def _put(self, name, values, first):
        dtype, shape, offset = self._places[name]
        assert (values.dtype, tuple(values.shape[1:])) == (dtype, shape), name
        data = _bytes_of(values)
        self._sums[name] = zlib.crc32(data, self._sums[name])
        _write_at(self._file, data, len(self._header()) + offset + first * _row_bytes(dtype, shape))

    def _header(self) -> bytes:
        sums = {name: f"{value:08x}" for name, value in self._sums.items()}  # of fixed width: so is the header
        header = {"__metadata__": {"lfm_fast": json.dumps(self._provenance), "crc32": json.dumps(sums)}}
        for name, (dtype, shape, offset) in self._places.items():
            end = offset + len(self._labels) * _row_bytes(dtype, shape)
            shape = [len(self._labels), *shape]
            header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _row_bytes(dtype, shape) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _write_at(file, data, offset: int) -> None:
    """All of `data`: a disk that is about to be full takes a part of it before it says so."""
    data = memoryview(data)
    while len(data):
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written


def read_header(path) -> dict | None:
    """What a shard says it is of, or None where the file is missing or damaged."""
    return (_metadata(path) or {}).get("lfm_fast")


def map_shard(path) -> dict[str, Tensor]:
    """The shard's tensors, memory-mapped: rows are read from the disk when they are asked for.

    Raises:
        ValueError: missing, truncated, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def is_whole(path) -> bool:
    """Whether every tensor of the shard has the checksum that the header says; reads all of the file."""
    sums = (_metadata(path) or {}).get("crc32")
    try:
        tensors = map_shard(path)
    except ValueError:
        return False
    # a shard of before there were checksums is held against its lengths alone
    return sums is None or sums == {name: f"{_crc(tensor):08x}" for name, tensor in tensors.items()}


def file_checksum(path) -> int:
    """CRC-32 of a file's bytes: finds a flipped bit, at the speed of the disk."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_PIECE):
            value = zlib.crc32(block, value)
    return value


def _crc(tensor: Tensor) -> int:
    data, value = _bytes_of(tensor), 0
    for first in range(0, len(data), _PIECE):
        value = zlib.crc32(data[first : first + _PIECE], value)
    return value


def _metadata(path) -> dict | None:
    """The entries of the header's metadata that are JSON, or None where the file cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
    except (OSError, SafetensorError, ValueError, RecursionError):
        return None
    return found if isinstance(found.get("lfm_fast"), dict) else None

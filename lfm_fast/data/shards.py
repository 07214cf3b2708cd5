"""A shard of latents: one safetensors file, written a batch at a time, checked whole, and read row by row.

The format is eight bytes with the length of a JSON header, the header, and the tensors' bytes in the header's order.
Beside the tensors the header says what the shard is of (`lfm_fast`) and has the CRC-32 of every tensor (`crc32`), which
is why it is put in place last.
"""

import contextlib
import json
import os
import resource
import sys
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lfm_fast.checkpoint import atomic_write
from lfm_fast.data.cache import file_state

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}  # labels that others have written
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PIECE = 1 << 22  # bytes looked at in one go
_ENDS = 1 << 12  # bytes at either end of a file that tell it from another: the first hold a header with checksums


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


class ShardRows:
    """A tensor (n, ...) of a shard, of which rows are read from the file when they are asked for.

    The file is not mapped: where a mapped one is cut short, or its disk fails, a signal ends the process. Here that is
    a ValueError, whenever it happens.
    """

    def __init__(self, file: "_File", dtype: torch.dtype, shape, offset: int):
        self.dtype, self.shape = dtype, torch.Size(shape)
        self._file, self._offset, self._row_bytes = file, offset, _row_bytes(dtype, self.shape[1:])

    def __len__(self):
        return self.shape[0] if self.shape else 0

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, rows) -> Tensor:
        """(b, ...) of a slice or of row numbers (b,). Raises ValueError where the file no longer is what it was."""
        runs = _runs(range(len(self))[rows] if isinstance(rows, slice) else rows.tolist())
        found = torch.empty(sum(map(len, runs)), *self.shape[1:], dtype=self.dtype, device="cpu")
        self._file.read(_bytes_of(found), [(self._place(run[0]), len(run) * self._row_bytes) for run in runs])
        return found

    def _place(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self._offset + row * self._row_bytes


def _runs(rows) -> list:
    """Rows that follow each other, put together: they are read in one go."""
    if isinstance(rows, range) and rows.step == 1:
        return [rows] if rows else []
    runs = []
    for row in rows:
        if runs and row == runs[-1].stop:
            runs[-1] = range(runs[-1].start, row + 1)
        else:
            runs.append(range(row, row + 1))
    return runs


class _File:
    """A file as it was when it was opened here, from which pieces are read: what has changed since is refused.

    It stays open, so that one that is deleted or replaced is read on; with many of them only as long as half of the
    descriptors that a process may have are left, and the others are opened anew for every read.
    """

    _held = weakref.WeakSet()  # those that stay open

    def __init__(self, path):
        self.path, self._descriptor = path, None
        with self._opened() as descriptor:
            self._state, self._ends = self._seen(descriptor)

    def __getstate__(self):
        return {**vars(self), "_descriptor": None}  # a descriptor is of one process

    def read(self, data: memoryview, pieces: list[tuple[int, int]]) -> None:
        """Fill `data` with the pieces of the file (place, length), one behind the other."""
        try:
            with self._opened() as descriptor:
                self._require_same(descriptor)
                start = 0
                for place, size in pieces:
                    done = _read_into(data[start : start + size], descriptor, place)
                    while done < size:  # a network file system may give less at once
                        more = _read_into(data[start + done : start + size], descriptor, place + done)
                        if not more:
                            raise self._changed()
                        done += more
                    start += size
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read any more ({error.strerror}).") from error

    def _require_same(self, descriptor):
        """By its size and time; if that alone has changed it may have been touched, and its ends tell."""
        if file_state(os.fstat(descriptor)) == self._state:
            return
        state, ends = self._seen(descriptor)
        if (state[0], ends) != (self._state[0], self._ends):
            raise self._changed()
        self._state = state

    @staticmethod
    def _seen(descriptor):
        state = file_state(os.fstat(descriptor))
        return state, os.pread(descriptor, _ENDS, 0) + os.pread(descriptor, _ENDS, max(0, state[0] - _ENDS))

    def _changed(self):
        return ValueError(f"{self.path} was changed or cut short while it was in use: make or copy it again.")

    @contextlib.contextmanager
    def _opened(self):
        if self._descriptor is not None:
            yield self._descriptor
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        if len(self._held) < _most_held():
            self._held.add(self)
            self._descriptor = descriptor
            weakref.finalize(self, os.close, descriptor)
            yield descriptor
            return
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _read_into(data: memoryview, descriptor: int, place: int) -> int:
    """How many bytes came from there."""
    if hasattr(os, "preadv"):  # not on every macOS
        return os.preadv(descriptor, [data], place)
    found = os.pread(descriptor, len(data), place)
    data[: len(found)] = found
    return len(found)


def _most_held() -> int:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if allowed == resource.RLIM_INFINITY else allowed // 2


def open_shard(path) -> dict[str, Tensor | ShardRows]:
    """The shard's tensors: the labels, and `ShardRows` for all else.

    Raises:
        ValueError: missing, truncated, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = _File(path)
        with safe_open(path, framework="pt"):  # it holds the header against the file's length, and so on
            head = _read(file, 0, 8)
            size = int.from_bytes(head, "little")
            header = json.loads(_read(file, 8, size))
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"it holds {name} in {entry['dtype']}, which is not known here")
        found[name] = ShardRows(file, _DTYPES[entry["dtype"]], entry["shape"], 8 + size + entry["data_offsets"][0])
    return {name: rows[:] if name == "labels" and rows.shape else rows for name, rows in found.items()}


def _read(file, offset, size) -> bytes:
    data = bytearray(size)
    file.read(memoryview(data), [(offset, size)])
    return bytes(data)


def is_whole(path) -> bool:
    """Whether every tensor of the shard has the checksum that the header says; reads all of the file."""
    sums = (_metadata(path) or {}).get("crc32")
    try:
        tensors = open_shard(path)
        # a shard of before there were checksums is held against its lengths alone
        return sums is None or sums == {name: f"{_crc(tensor):08x}" for name, tensor in tensors.items()}
    except ValueError:
        return False


def file_checksum(path) -> int:
    """CRC-32 of a file's bytes: finds a flipped bit, at the speed of the disk."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_PIECE):
            value = zlib.crc32(block, value)
    return value


def _crc(rows: Tensor | ShardRows) -> int:
    step, value = max(1, _PIECE // max(1, _row_bytes(rows.dtype, rows.shape[1:]))), 0
    for first in range(0, len(rows), step):
        value = zlib.crc32(_bytes_of(rows[first : first + step]), value)
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

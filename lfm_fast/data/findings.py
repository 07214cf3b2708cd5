"""What looking at every picture once has told, and how it is kept for later runs: 28 bytes for each, in columns.

As JSON those of ImageNet would take some 200 MB, and a gigabyte of memory while they are read.
"""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

from lfm_fast.checkpoint import atomic_write
from lfm_fast.data.reading import Checked

_COLUMNS = ("marks", "sizes", "said")


class Findings:
    """What is known of N pictures: `findings[k]` is the `Checked` of picture k, where `known[k]`.

    Args:
        marks: (N, 2) uint64, as `marks_of` gives them.
    """

    def __init__(self, marks: np.ndarray):
        self.marks, self.known = marks, np.zeros(len(marks), bool)
        self.sizes = np.zeros((len(marks), 2), np.uint32)  # width and height
        self._said = np.zeros(len(marks), np.uint32)  # which of the texts
        self._texts, self._places = [(None, None)], {(None, None): 0}  # (conversion, reason): many pictures share few

    def __len__(self):
        return len(self.marks)

    def __getitem__(self, position: int) -> Checked:
        assert self.known[position]
        return Checked(*self.sizes[position].tolist(), *self._texts[self._said[position]])

    def __setitem__(self, position: int, found: Checked) -> None:
        text = (found.conversion, found.reason)
        if text not in self._places:
            self._places[text] = len(self._texts)
            self._texts.append(text)
        self._said[position] = self._places[text]
        self.sizes[position], self.known[position] = (found.width, found.height), True

    def save(self, path: Path, form: str) -> None:
        """Keep what is known, for `found_before` of the same `form`; where it cannot be written, it is found again."""
        from safetensors.numpy import save_file

        columns = {"marks": self.marks, "sizes": self.sizes, "said": self._said}
        columns = {name: np.ascontiguousarray(column[self.known]) for name, column in columns.items()}
        try:
            with atomic_write(path) as temporary:
                said = {"form": form, "texts": json.dumps(self._texts)}
                save_file(columns, temporary, said | {"crc32": str(_checksum(columns, said))})
        except OSError:
            return


def found_before(path: Path, form: str, marks: np.ndarray) -> Findings:
    """The `Findings` of `marks`, with what an earlier run has kept there in this form of those that have not changed.

    Nothing is known where that is lost, damaged or of another form.
    """
    from safetensors import SafetensorError, safe_open

    found = Findings(marks)
    try:
        with safe_open(path, framework="np") as file:
            said = file.metadata() or {}
            columns = {name: file.get_tensor(name) for name in _COLUMNS}
        if said["form"] != form or said["crc32"] != str(_checksum(columns, said)):
            return found
    except (OSError, SafetensorError, KeyError):
        return found
    found._texts = [tuple(text) for text in json.loads(said["texts"])]
    found._places = {text: place for place, text in enumerate(found._texts)}
    places = _places_in(columns["marks"], marks)
    found.known = places >= 0
    found.sizes[found.known] = columns["sizes"][places[found.known]]
    found._said[found.known] = columns["said"][places[found.known]]
    return found


def _checksum(columns, said) -> int:
    value = zlib.crc32((said["form"] + said["texts"]).encode())
    for name in _COLUMNS:
        value = zlib.crc32(np.ascontiguousarray(columns[name]).view(np.uint8), value)
    return value


def marks_of(names: list[str], keys: list) -> np.ndarray:
    """(N, 2) uint64: 128 bits of a hash of each picture's name and of `Store.key`, which changes when it does.

    Example:
        >>> before, after = marks_of(["a", "b"], [[7, 1], [7, 1]]), marks_of(["a", "b"], [[7, 1], [7, 2]])
        >>> (before == after).all(axis=1).tolist()
        [True, False]
    """
    digests = bytearray()
    for name, key in zip(names, keys):
        text = f"{key}\0{name}".encode("utf-8", "surrogatepass")
        digests += hashlib.blake2b(text, digest_size=16).digest()
    return np.frombuffer(bytes(digests), "<u8").astype(np.uint64).reshape(-1, 2)


def _places_in(marks: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of the wanted marks is among `marks`, or -1."""
    if not len(marks):
        return np.full(len(wanted), -1)
    order = np.argsort(marks[:, 0])
    places = order[np.searchsorted(marks[order, 0], wanted[:, 0]).clip(max=len(marks) - 1)]
    return np.where((marks[places] == wanted).all(axis=1), places, -1)

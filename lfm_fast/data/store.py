"""Where pictures lie, whatever the form: names, labels, and the bytes of each, read by position."""

import io
import itertools
import os
import re
from typing import BinaryIO

from lfm_fast.data.reading import UnusableImage


class Store:
    """Pictures on a disk, random access by position; `StoredImages` makes training pictures of them.

    Attributes: name, what provenance calls it; path, where it lies; names and labels, one per picture; class_names, in
    order of label; skipped, [(name, reason)] of what was left out on listing it. raw_shape is None where pictures are
    encoded files (JPEG, PNG, ...), and (H, W, 3) where their bytes are bare RGB. Where each picture has a label map,
    palette names what its ids are, and maps is the folder of the maps or something that pairs and reads them as
    `MappedImages` asks. Subclasses implement `key` and `read`; both are called from many threads at once.
    """

    raw_shape: tuple[int, int, int] | None = None
    palette: str | None = None
    maps = None

    def __init__(self, path, name: str, names, labels, class_names, skipped=()):
        self.path, self.name = path, name
        self.names, self.labels, self.class_names = list(names), list(labels), list(class_names)
        self.skipped = list(skipped)
        assert len(self.names) == len(self.labels) == len(set(self.names))

    def __len__(self):
        return len(self.names)

    def key(self, position: int) -> list | None:
        """What changes when the picture does, as JSON (a size and a time, a checksum); None: it cannot be reached."""
        raise TypeError(f"{type(self).__name__} must implement key(position)")

    def read(self, position: int) -> bytes:
        """The picture's bytes. Raises `UnusableImage` with the reason where they cannot be had."""
        raise TypeError(f"{type(self).__name__} must implement read(position)")

    def open(self, position: int) -> BinaryIO:
        """The same as a file, for who needs its first bytes alone. Raises as `read`."""
        return io.BytesIO(self.read(position))

    def keep_first(self, count: int) -> None:
        """Forget all pictures but the first `count`."""
        self.names, self.labels = self.names[:count], self.labels[:count]


def require_whole_use(path, split: str) -> None:
    """Refuse a split of what has none. Raises ValueError."""
    if split not in ("train", "all"):
        raise ValueError(
            f"split={split!r}: {path} is used whole; keep held-out images in a place of their own, and give that."
        )


def first_names(folder, count: int = 10_000) -> list[str]:
    """Up to `count` names in a folder, in no order: enough to see what it is. None of what is no folder."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return [entry.name for entry in itertools.islice(entries, count)]


def numbered_classes(labels) -> list[str]:
    """Names of classes of which only numbers are known: 0 to the highest."""
    return [str(k) for k in range(max(labels, default=-1) + 1)]


MAX_LABEL = 999_999  # what is above is no label but a damaged one, and each class costs a row of a network
_NUMBER = re.compile(r"\s*[0-9]{1,6}\s*")


def label_of(given) -> int:
    """A label, as text, bytes or a number. Raises UnusableImage for what is none."""
    text = given.decode("ascii", "replace") if isinstance(given, bytes) else given
    if isinstance(text, str) and _NUMBER.fullmatch(text):
        return int(text)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= MAX_LABEL:
        return given
    shown = repr(given)
    raise UnusableImage(f"its label {shown if len(shown) <= 40 else shown[:37] + '...'} is no number up to {MAX_LABEL}")

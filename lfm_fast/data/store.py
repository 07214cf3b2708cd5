"""Where pictures lie, whatever the form: names, labels, and the bytes of each, read by position."""

import io
from typing import BinaryIO


class Store:
    """Pictures on a disk, random access by position; `StoredImages` makes training pictures of them.

    Attributes: name, what provenance calls it; path, where it lies; names and labels, one per picture; class_names, in
    order of label. raw_shape is None where pictures are encoded files (JPEG, PNG, ...), and (H, W, 3) where their bytes
    are bare RGB. Subclasses implement `key` and `read`; both are called from many threads at once.
    """

    raw_shape: tuple[int, int, int] | None = None

    def __init__(self, path, name: str, names, labels, class_names):
        self.path, self.name = path, name
        self.names, self.labels, self.class_names = list(names), list(labels), list(class_names)
        assert len(self.names) == len(self.labels)

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

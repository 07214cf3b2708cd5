"""A file that holds many pictures, read piece by piece from any thread or process, and never another file."""

import contextlib
import os
import stat

from lfm_fast.data.cache import file_state
from lfm_fast.data.reading import MAX_BYTES, UnusableImage


class Archive:
    """One file, as large and as old as when it was opened here.

    Every read opens it anew: nothing is shared with a forked process, and a file that was replaced, cut or deleted
    since is a reason and never a piece of something else. Attributes: path, size in bytes, and key, which changes when
    the file does.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, path):
        self.path = path
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be opened ({getattr(error, 'strerror', error)}).") from error
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file.")
        self.size, self.key = status.st_size, file_state(status)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. Raises UnusableImage where they cannot be had."""
        with self.opened() as read:
            return read(offset, size)

    @contextlib.contextmanager
    def opened(self):
        """Gives read(offset, size) for many pieces of one opening."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                if file_state(os.fstat(file.fileno())) != self.key:
                    raise UnusableImage("its archive has changed since it was opened")
                yield lambda offset, size: self._piece(file.fileno(), offset, size)
        except OSError as error:
            raise UnusableImage(f"its archive cannot be read ({error.strerror})") from error

    def current_key(self) -> list | None:
        """`key` as it is now; None where the file cannot be reached."""
        try:
            return file_state(os.stat(self.path))
        except OSError:
            return None

    def _piece(self, descriptor, offset, size):
        if size > MAX_BYTES:
            raise UnusableImage(f"its {size} bytes are more than a picture can have")
        if not 0 <= offset <= offset + size <= self.size:
            raise UnusableImage("it lies behind the end of its archive")
        data = os.pread(descriptor, size, offset)
        while len(data) < size:  # a network file system may give less at once
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise UnusableImage("it lies behind the end of its archive")
            data += more
        return data

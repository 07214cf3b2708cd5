"""Encoded pictures to the square ones that training reads: by Pillow, or by NVIDIA DALI where that is faster."""

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from lfm_fast.data.reading import UnusableImage, centre_square, decode
from lfm_fast.data.resizing import square_of

DECODERS = ("auto", "pil", "dali")
WORTH_DALI = 10_000  # pictures from which on the second that DALI takes to start is earned back
THREADS = min(16, os.cpu_count() or 1)  # Pillow decodes without holding Python's lock
_pools: dict[int, ThreadPoolExecutor] = {}


class UndecodableImage(UnusableImage):
    """Number `place` of the pictures given cannot be decoded; the message is the reason."""

    def __init__(self, place: int, reason: str):
        super().__init__(reason)
        self.place = place


def workers() -> ThreadPoolExecutor:
    """This process's decoding threads: a forked one inherits a pool without its threads and needs its own."""
    process = os.getpid()
    if process not in _pools:
        _pools[process] = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
    return _pools[process]


def decoder_named(name: str = "auto", device="cpu", *, count: int | None = None):
    """What turns encoded pictures into a batch: its `decode(contents, image_size)`.

    Args:
        name: "pil", Pillow alone, which decodes every picture whole; "dali", DALI on the CPU or, for a CUDA device, on
            that (never run on a GPU so far); "auto", the fastest that is there, on the CPU: DALI for `count` pictures
            that are worth its start, and for JPEGs four times as large as asked for Pillow at half the resolution.
        device: where the pictures are wanted.
        count: how many pictures there are, if known.

    Raises:
        ValueError: another name, or "dali" where DALI is not installed.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (40, 30), (9, 8, 7)).save(file, "png")
        >>> pictures = decoder_named("pil").decode([file.getvalue()], 16)
        >>> pictures.shape, pictures[0, :, 3, 3].tolist()
        (torch.Size([1, 3, 16, 16]), [9, 8, 7])
    """
    check_decoder(name)
    if name == "dali" and not dali_is_there():
        raise ValueError(
            "decoder='dali' needs NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda130 (its CPU part "
            "needs no GPU), or choose decoder='pil'."
        )
    pillow = PillowDecoder(draft=name == "auto", resizes=name == "pil")
    if name == "dali" or (name == "auto" and dali_is_there() and (count or 0) >= WORTH_DALI):
        from lfm_fast.data.dali import DaliDecoder

        return DaliDecoder(device if name == "dali" else "cpu", pillow)
    return pillow


def check_decoder(name: str) -> None:
    """Raises ValueError for a name that `decoder_named` does not know."""
    if name not in DECODERS:
        raise ValueError(f"decoder={name!r} is not known: choose 'auto', 'pil' or 'dali'.")


def dali_is_there() -> bool:
    """Whether DALI can be imported; it is not imported for that."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package "nvidia" at all
        return False


class PillowDecoder:
    """Pictures decoded by Pillow, in threads.

    Args:
        draft: decode JPEGs at half the resolution, or less, where that is still twice what is asked for.
        resizes: scale and cut pictures by Pillow too, and not by `square_of`, which is faster.
        raw_shape: (H, W, 3) of pictures that are bare RGB and need no decoding.
    """

    name = "pil"

    def __init__(self, *, draft=False, resizes=True, raw_shape: tuple[int, int, int] | None = None):
        self.draft, self.resizes, self.raw_shape = draft, resizes, raw_shape

    def decode(self, contents: Sequence[bytes], image_size: int) -> torch.Tensor:
        """The centre crops of encoded pictures, (B, 3, S, S) uint8, channels innermost in memory.

        `contents[k]` is looked up once for each k, in any thread, and may raise `UnusableImage`.

        Raises:
            UndecodableImage: one of them cannot be decoded.
        """
        pixels = np.empty((len(contents), image_size, image_size, 3), np.uint8)

        def some(places):
            for place in places:
                self.decode_one(pixels, place, content_at(contents, place))

        list(workers().map(some, pieces(len(contents), 2)))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def decode_one(self, pixels: np.ndarray, place: int, encoded: bytes) -> None:
        """Write one picture where it belongs in pixels (B, S, S, 3) uint8. Raises as `decode`."""
        with _naming(place):
            pixels[place] = self._square(encoded, pixels.shape[1])

    def _square(self, encoded, image_size) -> np.ndarray:
        if self.raw_shape == (image_size, image_size, 3) and len(encoded) == 3 * image_size**2:
            return np.frombuffer(encoded, np.uint8).reshape(self.raw_shape)
        at_least = 2 * image_size if self.draft else None
        picture = decode(encoded, raw_shape=self.raw_shape, at_least=at_least)
        if self.resizes or picture.size == (image_size, image_size):
            return np.asarray(centre_square(picture, image_size))
        return square_of(torch.from_numpy(np.array(picture)), image_size).numpy()


def pieces(count: int, size: int) -> list[range]:
    """0, ..., count - 1 in pieces: a task of the pool costs twenty microseconds."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def content_at(contents: Sequence[bytes], place: int) -> bytes:
    """contents[place]; what is wrong with it is said of this place."""
    with _naming(place):
        return contents[place]


@contextlib.contextmanager
def _naming(place: int):
    try:
        yield
    except UnusableImage as error:
        raise UndecodableImage(place, str(error)) from error

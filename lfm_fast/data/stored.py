"""Training pictures from any `Store`: every picture checked once before training counts on it, then cut to size."""

import contextlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import PIL
import torch
from tqdm import tqdm

from lfm_fast.data.cache import note_file
from lfm_fast.data.decoders import THREADS, PillowDecoder, UndecodableImage, decoder_named
from lfm_fast.data.findings import Findings, found_before, marks_of
from lfm_fast.data.reading import Checked, UnusableImage, check_image
from lfm_fast.data.source import ImageSource, Report
from lfm_fast.data.store import Store

CHECKS = ("decode", "headers")
_NOTE_FORMAT = f"3, Pillow {PIL.__version__}"  # another Pillow may read other files
_AT_ONCE = 4096  # pictures that wait for a thread to look at them


class StoredImages(ImageSource):
    """The usable pictures of a store, as an `ImageSource`.

    Every picture is decoded once up front, in threads, and what was found is remembered by the store's keys; with
    check="headers" only sizes are read, and a damaged picture stops the run that meets it. One that is skipped shifts
    no label. `.sizes` are (width, height) of the whole pictures, upright.

    Args:
        store: a `Store`.
        image_size: side in pixels of the centre crop.
        flip: allow mirrored pictures as augmentation.
        small: what to do with a picture whose shorter side is less than image_size: "skip", "upscale" or "error".
        check: "decode" or "headers".
        decoder: "auto", "pil" or "dali"; see `lfm_fast.data.decoders.decoder_named`.
        device: where batches are wanted; DALI decodes on a CUDA device, Pillow's batches stay on the CPU.

    Raises:
        ValueError: an unknown choice, or no picture that can be used.
    """

    def __init__(
        self,
        store: Store,
        image_size: int,
        *,
        flip: bool = False,
        small="skip",
        check="decode",
        decoder="auto",
        device="cpu",
    ):
        decode = decoder_named(decoder, device, count=len(store))  # its complaints, before all pictures are read
        if small not in ("skip", "upscale", "error"):
            raise ValueError(f"small={small!r} is not known: choose 'skip', 'upscale' or 'error'.")
        if check not in CHECKS:
            raise ValueError(f"check={check!r} is not known: choose 'decode' or 'headers'.")
        report = Report(skipped=[(printable(name), reason) for name, reason in store.skipped])
        names = [printable(name) for name in store.names]
        checked = _check_all(store, check)
        usable = [_usable(name, checked[k], image_size, small, report) for k, name in enumerate(names)]
        kept = [position for position, use in enumerate(usable) if use]
        if not kept:
            raise ValueError(f"None of the {len(store)} images in {store.path} can be used. {report.summary(3)}")
        labels = [store.labels[position] for position in kept]
        super().__init__(image_size, labels, store.class_names, [names[position] for position in kept], report)
        self.name, self.store, self.flip = store.name, store, flip
        self.sizes = [(width, height) for width, height in checked.sizes[kept].tolist()]
        self._kept = kept
        self.decoder = decode if store.raw_shape is None else PillowDecoder(raw_shape=store.raw_shape)
        if store.raw_shape is None:
            on_gpu = getattr(decode, "device", torch.device("cpu")).type == "cuda"
            self.decoded_by = f"{decoder} on cuda" if on_gpu else decoder

    def load(self, position: int) -> torch.Tensor:
        """The centre crop of picture number `position`, (3, H, W) uint8.

        Raises:
            ValueError: the picture has changed since it was checked and cannot be read any more.
        """
        return self.batch([position])[0]

    def batch(self, positions) -> torch.Tensor:
        """The pictures at `positions`, (B, 3, H, W) uint8, channels innermost in memory. Raises as `load`."""
        positions = [int(i) for i in positions]
        try:
            return self.decoder.decode(_Contents(self.store, [self._kept[i] for i in positions]), self.image_size)
        except UndecodableImage as error:
            raise ValueError(
                f"{self.names[positions[error.place]]} in {self.store.path} was readable when it was checked, but now "
                f"{error}: put it back, or start again to leave it out."
            ) from error


class _Contents:
    """The bytes of some of a store's pictures, each read when it is looked up."""

    def __init__(self, store: Store, positions: list[int]):
        self.store, self.positions = store, positions

    def __len__(self):
        return len(self.positions)

    def __getitem__(self, place: int) -> bytes:
        return self.store.read(self.positions[place])


def _check_all(store: Store, check: str) -> Findings:
    """Look at every picture that has changed since the last time; remembers the outcome in the cache folder."""
    subject = os.path.join(store.path, f"{store.name}, {store.raw_shape or 'encoded'}")  # a split, a list of several
    path = note_file(f"checked-{check}", subject)
    keys = [store.key(position) for position in range(len(store))]
    found = found_before(path, _NOTE_FORMAT, marks_of(store.names, keys))
    new = [k for k, known in enumerate(found.known.tolist()) if keys[k] is None or not known]
    if new:
        try:
            with warnings.catch_warnings(), contextlib.closing(_looked_at(store, new, check)) as fresh:
                warnings.simplefilter("ignore")  # large or odd files are reported by us, in one place
                bar = tqdm(fresh, total=len(new), desc="checking images", unit="image", leave=False, disable=None)
                for k, one in zip(new, bar):
                    found[k] = one
        finally:  # of millions, what was looked at until an interruption
            found.save(path, _NOTE_FORMAT)
    return found


def _looked_at(store: Store, positions: list[int], check: str):
    """What each of them is; closed early, it leaves the others alone."""
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(positions), _AT_ONCE):
            yield from pool.map(lambda k: _look(store, k, check), positions[first : first + _AT_ONCE])


def _look(store: Store, position: int, check: str) -> Checked:
    try:
        if check == "headers" and store.raw_shape is None:
            with store.open(position) as file:
                return check_image(file, whole=False)
        return check_image(store.read(position), raw_shape=store.raw_shape)
    except UnusableImage as error:
        return Checked(reason=str(error))


def _usable(name: str, found: Checked, image_size: int, small: str, report: Report) -> bool:
    if found.reason:
        report.skipped.append((name, found.reason))
        return False
    if min(found.width, found.height) < image_size and small != "upscale":
        reason = f"{found.width}x{found.height} pixels are less than the {image_size} asked for"
        if small == "error":
            raise ValueError(f"{name}: {reason}; leave it out (small='skip') or enlarge it (small='upscale').")
        report.skipped.append((name, reason))
        return False
    if found.conversion:
        report.converted.append((name, found.conversion))
    return True


def printable(name: str) -> str:
    """A name that any terminal and any UTF-8 file can take, whatever bytes the file system holds."""
    if name.isprintable():
        return name
    text = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

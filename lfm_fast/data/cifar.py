"""CIFAR-10 as it is handed out: pickled batches, read without running anything in them, or the binary version."""

from pathlib import Path

import numpy as np

from lfm_fast.data.archive import Archive
from lfm_fast.data.plain_pickle import Refused, read_plain_pickle
from lfm_fast.data.reading import UnusableImage
from lfm_fast.data.store import Store

SIDE = 32
_PIXELS = 3 * SIDE * SIDE
_BATCHES = {"train": [f"data_batch_{k}" for k in range(1, 6)], "held_out": ["test_batch"]}
_BATCHES["all"] = _BATCHES["train"] + _BATCHES["held_out"]
_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")  # what the archives unpack to
_MAX_BYTES = 1 << 28  # of a batch: published ones have 31 million
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class CifarStore(Store):
    """CIFAR-10: data_batch_1 to data_batch_5 and test_batch, as pickles or, with .bin behind, in the binary version.

    Args:
        path: the folder of the batches, or the one that cifar-10-batches-py or cifar-10-batches-bin lies in.
        split: "train" (50,000 pictures), "held_out" (10,000) or "all".

    Raises:
        ValueError: a batch is missing, damaged, or holds anything but pictures and labels.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; the data set's own page.
    """

    raw_shape = (SIDE, SIDE, 3)

    def __init__(self, path, split: str):
        path = _folder(Path(path).expanduser())
        binary = (path / "data_batch_1.bin").is_file() or (path / "test_batch.bin").is_file()
        self._archives, pixels, labels, names, self._of = [], [], [], [], []
        for batch in _BATCHES[split]:
            archive = Archive(path / (batch + ".bin" if binary else batch))
            found, its_labels = (_binary if binary else _pickled)(archive)
            pixels.append(found.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
            labels += its_labels
            names += [f"{batch}/{k}" for k in range(len(found))]
            self._of += [len(self._archives)] * len(found)
            self._archives.append(archive)
        self._pixels = np.concatenate(pixels)
        super().__init__(path, f"cifar10 {split}", names, labels, CLASSES)

    def key(self, position):
        return self._archives[self._of[position]].current_key()

    def read(self, position):
        return self._pixels[position].tobytes()


def holds_cifar(path: Path, names) -> bool:
    """Whether a folder holds a batch of either version."""
    return any((path / folder / f"data_batch_1{suffix}").is_file() for folder in _FOLDERS for suffix in ("", ".bin"))


def _folder(path: Path) -> Path:
    names = [f"{batch}{suffix}" for batch in ("data_batch_1", "test_batch") for suffix in ("", ".bin")]
    for folder in _FOLDERS:
        if any((path / folder / name).is_file() for name in names):
            return path / folder
    raise ValueError(f"{path} holds no CIFAR-10: no data_batch_1 and no cifar-10-batches-py is there.")


def _content(archive: Archive) -> bytes:
    if archive.size > _MAX_BYTES:
        raise ValueError(f"{archive.path} is no batch of CIFAR-10: it has {archive.size} bytes.")
    try:
        return archive.read(0, archive.size)
    except UnusableImage as error:
        raise ValueError(f"{archive.path} cannot be read: {error}.") from error


def _binary(archive: Archive):
    """Records of a label and the red, green and blue plane."""
    content = np.frombuffer(_content(archive), np.uint8)
    if not len(content) or len(content) % (1 + _PIXELS):
        raise ValueError(
            f"{archive.path} is damaged or truncated: its {len(content)} bytes are no whole number of records of "
            f"{1 + _PIXELS}."
        )
    records = content.reshape(-1, 1 + _PIXELS)
    return records[:, 1:], _checked_labels(records[:, 0].tolist(), len(records), archive.path)


def _pickled(archive: Archive):
    """A dictionary with data (N, 3072) uint8, the planes one after another, and labels, N numbers."""
    try:
        batch = read_plain_pickle(_content(archive))
    except Refused as error:
        raise ValueError(f"{archive.path} is no batch of CIFAR-10: {error}.") from error
    data, labels = (batch.get("data"), batch.get("labels")) if isinstance(batch, dict) else (None, None)
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS or not len(data):
        raise ValueError(f"{archive.path} is no batch of CIFAR-10: it has no data of {_PIXELS} bytes for each picture.")
    return data, _checked_labels(labels, len(data), archive.path)


def _checked_labels(labels, count, path) -> list[int]:
    if not isinstance(labels, list) or len(labels) != count:
        number = len(labels) if isinstance(labels, list) else "no"
        raise ValueError(f"{path} is damaged: it has {number} labels for {count} pictures.")
    wrong = next((k for k in labels if type(k) is not int or not 0 <= k < len(CLASSES)), 0)
    if wrong != 0 or type(wrong) is not int:
        what = wrong if isinstance(wrong, int) else type(wrong).__name__
        raise ValueError(f"{path} is damaged: {what} is no label from 0 to {len(CLASSES) - 1}.")
    return labels

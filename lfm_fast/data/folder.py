"""A folder of images: one class per sub-folder, every file checked once before training counts on it."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import PIL
import torch
from tqdm import tqdm

from lfm_fast.data.cache import read_note, write_note
from lfm_fast.data.reading import SUFFIXES, Checked, UnusableImage, check_image, read_image
from lfm_fast.data.source import ImageSource, Report

_THREADS = min(16, os.cpu_count() or 1)  # Pillow decodes without holding Python's lock
_NOTE_FORMAT = f"1, Pillow {PIL.__version__}"  # another Pillow may read other files


class FolderImages(ImageSource):
    """The usable images below a folder, as an `ImageSource`.

    Class k is the k-th sub-folder by name that holds images (at any depth); images that lie in the folder itself are
    one class named "all". Class numbers come from the listing alone, so a file that is skipped shifts no label.
    Every file is decoded once up front, in threads; what was found is remembered by size and modification time.
    `.sizes` are (width, height) of the whole pictures, upright.

    Args:
        folder: where the images are.
        image_size: side in pixels of the centre crop.
        flip: allow mirrored pictures as augmentation.
        small: what to do with an image whose shorter side is less than image_size: "skip", "upscale" or "error".

    Raises:
        ValueError: no folder, no image in it, images both in the folder and in sub-folders, or none usable.
    """

    def __init__(self, folder, image_size: int, *, flip: bool = False, small: str = "skip"):
        if small not in ("skip", "upscale", "error"):
            raise ValueError(f"small={small!r} is not known: choose 'skip', 'upscale' or 'error'.")
        folder = Path(folder).expanduser()
        class_names, files = list_folder(folder)
        report = Report()
        checked = _check_all(folder, [path for path, _ in files])
        usable = [_usable(path, found, image_size, small, report) for (path, _), found in zip(files, checked)]
        kept = [file for file, use in zip(files, usable) if use]
        if not kept:
            raise ValueError(f"None of the {len(files)} images in {folder} can be used. {report.summary(3)}")
        super().__init__(
            image_size, [label for _, label in kept], class_names, [_printable(path) for path, _ in kept], report
        )
        self.name = folder.name or str(folder)
        self.folder, self.flip = folder, flip
        self._paths = [folder / path for path, _ in kept]
        self.sizes = [(found.width, found.height) for found, use in zip(checked, usable) if use]
        self._pool = None

    def load(self, position: int) -> torch.Tensor:
        """The centre crop of picture number `position`, (3, H, W) uint8.

        Raises:
            ValueError: the file has changed since it was checked and cannot be read any more.
        """
        try:
            pixels = read_image(self._paths[position], self.image_size)
        except UnusableImage as error:
            raise ValueError(
                f"{self._paths[position]} was readable when the folder was checked, but now {error}: "
                "put the file back, or start again to leave it out."
            ) from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def batch(self, positions) -> torch.Tensor:
        """The pictures at `positions`, decoded in threads, (B, 3, H, W) uint8."""
        positions = [int(i) for i in positions]
        if len(positions) < 2:
            return super().batch(positions)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="decode")
        return torch.stack(list(self._pool.map(self.load, positions)))


def list_folder(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """(class names, [(path relative to the folder, label)]), both in order of name; looks at suffixes only."""
    if not folder.exists():
        raise ValueError(f"The image folder {folder} does not exist.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: pass the folder that holds the images.")
    top = sorted(entry.name for entry in os.scandir(folder) if _is_image_name(entry.name) and not entry.is_dir())
    by_class = {}
    for entry in sorted((e for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")), key=_name):
        below = list(_walk(folder, entry.name))
        if below:
            by_class[entry.name] = below
    if top and by_class:
        raise ValueError(
            f"{folder} holds {len(top)} images beside {len(by_class)} sub-folders of images: "
            "put every image into a class sub-folder, or have no sub-folders."
        )
    if top:
        return ["all"], [(path, 0) for path in top]
    if not by_class:
        raise ValueError(
            f"{folder} holds no image ({', '.join(sorted(SUFFIXES)[:8])}, ...), nor does a sub-folder of it."
        )
    files = [(path, label) for label, paths in enumerate(by_class.values()) for path in paths]
    return [_printable(name) for name in by_class], files


def _name(entry):
    return entry.name


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _walk(folder: Path, class_name: str):
    """Paths (relative to `folder`) of the image files below a class, following links but never in a circle."""
    seen = set()
    for here, directories, names in os.walk(folder / class_name, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        directories[:] = sorted(d for d in directories if not d.startswith("."))
        for name in sorted(names):
            if _is_image_name(name):
                yield os.path.relpath(os.path.join(here, name), folder)


def _check_all(folder: Path, paths: list[str]) -> list[Checked]:
    """Decode every file that has changed since the last time; remembers the outcome in the cache folder."""
    note = read_note("folders", folder)
    known = note.get("files", {}) if note.get("format") == _NOTE_FORMAT else {}
    keys = [_key(folder / path) for path in paths]
    new = [k for k, path in enumerate(paths) if keys[k] is None or known.get(path, [None])[0] != keys[k]]
    if new:
        with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
            warnings.simplefilter("ignore")  # large or odd files are reported by us, in one place
            fresh = pool.map(check_image, (folder / paths[k] for k in new))
            bar = tqdm(fresh, total=len(new), desc="checking images", unit="image", leave=False, disable=None)
            for k, found in zip(new, bar):
                known[paths[k]] = [keys[k], asdict(found)]
        files = {path: known[path] for path in paths}
        write_note("folders", folder, {"format": _NOTE_FORMAT, "files": files})
    return [Checked(**known[path][1]) for path in paths]


def _key(path: Path):
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _usable(path: str, found: Checked, image_size: int, small: str, report: Report) -> bool:
    name = _printable(path)
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


def _printable(path: str) -> str:
    """A name that any terminal and any UTF-8 file can take, whatever bytes the file system holds."""
    text = path.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

"""A folder of images: one class per sub-folder."""

import os
import re
from pathlib import Path

from lfm_fast.data.cache import file_state
from lfm_fast.data.reading import SUFFIXES, open_file, read_file
from lfm_fast.data.store import Store, require_whole_use
from lfm_fast.data.stored import StoredImages, printable

_SHARD = re.compile(r"latents-[0-9]{5}\.safetensors")  # of a latent cache


class FileStore(Store):
    """Pictures that are files of their own; their names are paths from the store's path on."""

    def key(self, position):
        try:
            return file_state(os.stat(self._file(position)))
        except OSError:
            return None

    def read(self, position):
        return read_file(self._file(position))

    def open(self, position):
        return open_file(self._file(position))

    def _file(self, position):
        return self.path / self.names[position]


class FolderStore(FileStore):
    """The image files below a folder.

    Class k is the k-th sub-folder by name that holds images (at any depth); images that lie in the folder itself are
    one class named "all". Class numbers come from the listing alone, so a file that is skipped shifts no label.

    Raises:
        ValueError: no folder, no image in it, or images both in the folder and in sub-folders.
    """

    def __init__(self, folder):
        folder = Path(folder).expanduser()
        class_names, files = list_folder(folder)
        paths = [path for path, _ in files]
        super().__init__(folder, folder.name or str(folder), paths, [label for _, label in files], class_names)


def open_folder(path, split: str) -> FolderStore:
    """A folder of images, used whole. Raises ValueError."""
    require_whole_use(path, split)
    return FolderStore(path)


class FolderImages(StoredImages):
    """The usable images below a folder: `StoredImages` over a `FolderStore`, with the arguments and errors of both."""

    def __init__(self, folder, image_size: int, **choices):
        super().__init__(FolderStore(folder), image_size, **choices)


def list_folder(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """(class names, [(path relative to the folder, label)]), both in order of name; looks at suffixes only."""
    if not folder.exists():
        raise ValueError(f"The image folder {folder} does not exist.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: pass the folder that holds the images.")
    top = sorted(entry.name for entry in os.scandir(folder) if _is_image_name(entry.name) and not entry.is_dir())
    by_class = {}
    for entry in sorted((e for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")), key=_name):
        paths = [path for path in files_below(folder / entry.name) if _is_image_name(os.path.basename(path))]
        below = [os.path.relpath(path, folder) for path in paths]
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
        if any(_SHARD.fullmatch(entry.name) for entry in os.scandir(folder)):
            raise ValueError(
                f"{folder} holds latents and no stats.json: their encoding was interrupted; encode again and it goes "
                "on where it stopped."
            )
        raise ValueError(
            f"{folder} holds no image ({', '.join(sorted(SUFFIXES)[:8])}, ...), nor does a sub-folder of it."
        )
    files = [(path, label) for label, paths in enumerate(by_class.values()) for path in paths]
    return [printable(name) for name in by_class], files


def _name(entry):
    return entry.name


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def files_below(folder, every_name: bool = False):
    """Paths of the files below a folder, in order of name, following links but never in a circle; none that is hidden.

    A folder that links give several names is gone through under the first of them, or under each (`every_name`). Raises
    OSError for a folder that cannot be listed: what lies in it would be missing without a word, and without the images
    of a class those after it would have other numbers.
    """
    seen = set()

    def walk(here, above):
        real = os.path.realpath(here)
        if real in (above if every_name else seen):
            return
        seen.add(real)
        entries = sorted((entry for entry in os.scandir(here) if not entry.name.startswith(".")), key=_name)
        yield from (entry.path for entry in entries if not entry.is_dir())
        for entry in entries:
            if entry.is_dir():
                yield from walk(entry.path, (*above, real))

    yield from walk(folder, ())

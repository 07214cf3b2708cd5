"""Pictures in LMDB environments: bare RGB or encoded files, as NVAE's, LSUN's and other data sets hold them."""

import math
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from lfm_fast.data.archive import Archive
from lfm_fast.data.lmdb_tree import find_values, is_environment
from lfm_fast.data.reading import UnusableImage, check_image
from lfm_fast.data.store import Store, require_whole_use
from lfm_fast.data.stored import printable

_SPLITS = {"train": ("train",), "held_out": ("val", "validation"), "all": ("train", "val", "validation")}
_SPLIT_NAME = re.compile(r"(train|val|validation)\.lmdb")  # of NVAE's CelebA-HQ and FFHQ
_LSUN_NAME = re.compile(r"(.+)_(train|val)_lmdb")  # as LSUN is handed out
_AT_RESOLUTION = re.compile(rb"(\d+)-(\d+)")  # keys of environments with every picture in several sizes
_FILES = (".lmdb", ".mdb")  # of environments that are no folders
_NOT_PICTURES = frozenset((b"length", b"num-samples", b"__len__", b"__keys__"))  # what some writers add


class LmdbStore(Store):
    """The values of LMDB environments, one class for each name that `environments` gives them.

    Keys that are numbers are in order of number, others in order of their bytes, which is the order LMDB gives. Where
    keys are RESOLUTION-NUMBER, the highest resolution counts.

    Args:
        path: where the environments lie, for messages.
        environments: [(class, path of an environment)].
        name: what provenance calls the store.
        raw: values are bare RGB, row by row; None looks at the first ones.

    Raises:
        ValueError: an environment that is damaged, has no picture, or whose values are no squares of RGB.
    """

    def __init__(self, path, environments, name: str, raw: bool | None = None):
        class_names = sorted({kind for kind, _ in environments})
        self._environments, names, labels, places = [], [], [], []
        for kind, environment in environments:
            archive = Archive(_data_file(environment))
            values = find_values(archive)
            prefix = f"{environment.name}/" if len(environments) > 1 else ""
            order = _order_of_pictures(values.keys)
            names += [prefix + values.keys[k].decode("utf-8", "surrogateescape") for k in order]
            labels += [class_names.index(kind)] * len(order)
            places.append(np.stack([np.full(len(order), len(self._environments)), np.array(order, np.int64)]))
            self._environments.append((archive, replace(values, keys=[])))  # millions of names are enough to hold once
        if not names:
            raise ValueError(f"{path} holds no picture: its LMDB environment is empty.")
        super().__init__(path, name, names, labels, [printable(kind) for kind in class_names])
        self._places = np.concatenate(places, axis=1)
        if raw or (raw is None and not self._looks_encoded()):
            self.raw_shape = self._common_shape(required=bool(raw))

    def key(self, position):
        archive, values, place = self._found(position)
        current = archive.current_key()
        return current and [*current, int(values.offset[place]), int(values.size[place])]

    def read(self, position):
        archive, values, place = self._found(position)
        return values.read(archive, place)

    def _found(self, position):
        environment, place = self._places[:, position]
        return *self._environments[environment], place

    def _looks_encoded(self) -> bool:
        """Whether most of the first values begin as image files do: one of bare pixels may by chance."""
        first = range(min(5, len(self)))
        return 2 * sum(self._begins_as_file(position) for position in first) > len(first)

    def _begins_as_file(self, position) -> bool:
        try:
            return check_image(self.read(position), whole=False).reason is None
        except UnusableImage:
            return False

    def _common_shape(self, required: bool) -> tuple[int, int, int] | None:
        """(H, W, 3) of the size that most values have, which is a square's; others are reported one by one."""
        found = (self._found(position) for position in range(len(self)))
        size = Counter(int(values.size[place]) for _, values, place in found).most_common(1)[0][0]
        side = math.isqrt(size // 3)
        if 3 * side * side == size and side:
            return (side, side, 3)
        if required:
            raise ValueError(f"{self.path} has values of {size} bytes, which are no square of RGB pixels.")
        return None


def open_lmdb(path, split: str, raw: bool | None = None) -> LmdbStore:
    """An environment, or a folder of them.

    train.lmdb and validation.lmdb are the splits of one data set; a class is each environment of any other folder.

    Raises:
        ValueError: there is none, or none of the split.
    """
    path = Path(path).expanduser()
    if _data_file(path) is not None:
        require_whole_use(path, split)
        return LmdbStore(path, [("all", path)], path.name, raw)
    found = _environments_in(path)
    if any(_SPLIT_NAME.fullmatch(each.name) for each in found):
        chosen = [("all", each) for each in found if each.name.removesuffix(".lmdb") in _SPLITS[split]]
    else:
        require_whole_use(path, split)
        chosen = [(each.name.removesuffix(".lmdb"), each) for each in found]
    _require_some(chosen, path, split)
    return LmdbStore(path, chosen, f"{path.name} {split}", raw)


def open_raw_lmdb(path, split: str) -> LmdbStore:
    """As `open_lmdb`, of values that are bare RGB whatever they look like."""
    return open_lmdb(path, split, raw=True)


def open_lsun(path, split: str) -> LmdbStore:
    """LSUN: bedroom_train_lmdb, bedroom_val_lmdb, ..., one of them or a folder of them; a class for each scene.

    Raises:
        ValueError: there is none, or none of the split.
    """
    path = Path(path).expanduser()
    alone = _LSUN_NAME.fullmatch(path.name) and _data_file(path) is not None
    named = [(_LSUN_NAME.fullmatch(each.name), each) for each in ([path] if alone else _environments_in(path))]
    chosen = [(match[1], each) for match, each in named if match and match[2] in _SPLITS[split]]
    _require_some(chosen, path, split)
    return LmdbStore(path, chosen, path.name if alone else f"{path.name} {split}", raw=False)


def holds_lmdb(path: Path, names) -> bool:
    """Whether a path is an environment or a folder of them."""
    return _data_file(path) is not None or bool(_environments_in(path, names))


def holds_lsun(path: Path, names) -> bool:
    """Whether it is an environment, or a folder of them, with names that LSUN gives."""
    if _LSUN_NAME.fullmatch(path.name) and _data_file(path) is not None:
        return True
    return bool(_environments_in(path, [name for name in names if _LSUN_NAME.fullmatch(name)]))


def _data_file(path: Path) -> Path | None:
    """The file of an environment: data.mdb in a folder, or the environment itself."""
    if path.is_dir():
        return path / "data.mdb" if (path / "data.mdb").is_file() else None
    return path if path.is_file() and is_environment(path) else None


def _environments_in(path: Path, names=None) -> list[Path]:
    if not path.is_dir():
        if names is None:
            raise ValueError(f"{path} is no LMDB environment and no folder of them.")
        return []
    likely = (path / name for name in sorted(os.listdir(path) if names is None else names))
    return [each for each in likely if (each.suffix in _FILES or each.is_dir()) and _data_file(each) is not None]


def _require_some(chosen, path, split):
    if not chosen:
        raise ValueError(f"{path} holds no LMDB environment of split {split!r}.")


def _order_of_pictures(keys: list[bytes]) -> list[int]:
    places = [k for k, key in enumerate(keys) if key not in _NOT_PICTURES]
    sized = [_AT_RESOLUTION.fullmatch(keys[k]) for k in places]
    if places and all(sized):
        highest = max(int(match[1]) for match in sized)
        places = [k for k, match in zip(places, sized) if int(match[1]) == highest]
        return sorted(places, key=lambda k: int(_AT_RESOLUTION.fullmatch(keys[k])[2]))
    if all(keys[k].isdigit() for k in places):
        return sorted(places, key=lambda k: int(keys[k]))
    return places

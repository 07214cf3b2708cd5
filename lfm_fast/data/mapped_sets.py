"""Published data sets of images with label maps: CelebAMask-HQ, ADE20K and COCO-Stuff as they are unpacked."""

import contextlib
import os
import re
import zlib
from pathlib import Path

import numpy as np
import torch

from lfm_fast.data import label_maps
from lfm_fast.data.cache import note_folder
from lfm_fast.data.folder import FileStore, list_folder
from lfm_fast.data.palettes import get_palette
from lfm_fast.data.reading import UnusableImage, open_unconverted
from lfm_fast.data.source import Report

_SPLITS = {"train": slice(0, 27_000), "held_out": slice(27_000, 30_000), "all": slice(0, 30_000)}  # of CelebAMask-HQ
_ADE_FOLDERS = ("training", "validation")
_CELEBA_IMAGES, _CELEBA_PARTS, _IN_A_FOLDER = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno", 2000


class CelebAMaskStore(FileStore):
    """CelebAMask-HQ: CelebA-HQ-img/N.jpg, and a mask of each part in CelebAMask-HQ-mask-anno/K/NNNNN_PART.png.

    Images 0 to 26,999 are for training, 27,000 to 29,999 are held out. An image's label map is made of its parts
    (`PartMasks`).

    Raises:
        ValueError: no such folder, or no image of the split in it.

    Source: Lee et al., MaskGAN, arXiv 1907.11922.
    """

    palette = "celebamask-hq"

    def __init__(self, path, split: str):
        path = Path(path).expanduser()
        folder = path / _CELEBA_IMAGES
        if not folder.is_dir():
            raise ValueError(f"{path} is no CelebAMask-HQ: it has no folder {_CELEBA_IMAGES}.")
        numbers = sorted(int(each.stem) for each in folder.iterdir() if re.fullmatch(r"[0-9]{1,5}\.jpg", each.name))
        wanted = range(30_000)[_SPLITS[split]]
        names = [f"{number}.jpg" for number in numbers if number in wanted]
        if not names:
            raise ValueError(
                f"{folder} holds no image of split={split!r}, which has {wanted[0]}.jpg to {wanted[-1]}.jpg."
            )
        super().__init__(folder, f"celebamask-hq {split}", names, [0] * len(names), ["all"])
        self.maps = PartMasks(path / _CELEBA_PARTS)


class PartMasks:
    """Label maps of CelebAMask-HQ, made of a mask for each part of a face.

    A pixel is of the last part, in order of the palette, whose mask is not black there, and background where none is.
    To read ten masks takes seven times as long as to read one map, so each map is kept in the cache folder, under a
    name that its masks' sizes and times are in.
    """

    def __init__(self, folder: Path):
        self.folder, self._parts = folder, get_palette("celebamask-hq").classes
        self._kept = note_folder("part-masks", folder)
        if not folder.is_dir():
            raise ValueError(f"The masks of CelebAMask-HQ are not there: there is no folder {folder}.")

    def pair(self, names):
        """([the number of each image in `names`, or None], a report of those without a mask)."""
        report, found = Report(), []
        for name in names:
            number = int(Path(name).stem)
            there = any(path.is_file() for path in self._paths(number).values())
            found.append(number if there else None)
            if not there:
                report.skipped.append((name, "it has no mask of any part"))
        return found, report

    def read(self, number: int) -> torch.Tensor:
        """The label map of an image, (H, W) int64. Raises ValueError for a mask that cannot be used."""
        facts = {k: (status.st_size, status.st_mtime_ns) for k, status in self._statuses(number)}
        if not facts:
            raise ValueError(f"The masks of image {number} in {self.folder} are gone.")
        kept = self._kept / f"{number:05d}-{zlib.crc32(repr(facts).encode()):08x}.png"
        try:
            return label_maps.read_label_map(kept, "celebamask-hq")
        except ValueError:  # not made yet, or damaged
            ids = self._composed(number, facts)
        with contextlib.suppress(OSError):  # a full or read-only disk: it is made again the next time
            label_maps.write_label_map(kept, ids, "celebamask-hq")
        return ids

    def _composed(self, number, parts) -> torch.Tensor:
        ids = None
        for k in parts:
            path = self._paths(number)[k]
            try:
                mask = np.array(open_unconverted(path).convert("L"))
            except UnusableImage as error:
                raise ValueError(f"The mask {path} cannot be used: {error}.") from error
            ids = np.zeros(mask.shape, np.uint8) if ids is None else ids
            if ids.shape != mask.shape:
                raise ValueError(f"The mask {path} is of another size than the ones before it.")
            ids[mask > 0] = k
        return torch.from_numpy(ids).long()

    def _paths(self, number: int) -> dict[int, Path]:
        """{id: where the mask of this part would be} of an image."""
        folder = self.folder / str(number // _IN_A_FOLDER)
        return {k: folder / f"{number:05d}_{part}.png" for k, part in enumerate(self._parts) if k}

    def _statuses(self, number: int):
        for k, path in self._paths(number).items():
            with contextlib.suppress(OSError):
                yield k, os.stat(path)


class PairedStore(FileStore):
    """Images below `path` in the folders named, label maps below `maps` in folders of the same names, or anywhere else.

    Raises:
        ValueError: a folder is not there, or holds no image.
    """

    def __init__(self, path: Path, folders, maps: Path | None, name: str, palette: str):
        names = [f"{folder}/{file}" for folder in folders for file, _ in list_folder(path / folder)[1]]
        super().__init__(path, name, names, [0] * len(names), ["all"])
        self.maps, self.palette = maps, palette


def open_ade20k(path, split: str) -> PairedStore:
    """ADEChallengeData2016: images/training and images/validation, maps in annotations of the same.

    Raises:
        ValueError: the folder of a split is not there, or holds no image.

    Source: Zhou et al., ADE20K, arXiv 1608.05442; the release of the scene parsing benchmark.
    """
    path = Path(path).expanduser()
    folders = {"train": ["training"], "held_out": ["validation"], "all": ["training", "validation"]}[split]
    return PairedStore(path / "images", folders, _if_there(path / "annotations"), f"ade20k {split}", "ade20k")


def open_coco_stuff(path, split: str) -> PairedStore:
    """train2017 and val2017, in the folder or its images, and maps in stuffthingmaps or annotations of the same names.

    Raises:
        ValueError: the folder of a split is not there, or holds no image.

    Source: Caesar et al., COCO-Stuff, arXiv 1612.03716; its pixel maps stuffthingmaps_trainval2017.
    """
    path = Path(path).expanduser()
    folders = {"train": ["train2017"], "held_out": ["val2017"], "all": ["train2017", "val2017"]}[split]
    images = path / "images" if (path / "images").is_dir() else path
    places = [path / name for name in ("stuffthingmaps_trainval2017", "stuffthingmaps", "annotations")]
    maps = next((place for place in places if (place / folders[0]).is_dir()), None)
    return PairedStore(images, folders, maps, f"coco-stuff {split}", "coco-stuff")


def holds_celebamask(path: Path, names) -> bool:
    """Whether a folder has CelebAMask-HQ's."""
    return (path / _CELEBA_IMAGES).is_dir() and (path / _CELEBA_PARTS).is_dir()


def holds_ade20k(path: Path, names) -> bool:
    """Whether a folder has the benchmark's."""
    return any((path / "images" / each).is_dir() and (path / "annotations" / each).is_dir() for each in _ADE_FOLDERS)


def holds_coco_stuff(path: Path, names) -> bool:
    """Whether a folder has COCO's of 2017."""
    return any((path / above / each).is_dir() for above in ("", "images") for each in ("train2017", "val2017"))


def _if_there(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None

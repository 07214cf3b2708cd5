"""ImageNet (ILSVRC 2012) as it is unpacked: a folder for each class in train, and val the same or flat with labels."""

import csv
import re
from pathlib import Path

from lfm_fast.data.file_list import read_lines
from lfm_fast.data.folder import FileStore, list_folder
from lfm_fast.data.reading import UnusableImage
from lfm_fast.data.store import first_names, label_of, numbered_classes

WNID = re.compile(r"n[0-9]{8}")  # a class's folder
_LISTS = ("val.txt", "val_labels.txt", "val_map.txt", "imagenet_2012_validation_synset_labels.txt")
_KAGGLE = "LOC_val_solution.csv"
_DEVKIT = ("ILSVRC2012_devkit_t12/data", "devkit/data", "data", ".")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_LARGEST_META = 8 << 20  # bytes; the published one has less than two million


class ImageNetStore(FileStore):
    """train/CLASS/*.JPEG and val/CLASS/*.JPEG, or val/*.JPEG with a file of labels beside train and val.

    Classes are the folders of train in order of name, as everywhere. Labels of a flat val come from what is found
    first: val.txt (FILE LABEL in each line, or LABEL for image ILSVRC2012_val_N in line N; a class's name or its
    number), LOC_val_solution.csv (Kaggle's), or the ground truth and meta.mat of ILSVRC2012_devkit_t12, whose numbers
    are of another order. Kaggle's folder ILSVRC/Data/CLS-LOC is found from its top.

    Args:
        path: the folder of train and val.
        split: "train", "held_out" (val) or "all".

    Raises:
        ValueError: a folder is missing, a flat val has no labels, or labels do not fit.
    """

    def __init__(self, path, split: str):
        top = Path(path).expanduser()
        root = next((each for each in (top / "ILSVRC/Data/CLS-LOC", top) if each.is_dir()), top)
        folders = [name for name, other in (("train", "held_out"), ("val", "train")) if split != other]
        missing = [name for name in folders if not (root / name).is_dir()]
        if missing:
            raise ValueError(f"{root} has no folder {missing[0]}, which ImageNet's split={split!r} is.")
        trained = list_folder(root / "train") if (root / "train").is_dir() else ([], [])
        held_out = _val(root, top) if "val" in folders else ([], [], [])
        classes = trained[0] or held_out[0]
        listed = [(f"train/{file}", label) for file, label in trained[1] if "train" in folders]
        listed += [(f"val/{file}", _number(kind, classes, root)) for file, kind in held_out[1]]
        if not listed:
            raise ValueError(f"{root} holds no image of split={split!r} with a label.")
        names, labels = zip(*listed)
        skipped = [(f"val/{file}", reason) for file, reason in held_out[2]]
        super().__init__(root, f"{root.name} {split}", names, labels, classes, skipped)


def holds_imagenet(path: Path, names) -> bool:
    """Whether a folder has train or val with ImageNet's classes, or Kaggle's folders."""
    if (path / "ILSVRC/Data/CLS-LOC").is_dir():
        return True
    return any(WNID.fullmatch(each) for folder in ("train", "val") for each in first_names(path / folder))


def _val(root: Path, top: Path):
    """(class names, [(file, its class's name or number)], [(file, why it is left out)]) of the folder val."""
    class_names, files = list_folder(root / "val")
    if class_names != ["all"] or (root / "val" / "all").is_dir():
        return class_names, [(file, class_names[label]) for file, label in files], []
    labels, says = _labels_of_flat(root, top)
    labels = {_file_name(key): label for key, label in labels.items()}
    kept = [(file, labels.get(file)) for file, _ in files]
    skipped = [(file, f"{says} has no label for it") for file, label in kept if label is None]
    there = {file for file, _ in files}
    skipped += [(name, f"{says} has a label for it, but it is not there") for name in labels if name not in there]
    kinds = set(labels.values())
    numbered = all(isinstance(kind, int) for kind in kinds)
    names = numbered_classes(kinds) if numbered else sorted(map(str, kinds))
    return names, [(file, label) for file, label in kept if label is not None], skipped


def _file_name(key: str | int) -> str:
    """Of an image, by its name or its number."""
    return f"ILSVRC2012_val_{key:08d}.JPEG" if isinstance(key, int) else key


def _labels_of_flat(root: Path, top: Path):
    """({file or number of image: class's name or number}, the name of the file that says so)."""
    places = list(dict.fromkeys((root, top, root.parent)))
    for path in (place / name for name in _LISTS for place in places):
        if path.is_file():
            return _of_list(path), path.name
    for path in (place / _KAGGLE for place in places):
        if path.is_file():
            return _of_kaggle(path), path.name
    for path in (place / folder / _TRUTH for place in places for folder in _DEVKIT):
        if path.is_file():
            return _of_devkit(path), path.name
    raise ValueError(
        f"{root / 'val'} has no sub-folders, and no file of labels is beside it; give {_LISTS[0]} (FILE LABEL in each "
        f"line), {_KAGGLE}, or the folder ILSVRC2012_devkit_t12."
    )


def _of_list(path: Path) -> dict:
    labels = {}
    for number, text in read_lines(path):
        *file, label = text.rsplit(maxsplit=1)
        try:
            label = label_of(label) if label.isdecimal() else label
        except UnusableImage as error:
            raise ValueError(f"The list of labels {path}, line {number}: {error}.") from error
        name = Path(file[0]).name if file else number
        if labels.setdefault(name, label) != label:
            raise ValueError(f"The list of labels {path} gives {name} {label} in line {number}, {labels[name]} above.")
    if not labels:
        raise ValueError(f"The list of labels {path} is empty.")
    return labels


def _of_kaggle(path: Path) -> dict:
    """ImageId,PredictionString: the first word of the latter is the class, and boxes follow."""
    rows = csv.DictReader(text for _, text in read_lines(path))
    try:
        return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in rows}
    except (KeyError, AttributeError, IndexError, csv.Error) as error:
        raise ValueError(f"{path} has no columns ImageId and PredictionString in every line.") from error


def _of_devkit(path: Path) -> dict:
    """A number in line N for image N; meta.mat says which class each number is."""
    names = _numbers_of_classes(path.parent / _META)
    labels = {}
    for number, text in read_lines(path):
        if not text.isdecimal() or int(text) not in names:
            raise ValueError(f"{path}, line {number}: {text[:40]!r} is no number of a class in {_META}.")
        labels[number] = names[int(text)]
    return labels


def _numbers_of_classes(path: Path) -> dict[int, str]:
    """{ILSVRC2012_ID: WNID} of the devkit's table."""
    from scipy.io import loadmat

    try:
        if path.stat().st_size > _LARGEST_META:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        table = loadmat(path, variable_names=["synsets"], squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    except Exception as error:  # scipy raises a dozen kinds on damaged files
        detail = " ".join(str(error).split())[:80] or type(error).__name__
        raise ValueError(f"{path} is not the devkit's table of classes ({detail}).") from error


def _number(kind, classes, root) -> int:
    """The label of a class by its name or number."""
    if isinstance(kind, int):
        if kind < len(classes):
            return kind
        raise ValueError(f"A label of {root / 'val'} is {kind}, but there are {len(classes)} classes.")
    if kind not in classes:
        raise ValueError(f"A label of {root / 'val'} is {kind!r}, which is no folder of train.")
    return classes.index(kind)

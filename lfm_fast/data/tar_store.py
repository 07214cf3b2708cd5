"""WebDataset tars: the files of a sample share their name up to the first dot; one is a picture, one may be a label."""

import json
import re
from pathlib import Path

from lfm_fast.data.archive import Archive
from lfm_fast.data.cache import read_note, write_note
from lfm_fast.data.file_list import read_lines
from lfm_fast.data.reading import SUFFIXES, UnusableImage
from lfm_fast.data.source import Report
from lfm_fast.data.store import Store, label_of, numbered_classes, require_whole_use
from lfm_fast.data.tar_index import index_tar

_NOTE_FORMAT = 1
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key and extension
_LABELS, _IN_JSON = ("cls", "cls.txt", "json"), ("label", "cls", "class_id", "class")
_LARGEST_LABEL = 1 << 20  # bytes of a file with a label
_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
_MOST_TARS = 1_000_000
_SPLIT = re.compile(r"(?:^|[-_.])(train|validation|val|test)(?=[-_.0-9]|$)")
_CLASS_NAMES = "classnames.txt"
_NO_LABEL = "it has no label, as others have"


class TarStore(Store):
    """The pictures of tar archives, in the order of the archives' names and of each archive.

    A label is the number in KEY.cls (or KEY.cls.txt), or "label", "cls", "class_id" or "class" in KEY.json. Either all
    samples have one, and those without are left out and reported, or all are one class named "all". Names of classes
    are the lines of classnames.txt beside the archives, or numbers. Archives are indexed once, which is remembered.

    Args:
        path: where they lie, for messages.
        tars: their paths.
        name: what provenance calls the store.

    Raises:
        ValueError: an archive is missing, no picture is in any, or classnames.txt does not fit.
    """

    def __init__(self, path, tars, name: str):
        self._archives = [Archive(tar) for tar in tars]
        found, skipped = [], []
        for number, archive in enumerate(self._archives):
            samples, left_out = _samples(archive)
            found += [(f"{archive.path.name}/{sample}", (number, *place), label) for sample, *place, label in samples]
            skipped += left_out
        classes = ["all"]
        if any(label is not None for *_, label in found):
            skipped += [(sample, label or _NO_LABEL) for sample, _, label in found if not isinstance(label, int)]
            found = [each for each in found if isinstance(each[2], int)]
            classes = _class_names(tars, [label for *_, label in found])
        if not found:
            reasons = Report(skipped=skipped).summary(3) if skipped else ""
            raise ValueError(f"{path} holds no picture in its {len(tars)} tar archives. {reasons}".rstrip())
        names, self._places, labels = zip(*found)
        super().__init__(path, name, names, [label or 0 for label in labels], classes, skipped)

    def key(self, position):
        number, offset, size = self._places[position]
        current = self._archives[number].current_key()
        return current and [*current, offset, size]

    def read(self, position):
        number, offset, size = self._places[position]
        return self._archives[number].read(offset, size)


def open_tars(path, split: str) -> TarStore:
    """A .tar, a folder of them, or a pattern NAME-{000..146}.tar.

    Where names of the archives in a folder say train, val or validation, they are that split.

    Raises:
        ValueError: there is none, or none of the split.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        require_whole_use(path, split)
        return TarStore(path.parent, expanded(path), path.name)
    tars = sorted(each for each in path.iterdir() if each.suffix == ".tar")
    said = {tar: match[1] for tar in tars if (match := _SPLIT.search(tar.name))}
    if said:
        wanted = {"train": ("train",), "held_out": ("val", "validation"), "all": ("train", "val", "validation")}[split]
        tars = [tar for tar in tars if said.get(tar, "train") in wanted]
    else:
        require_whole_use(path, split)
    if not tars:
        raise ValueError(f"{path} holds no .tar of split {split!r}.")
    return TarStore(path, tars, f"{path.name} {split}" if said else path.name)


def holds_tars(path: Path, names) -> bool:
    """Whether a folder has archives and, beside them, neither images nor folders that may hold some."""
    if not any(name.endswith(".tar") for name in names):
        return False
    return not any(Path(name).suffix.lower() in SUFFIXES or (path / name).is_dir() for name in names)


def names_hold_out(names) -> bool:
    """Whether names of archives say of some that they are for validation."""
    return any((match := _SPLIT.search(name)) and match[1] in ("val", "validation") for name in names)


def expanded(path: Path) -> list[Path]:
    """The paths that a pattern with {000..146} stands for, with as many digits.

    Example:
        >>> [each.name for each in expanded(Path("birds-{08..10}.tar"))]
        ['birds-08.tar', 'birds-09.tar', 'birds-10.tar']
    """
    match = _RANGE.search(path.name)
    if not match:
        return [path]
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + _MOST_TARS:
        raise ValueError(f"{path.name} stands for no archives: {match[0]} should go up.")
    names = (
        path.name[: match.start()] + str(k).zfill(len(match[1])) + path.name[match.end() :]
        for k in range(first, last + 1)
    )
    return [path.with_name(name) for name in names]


def _samples(archive: Archive):
    """([[name, offset, size, label]], [(name, reason)]) of an archive; its label is None, or why it is none."""
    note = read_note("tar-index", archive.path)
    if note.get("format") == _NOTE_FORMAT and note.get("key") == archive.key:
        return note["samples"], [tuple(entry) for entry in note["skipped"]]
    try:
        samples, skipped = _indexed(archive)
    except UnusableImage as error:
        return [], [(archive.path.name, str(error))]
    note = {"format": _NOTE_FORMAT, "key": archive.key, "samples": samples, "skipped": skipped}
    write_note("tar-index", archive.path, note)
    return samples, skipped


def _indexed(archive: Archive):
    index = index_tar(archive)
    samples, by_key = [], {}
    skipped = list(index.skipped)
    for name, *place in index.files:
        match = _MEMBER.fullmatch(name)
        if not match:
            continue
        files = by_key.setdefault(match[1], {})
        if match[2].lower() in files:
            skipped.append((f"{archive.path.name}/{name}", "another file of this name is before it"))
        else:
            files[match[2].lower()] = place
    with archive.opened() as read:
        for key, files in by_key.items():
            pictures = [extension for extension in files if "." + extension.split(".")[-1] in SUFFIXES]
            plain = [extension for extension in pictures if "." not in extension] or pictures
            if len(plain) > 1:
                skipped.append((f"{archive.path.name}/{key}", f"it has several pictures ({', '.join(plain)})"))
            elif plain:
                samples.append([f"{key}.{plain[0]}", *files[plain[0]], _label(read, files)])
    return samples, skipped


def _label(read, files) -> int | str | None:
    """The label among a sample's files; why it is none; None where nothing speaks of one."""
    extension = next((each for each in _LABELS if each in files), None)
    if extension is None:
        return None
    offset, size = files[extension]
    try:
        if size > _LARGEST_LABEL:
            raise UnusableImage(f"its label has {size} bytes")
        content = read(offset, size)
        if extension != "json":
            return label_of(content)
        said = json.loads(content)
        given = next((said[word] for word in _IN_JSON if word in said), None) if isinstance(said, dict) else None
        return None if given is None else label_of(given)
    except UnusableImage as error:
        return str(error)
    except (ValueError, RecursionError):
        return "its label is no JSON"


def _class_names(tars, labels) -> list[str]:
    """The lines of classnames.txt beside the archives or in the folder above, or numbers."""
    folder = tars[0].parent
    path = next((each / _CLASS_NAMES for each in (folder, folder.parent) if (each / _CLASS_NAMES).is_file()), None)
    if path is None:
        return numbered_classes(labels)
    names = [text for _, text in read_lines(path)]
    if labels and max(labels) >= len(names):
        raise ValueError(f"{path} has {len(names)} names, but there are labels up to {max(labels)}: it does not fit.")
    return names

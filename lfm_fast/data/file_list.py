"""A text file that lists images: a path in each line, with a label behind it or without."""

import os
import stat
from pathlib import Path

from lfm_fast.data.folder import FileStore
from lfm_fast.data.reading import UnusableImage
from lfm_fast.data.store import label_of, numbered_classes, require_whole_use

_LONGEST = 8192  # characters of a line: twice the longest path


class ListStore(FileStore):
    """The images that a text file lists: `PATH` or `PATH LABEL` in each line, relative to the list's own folder.

    Either every line has a label, a whole number from 0, or none has: then the images are one class named "all". A
    path may contain spaces. A line that says again what another said is left out and reported.

    Raises:
        ValueError: no list, nothing in it, labels in some lines alone, or two labels for one image.

    Example:
        >>> import tempfile, pathlib
        >>> listed = pathlib.Path(tempfile.mkdtemp()) / "images.txt"
        >>> _ = listed.write_text("cats/1.jpg 0\\ndogs/a dog.jpg 1\\n")
        >>> store = ListStore(listed)
        >>> store.names, store.labels
        (['cats/1.jpg', 'dogs/a dog.jpg'], [0, 1])
    """

    def __init__(self, path):
        path = Path(path).expanduser()
        lines = list(read_lines(path))
        if not lines:
            raise ValueError(f"The list {path} is empty: it should name an image in each line.")
        labelled = [_has_label(text) for _, text in lines]
        if any(labelled) and not all(labelled):
            number, text = next(line for line, has in zip(lines, labelled) if has != labelled[0])
            raise ValueError(
                f"The list {path} has labels in some lines and none in others, as line {number} ({text[:80]!r}): give "
                "every image one, or none."
            )
        entries, skipped = {}, []
        for number, text in lines:
            name, label = _name_and_label(path, number, text) if all(labelled) else (text, 0)
            if name not in entries:
                entries[name] = label
            elif entries[name] == label:
                skipped.append((name, "it is listed again"))
            else:
                raise ValueError(f"The list {path} gives {name} label {label} in line {number}, {entries[name]} above.")
        classes = numbered_classes(entries.values()) if all(labelled) else ["all"]
        super().__init__(path.parent, path.name, entries, entries.values(), classes, skipped)


def open_list(path, split: str) -> ListStore:
    """A list, used whole. Raises ValueError."""
    require_whole_use(path, split)
    return ListStore(path)


def read_lines(path: Path):
    """(line number, text) of the lines of a text file that are not empty. Raises ValueError for another file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path} is not a regular file.")
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST + 1), ""), 1):
                text = line.strip()
                if "\0" in text or len(line) > _LONGEST:
                    raise ValueError(f"{path} is no text (line {number}): it should have a few words in each line.")
                if text:
                    yield number, text
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error


def _has_label(text: str) -> bool:
    parts = text.rsplit(maxsplit=1)
    return len(parts) == 2 and parts[1].isascii() and parts[1].isdigit()


def _name_and_label(path, number, text):
    name, label = text.rsplit(maxsplit=1)
    try:
        return name, label_of(label)
    except UnusableImage as error:
        raise ValueError(f"The list {path}, line {number}: {error}.") from error

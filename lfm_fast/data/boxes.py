"""Layouts, boxes with classes: from lists and JSON files, beside a folder of images, and drawn for people to see."""

import json
from numbers import Integral, Real
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lfm_fast.models.box_encoder import NO_BOX, check_boxes

CLASSES_FILE = "classes.json"
_LEAST_VISIBLE = 0.25  # a box of which the centre crop leaves less than this share is left out
_COLOURS = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (0, 114, 178), (213, 94, 0), (150, 140, 0)),
    *((120, 120, 120), (130, 80, 200), (160, 82, 45)),
)  # Okabe and Ito's, told apart by colour-blind readers too, and three more


def as_boxes(layout, class_names, max_boxes: int | None = None) -> torch.Tensor:
    """One layout as (M, 5) float32 rows (class, x0, y0, x1, y1), filled up to max_boxes with rows of class -1.

    Args:
        layout: a list of {"class": name or number, "box": [x0, y0, x1, y1]}, coordinates in [0, 1], x to the right
            and y down; or a float tensor (N, 5) of such rows.
        class_names: names of the classes, by number.
        max_boxes: boxes of a layout at most; None takes as many as there are.

    Raises:
        ValueError: one sentence for entries of another form, unknown classes, boxes outside the image or without area,
            and too many of them.

    Example:
        >>> as_boxes([{"class": "cat", "box": [0.1, 0.2, 0.5, 0.75]}], ["dog", "cat"], max_boxes=2).tolist()[0][0]
        1.0
    """
    if isinstance(layout, torch.Tensor):
        if layout.dim() != 2:
            raise ValueError(f"a layout is {tuple(layout.shape)}, expected (N, 5) rows (class, x0, y0, x1, y1).")
        boxes = layout.detach().cpu()
    elif isinstance(layout, (list, tuple)):
        rows = [_row(entry, class_names) for entry in layout]
        boxes = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
    else:
        raise ValueError(f"a layout is a {type(layout).__name__}, expected a list of boxes or a tensor (N, 5).")
    check_boxes(boxes, len(class_names), max_boxes)
    filled = torch.zeros(max(len(boxes), max_boxes or 0), 5)
    filled[:, 0] = NO_BOX
    filled[: len(boxes)] = boxes
    return filled


def _row(entry, class_names) -> list[float]:
    if not isinstance(entry, dict) or "class" not in entry or "box" not in entry:
        raise ValueError(f'a box is {entry!r:.80}, expected {{"class": name or number, "box": [x0, y0, x1, y1]}}.')
    box = entry["box"].tolist() if hasattr(entry["box"], "tolist") else entry["box"]
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise ValueError(f"the box of {entry['class']!r} is {box!r:.80}, expected four numbers [x0, y0, x1, y1].")
    return [float(_class_number(entry["class"], class_names)), *map(float, box)]


def _class_number(given, class_names) -> int:
    if _is_number(given) and given != NO_BOX:  # as an entry of a list, -1 would be a box that is none
        return given
    if given in class_names:
        return list(class_names).index(given)
    raise ValueError(f"box class {given!r} is not known: choose one of {', '.join(map(str, class_names))}.")


def _is_number(value) -> bool:
    if isinstance(value, Integral):
        return not isinstance(value, bool) and abs(int(value)) < 2**53  # a float holds it
    return isinstance(value, Real)


def read_layouts(path, class_names, max_boxes: int | None = None) -> torch.Tensor:
    """The layouts of a JSON file, (n, M, 5) float32: a list of boxes as `as_boxes` takes it, or a list of such lists.

    Raises:
        ValueError: no such file, no JSON, no layout in it, or what `as_boxes` refuses, with the file's name.
    """
    content = _read_json(path)
    layouts = content if isinstance(content, list) and _holds_several(content) else [content]
    try:
        boxes = [as_boxes(layout, class_names, max_boxes) for layout in layouts]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _stacked(boxes)


def _holds_several(content: list) -> bool:
    return bool(content) and isinstance(content[0], list)


def _stacked(layouts: list[torch.Tensor]) -> torch.Tensor:
    """Layouts of any lengths, filled up to the longest: (n, M, 5)."""
    together = torch.zeros(len(layouts), max(1, *(len(boxes) for boxes in layouts)), 5)
    together[..., 0] = NO_BOX
    for filled, boxes in zip(together, layouts):
        filled[: len(boxes)] = boxes
    return together


def _read_json(path):
    path = Path(path).expanduser()
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the layout file {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}).") from error


def folder_classes(folder) -> tuple[list[str], int]:
    """The classes of a folder of layouts, IMAGE.json each, and how many boxes the longest has.

    The classes are the list in `classes.json` there, or else all names in use, by alphabet. Raises ValueError where
    there is no layout, or neither a list nor a name.
    """
    folder = Path(folder).expanduser()
    contents = {file: _read_json(file) for file in sorted(folder.rglob("*.json")) if file.name != CLASSES_FILE}
    layouts = [content for content in contents.values() if isinstance(content, list)]
    several = [file for file, content in contents.items() if isinstance(content, list) and _holds_several(content)]
    if several:
        raise ValueError(f"{several[0]} holds a list of layouts, but belongs to one image.")
    if not layouts:
        raise ValueError(f"there is no layout in {folder}; it must hold a file IMAGE.json for each image.")
    longest = max(1, *map(len, layouts))
    if (folder / CLASSES_FILE).is_file():
        names = _read_json(folder / CLASSES_FILE)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{folder / CLASSES_FILE} must be a list of class names.")
        return names, longest
    entries = [entry for layout in layouts for entry in layout if isinstance(entry, dict)]
    names = sorted({entry["class"] for entry in entries if isinstance(entry.get("class"), str)})
    if not names:
        raise ValueError(f"no box in {folder} names its class; name the classes by number in {CLASSES_FILE}.")
    return names, longest


def folder_boxes(images, folder) -> tuple[torch.Tensor, list[str]]:
    """The layouts of a folder of images: (boxes (N, M, 5) float32, class names).

    The layout of IMAGE.png is IMAGE.json below `folder`, its coordinates those of the whole picture; they are carried
    over to the centre crop that training sees, without what lies mostly outside it.

    Args:
        images: a `FolderImages`.
        folder: where the layouts are, in the same sub-folders as the images; their classes as of `folder_classes`.

    Raises:
        ValueError: a picture without a layout, and what `as_boxes` refuses, with the file's name.
    """
    folder = Path(folder).expanduser()
    files = [folder / Path(name).with_suffix(".json") for name in images.names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(files)} images have no layout, the first of them {missing[0]}.")
    class_names, longest = folder_classes(folder)
    layouts = []
    for file, (width, height) in zip(files, images.sizes):
        (boxes,) = read_layouts(file, class_names, longest)
        layouts.append(cropped(boxes, width, height))
    return _stacked(layouts), class_names


def cropped(boxes: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Boxes (N, 5) of a picture of width x height as those of its middle square; what is mostly outside is left out."""
    side = min(width, height)
    scale = torch.tensor([width, height, width, height]) / side
    corners = boxes[:, 1:] * scale - (scale - 1) / 2
    inside = corners.clamp(0, 1)
    kept = _area(inside) >= _LEAST_VISIBLE * _area(corners)
    return torch.cat([boxes[:, :1], inside], dim=1)[kept & (boxes[:, 0] != NO_BOX)]


def _area(corners):
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


def mirrored(boxes: torch.Tensor) -> torch.Tensor:
    """The boxes (..., 5) of pictures flipped from left to right."""
    flipped = boxes.clone()
    flipped[..., 1], flipped[..., 3] = 1 - boxes[..., 3], 1 - boxes[..., 1]
    flipped[boxes[..., 0] == NO_BOX] = boxes[boxes[..., 0] == NO_BOX]
    return flipped


def draw_boxes(boxes, class_names, side: int, picture=None) -> Image.Image:
    """One layout (N, 5) as a picture of side x side pixels: frames in their classes' colours, names cut to what fits.

    `picture`, a PIL image, lies below, enlarged pixel by pixel; without one the frames are tinted on white.
    """
    below = Image.new("RGB", (side, side), (255, 255, 255)) if picture is None else picture.convert("RGB")
    sheet = below.resize((side, side), Image.Resampling.NEAREST)
    rows = [(int(row[0]), [round(side * value) for value in row[1:]]) for row in boxes.tolist() if row[0] != NO_BOX]
    draw, width = ImageDraw.Draw(sheet), max(1, side // 100)
    for label, (left, top, right, bottom) in rows:
        colour = _COLOURS[label % len(_COLOURS)]
        tint = None if picture is not None else tuple((3 * 255 + c) // 4 for c in colour)
        draw.rectangle((left, top, right - 1, bottom - 1), fill=tint, outline=colour, width=width)
    font = ImageFont.load_default(size=max(9, side // 18))
    for label, (left, top, right, _) in rows:  # last, so that no frame hides a name
        room, name = right - left - 2 * width, str(class_names[label])
        shorter = (name, (name.split() or [""])[0], name[:3])
        fitting = next((text for text in shorter if font.getlength(text) <= room), "")
        draw.text((left + 2 * width, top + width), fitting, fill=_dark(label), font=font)
    return sheet


def _dark(label: int) -> tuple[int, ...]:
    """The class's colour, dark enough to be read on its tint."""
    return tuple(c * 2 // 3 for c in _COLOURS[label % len(_COLOURS)])

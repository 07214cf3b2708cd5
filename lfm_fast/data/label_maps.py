"""Label maps: one class id per pixel, from files, from palette colours and from the embedded set's own pictures."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lfm_fast.checkpoint import atomic_write
from lfm_fast.data.folder import files_below
from lfm_fast.data.palettes import get_palette
from lfm_fast.data.reading import SUFFIXES, UnusableImage, open_unconverted, to_tensor
from lfm_fast.data.source import Report

MAP_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm", ".ppm")  # none that loses pixels
HOLDS = ("auto", "ids", "colours")
LARGEST_RATIO = 8  # of a map's sides, as for images: what lies further out is cut before the middle square is


def read_label_map(path, palette, *, size: int | None = None, holds: str = "auto") -> torch.Tensor:
    """The ids in a file, (H, W) int64, or (size, size) after `centre_square`.

    Args:
        path: an image file without loss: ids in grey (8, 16 or 32 bits) or palette mode, or the palette's colours in
            RGB. Grey values are what the data set's own files hold for its ids (`Palette.stored`).
        palette: a `Palette` or its name.
        size: side of the middle square that an image of this size is cut to; None keeps the file's own size.
        holds: "ids", "colours", or "auto": colours in RGB and RGBA files, ids in all others.

    Raises:
        ValueError: the file cannot be read, or holds an id or a colour that the palette does not know; it names both
            the value and the place.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif"):
        raise ValueError(f"{path.name} is a JPEG, whose loss invents ids along every edge: save the label map as PNG.")
    try:
        picture = open_unconverted(path)
    except UnusableImage as error:
        raise ValueError(f"The label map {path} cannot be used: {error}.") from error
    try:
        ids = from_picture(picture, palette, holds)
    except ValueError as error:
        raise ValueError(f"The label map {path}: {error}") from error
    return ids if size is None else centre_square(ids, size)


def from_picture(picture, palette, holds: str = "auto") -> torch.Tensor:
    """The ids (H, W) int64 in a PIL image; arguments and errors as of `read_label_map`."""
    if holds not in HOLDS:
        raise ValueError(f"holds={holds!r} is not known: choose one of {', '.join(HOLDS)}.")
    if holds == "ids" or (holds == "auto" and picture.mode not in ("RGB", "RGBA")):
        return from_stored(torch.from_numpy(_values(picture)), palette)
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema()[0] < 255:
        raise ValueError("it has transparent pixels, which are no palette colour.")
    return from_colours(torch.from_numpy(np.array(picture.convert("RGB"))), palette)


def as_label_maps(given, palette, holds: str = "auto") -> torch.Tensor:
    """Label maps (N, H, W) int64 of a file's path, a PIL image, or a NumPy or PyTorch array.

    Arrays hold the palette's ids, (H, W) or (N, H, W), or its colours, (H, W, 3) uint8. Files and pictures hold what
    published files do.

    Raises:
        ValueError: anything else, and what is no id or colour of the palette, with its place.
    """
    if isinstance(given, (str, os.PathLike)):
        return read_label_map(given, palette, holds=holds)[None]
    if isinstance(given, Image.Image):
        return from_picture(given, palette, holds)[None]
    if isinstance(given, np.ndarray):
        given = to_tensor(given, "label_map")
    try:
        maps = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"label_map is {type(given).__name__}; expected a path, a PIL image, or an array (H, W)."
        ) from None
    if maps.ndim == 3 and maps.shape[-1] == 3 and maps.dtype == torch.uint8:
        return from_colours(maps, palette)[None]
    if maps.ndim not in (2, 3) or (maps.ndim == 3 and maps.shape[-1] < 5):
        raise ValueError(f"label_map has shape {tuple(maps.shape)}; expected (H, W), (N, H, W) or (H, W, 3) colours.")
    ids = check_ids(maps, palette)
    return ids if ids.ndim == 3 else ids[None]


def _values(picture) -> np.ndarray:
    """The numbers in a picture of one channel: palette indices, grey values of up to 32 bits; bits become 0 and 1."""
    if picture.mode not in ("1", "L", "P", "I") and not picture.mode.startswith("I;16"):
        raise ValueError(f"pixels of mode {picture.mode} are no ids: save ids as a grey or palette PNG.")
    return np.array(picture).astype(np.int64)


def from_stored(values, palette) -> torch.Tensor:
    """Ids (H, W) int64 of the integers (H, W) that the data set's published files hold for them.

    Example:
        >>> from_stored(torch.tensor([[255, 0], [181, 3]]), "coco-stuff").tolist()
        [[0, 1], [182, 4]]

    Raises:
        ValueError: a value that stands for no id, with its place.
    """
    palette = get_palette(palette)
    table = torch.full((max(palette.stored) + 1,), -1)
    table[list(palette.stored)] = torch.arange(len(palette))
    values = values.long()
    known = (values >= 0) & (values < len(table))
    ids = torch.where(known, table[values.clamp(0, len(table) - 1)], -1)
    if bool((ids < 0).any()):
        row, column = (ids < 0).nonzero()[0].tolist()
        raise ValueError(
            f"the value {int(values[row, column])} at row {row}, column {column} is no id of {palette.name}, whose "
            f"{len(palette)} classes are stored as {_ranges(palette.stored)}."
        )
    return ids


def _ranges(values) -> str:
    """Whole numbers in few words: (255, 0, 1, 2) is "0 to 2 and 255"."""
    values, runs = sorted(values), []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return " and ".join(f"{a} to {b}" if b > a else f"{a}" for a, b in runs)


def from_colours(pixels, palette) -> torch.Tensor:
    """Ids (H, W) int64 of palette colours (H, W, 3) uint8; only exact colours count.

    Example:
        >>> from_colours(torch.tensor([[[204, 0, 0], [0, 0, 0]]], dtype=torch.uint8), "celebamask-hq").tolist()
        [[1, 0]]

    Raises:
        ValueError: a colour that no class has, or that two classes share, with its place.
    """
    palette = get_palette(palette)
    keys = _key(palette.table())
    order = keys.argsort(stable=True)
    wanted = _key(pixels)
    place = torch.searchsorted(keys[order], wanted).clamp(max=len(keys) - 1)
    ids = order[place]
    _refuse_colour(keys[ids] != wanted, pixels, f"is no colour of {palette.name}: save the ids as a grey PNG instead")
    shared = (keys[:, None] == keys).sum(1) > 1
    if bool(shared.any()):
        names = " and ".join(palette.classes[k] for k in shared.nonzero().flatten().tolist())
        _refuse_colour(shared[ids], pixels, f"is shared by {names} in {palette.name}: save the ids as a grey PNG")
    return ids


def _key(colours):
    """(..., 3) uint8 -> (...) int64: red 65536 + green 256 + blue."""
    return (colours.long() * torch.tensor([65536, 256, 1])).sum(-1)


def _refuse_colour(wrong, pixels, says):
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        colour = tuple(pixels[row, column].tolist())
        raise ValueError(f"the colour {colour} at row {row}, column {column} {says}.")


def check_ids(label_maps, palette) -> torch.Tensor:
    """Label maps (..., H, W) of whole numbers as int64.

    Raises:
        ValueError: another type, no pixels, or an id outside 0 to K - 1, with its place.
    """
    palette = get_palette(palette)
    label_maps = torch.as_tensor(label_maps)
    if label_maps.is_floating_point() or label_maps.is_complex() or label_maps.ndim < 2 or not label_maps.numel():
        raise ValueError(
            f"label_map is {label_maps.dtype} of shape {tuple(label_maps.shape)}; expected whole-number ids (H, W)."
        )
    ids = label_maps.long()
    wrong = (ids < 0) | (ids >= len(palette))
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"label_map has the id {int(ids[tuple(place)])} at row {place[-2]}, column {place[-1]}, but the ids of "
            f"{palette.name} are 0 to {len(palette) - 1}."
        )
    return ids


def resize(label_maps, height: int, width: int) -> torch.Tensor:
    """(..., H, W) -> (..., height, width) by the nearest pixel: source row floor((i + 1/2) H / height).

    Example:
        >>> resize(torch.tensor([[1, 2, 3, 4]]), 1, 2).tolist()
        [[2, 4]]
    """
    rows = ((torch.arange(height) * 2 + 1) * label_maps.shape[-2]) // (2 * height)
    columns = ((torch.arange(width) * 2 + 1) * label_maps.shape[-1]) // (2 * width)
    return label_maps[..., rows, :][..., columns]


def centre_square(label_map, size: int) -> torch.Tensor:
    """(H, W) ids of an image -> (size, size) ids of its `reading.centre_crop`: the same place, by the nearest pixel."""
    height, width = (min(side, LARGEST_RATIO * min(label_map.shape)) for side in label_map.shape)
    top, left = (label_map.shape[0] - height) // 2, (label_map.shape[1] - width) // 2
    label_map = label_map[top : top + height, left : left + width]
    while min(height, width) >= 2 * size:  # as the image was halved, with its rounding of odd sides
        height, width = height // 2, width // 2
    scale = size / min(height, width)
    scaled = resize(label_map, round(height * scale), round(width * scale))
    top, left = (scaled.shape[0] - size) // 2, (scaled.shape[1] - size) // 2
    return scaled[top : top + size, left : left + size].contiguous()


def draw(label_maps, palette) -> torch.Tensor:
    """Ids (..., H, W) in the palette's colours, (..., 3, H, W) uint8.

    Example:
        >>> draw(torch.tensor([[1]]), "celebamask-hq").flatten().tolist()
        [204, 0, 0]

    Raises:
        ValueError: an id that the palette does not know.
    """
    palette = get_palette(palette)
    return palette.table()[check_ids(label_maps, palette)].movedim(-1, -3).contiguous()


def write_label_map(path, label_map, palette) -> None:
    """Write ids (H, W) as a palette PNG: it holds what published files hold, and shows the palette's colours.

    Raises:
        ValueError: an id that the palette does not know. OSError: the file cannot be written.
    """
    palette = get_palette(palette)
    ids = check_ids(label_map, palette)
    picture = Image.fromarray(torch.tensor(palette.stored)[ids].numpy().astype(np.uint8), mode="P")
    colours = np.zeros((256, 3), np.uint8)
    colours[list(palette.stored)] = palette.table().numpy()
    picture.putpalette(colours.tobytes())
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def nearest_colour(pixels, colours) -> torch.Tensor:
    """Index of the closest colour: argmin_k |pixel - colour_k|^2, the first of equals; (..., 3) -> (...) int64.

    Both in 0 to 255, in float32, where whole numbers make every sum below exact: |pixel|^2 changes no order.
    """
    colours = torch.as_tensor(colours).float()
    squares, found = colours.square().sum(-1), []
    for part in pixels.reshape(-1, 3).split(1 << 18):
        found.append(torch.addmm(squares, part.float(), colours.t(), alpha=-2.0).argmin(1))
    return torch.cat(found).view(pixels.shape[:-1])


def of_embedded(rgba) -> torch.Tensor:
    """Label maps of embedded pictures (..., 4, H, W) uint8 in the palette "embedded": (..., H, W) int64.

    0 where the emoji covers less than half of the pixel, elsewhere the nearest of OpenMoji's colours.
    """
    colours = torch.tensor(get_palette("embedded").appearance)[1:]
    ids = nearest_colour(rgba[..., :3, :, :].movedim(-3, -1), colours) + 1
    return torch.where(rgba[..., 3, :, :] < 128, 0, ids)


def pair_by_stem(names, folder) -> tuple[list[Path | None], Report]:
    """The label map of each image: same name below `folder`, whatever its suffix.

    Args:
        names: of the images, paths relative to their folder.
        folder: where the maps are, in the same sub-folders or all in the folder itself.

    Returns:
        (path or None for each image, a report that names images without a map).

    Raises:
        ValueError: the folder does not exist or holds no map, an image has two, or two images have one.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"The folder of label maps {folder} does not exist.")
    maps = _maps_below(folder)
    if not maps:
        raise ValueError(f"{folder} holds no label map ({', '.join(MAP_SUFFIXES)}).")
    report, found, owners = Report(), [], {}
    for name in names:
        stem = _without_suffix(name)
        candidates = maps.get(stem) or maps.get(os.path.basename(stem), [])
        if len(candidates) > 1:
            both = " and ".join(path.name for path in candidates[:2])
            raise ValueError(f"{folder} has two label maps for {name}: {both}.")
        if not candidates:
            report.skipped.append((name, "it has no label map"))
        elif candidates[0] in owners:
            raise ValueError(
                f"{candidates[0]} would be the label map of both {owners[candidates[0]]} and {name}: put the maps into "
                "the sub-folders of the images."
            )
        else:
            owners[candidates[0]] = name
        found.append(candidates[0] if candidates else None)
    return found, report


def _maps_below(folder: Path) -> dict[str, list[Path]]:
    """Files that may be maps, by their path without suffix."""
    maps = {}
    try:
        paths = sorted(map(Path, files_below(folder, every_name=True)))
    except OSError as error:
        raise ValueError(f"The folder of label maps {error.filename} cannot be listed ({error.strerror}).") from error
    for path in paths:
        if path.suffix.lower() in MAP_SUFFIXES and path.is_file():
            maps.setdefault(_without_suffix(path.relative_to(folder).as_posix()), []).append(path)
    return maps


def _without_suffix(name) -> str:
    root, suffix = os.path.splitext(str(name))
    return root if suffix.lower() in SUFFIXES else str(name)

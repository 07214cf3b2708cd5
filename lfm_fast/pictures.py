"""Grids, panels side by side and loss curves, as files a person looks at."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lfm_fast.checkpoint import atomic_write

_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def to_uint8(images) -> np.ndarray:
    """(N, 3, H, W) uint8, or float in [0, 1] (clipped), of NumPy or PyTorch -> (N, H, W, 3) uint8.

    Raises:
        ValueError: another shape, or floating-point images that are not finite or far outside [0, 1].
    """
    if hasattr(images, "detach"):
        images = images.detach().float().cpu().numpy() if images.is_floating_point() else images.cpu().numpy()
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {images.shape}; a picture needs (N, 3, H, W).")
    if images.dtype != np.uint8:
        if not np.isfinite(images).all():
            raise ValueError("images hold values that are not finite: the model or its sampling diverged.")
        if images.size and (images.min() < -0.1 or images.max() > 1.1):
            raise ValueError(
                f"images range from {images.min():.3g} to {images.max():.3g}; pass them in [0, 1], so (x + 1) / 2 of "
                "what an autoencoder decodes."
            )
        images = np.rint(np.clip(images.astype(np.float32), 0.0, 1.0) * 255.0).astype(np.uint8)
    return images.transpose(0, 2, 3, 1)


def save(picture, path) -> None:
    """Write a PNG file whole or not at all: what `path` held before outlives a full disk. Raises OSError."""
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def grid(images, columns: int | None = None, *, captions=None, column_captions=None, padding: int = 2, scale: int = 1):
    """Lay images out row by row: a `PIL.Image`.

    Args:
        images: (N, 3, H, W), float in [0, 1] or uint8.
        columns: images per row; None makes the grid nearly square.
        captions, column_captions: captions to the left of each row and above each column.
        padding: pixels between images and around them.
        scale: whole-number enlargement of every image, pixel by pixel.

    Raises:
        ValueError: no image, wrong shape, or a number of captions that differs from the rows or columns.

    Example:
        >>> grid(np.zeros((6, 3, 8, 8)), columns=3).size
        (32, 22)
    """
    pixels = to_uint8(images)
    if len(pixels) == 0:
        raise ValueError("There is no image to draw.")
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    rows = math.ceil(len(pixels) / columns)
    _check_captions("captions", captions, rows)
    _check_captions("column_captions", column_captions, columns)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = pixels.shape[1] + padding, pixels.shape[2] + padding
    font = _font(max(11, min(22, height // 4)))
    left = max((_text_size(font, text)[0] for text in captions), default=0) + 2 * padding + 8 if captions else 0
    lines = [_wrapped(font, text, width) for text in column_captions or ()]
    top = max((_text_size(font, text)[1] for text in lines), default=0) + padding + 6 if lines else 0
    sheet = Image.new("RGB", (left + columns * width + padding, top + rows * height + padding), _PAPER)
    for k, picture in enumerate(pixels):
        row, column = divmod(k, columns)
        sheet.paste(Image.fromarray(picture), (left + padding + column * width, top + padding + row * height))
    draw = ImageDraw.Draw(sheet)
    for row, text in enumerate(captions or ()):
        draw.text((left - 6, top + padding + (row + 0.5) * height), text, fill=_INK, font=font, anchor="rm")
    for column, text in enumerate(lines):
        place = (left + padding + (column + 0.5) * width, top / 2)
        draw.multiline_text(place, text, fill=_INK, font=font, anchor="mm", align="center")
    return sheet


def side_by_side(panels, *, gap: int = 16):
    """Join pictures from left to right, each under its title: a `PIL.Image`.

    Args:
        panels: pairs (title, PIL image).
        gap: pixels between panels and around them.
    """
    panels = [(str(title), picture.convert("RGB")) for title, picture in panels]
    if not panels:
        raise ValueError("There is no panel to draw.")
    font = _font(18)
    titles = [_wrapped(font, title, picture.width) for title, picture in panels]
    widths = [max(picture.width, _text_size(font, text)[0]) for text, (_, picture) in zip(titles, panels)]
    head = max(_text_size(font, text)[1] for text in titles) + 14
    height = head + max(picture.height for _, picture in panels) + gap
    sheet = Image.new("RGB", (sum(widths) + gap * (len(panels) + 1), height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    left = gap
    for text, width, (_, picture) in zip(titles, widths, panels):
        draw.multiline_text((left + width / 2, head / 2), text, fill=_INK, font=font, anchor="mm", align="center")
        sheet.paste(picture, (left + (width - picture.width) // 2, head))
        left += width + gap
    return sheet


def nearest(samples, references, *, block: int = 256) -> np.ndarray:
    """Index of the reference closest to each sample: argmin_j ||x_i - r_j||_2 over pixels, (N,) int64.

    Both (N or M, 3, H, W), float in [0, 1] or uint8, of one size. float32: ||x||^2 does not change the order.

    Raises:
        ValueError: sizes differ, or there is no reference.
    """
    x, r = to_uint8(samples), to_uint8(references)
    if len(r) == 0:
        raise ValueError("There is no reference image to compare with.")
    if x.shape[1:] != r.shape[1:]:
        raise ValueError(f"samples are {x.shape[1]}x{x.shape[2]} and references {r.shape[1]}x{r.shape[2]} pixels.")
    x = x.reshape(len(x), -1).astype(np.float32) / 255.0 - 0.5  # centred: smaller products, smaller rounding
    best, best_score = np.zeros(len(x), np.int64), np.full(len(x), np.inf, np.float32)
    for first in range(0, len(r), block):
        part = r[first : first + block].reshape(len(r[first : first + block]), -1).astype(np.float32) / 255.0 - 0.5
        score = (part**2).sum(1)[None] - 2.0 * (x @ part.T)
        closest = score.argmin(1)
        value = score[np.arange(len(x)), closest]
        better = value < best_score
        best[better], best_score[better] = closest[better] + first, value[better]
    return best


def samples_and_nearest(samples, references, *, pairs_per_row: int = 8, scale: int = 1):
    """Samples in one row and below each the training image closest to it in pixels: a `PIL.Image`.

    Shows whether a model makes new pictures or repeats its training set.
    """
    indices = nearest(samples, references)
    top, below = to_uint8(samples), to_uint8(references)[indices]
    per_row = min(pairs_per_row, len(top))
    rows, labels = [], []
    for first in range(0, len(top), per_row):
        for name, pictures in (("sample", top), ("nearest", below)):
            part = pictures[first : first + per_row]
            blank = np.full((per_row - len(part), *part.shape[1:]), 255, np.uint8)
            rows.append(np.concatenate([part, blank]))
            labels.append(name)
    return grid(np.concatenate(rows).transpose(0, 3, 1, 2), per_row, captions=labels, scale=scale)


def loss_curve(metrics, output, *, keys=("loss",), smoothing: int | None = None) -> None:
    """Draw losses over steps from a JSON-lines file: faint as recorded, strong as a running mean. Needs matplotlib.

    Args:
        metrics: file with one JSON object per line, each with "step" and some of `keys`; other lines are passed over.
        output: the PNG to write.
        keys: which values to draw.
        smoothing: records per running mean; None takes a fiftieth of them.

    Raises:
        ValueError: the file is missing or holds none of the keys, or matplotlib is not installed.
    """
    series = {key: _series(metrics, key) for key in keys}
    series = {key: points for key, points in series.items() if len(points[0])}
    if not series:
        raise ValueError(f"{metrics} holds no line with a step and {' or '.join(keys)}: there is no curve to draw.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("Drawing the loss curve needs matplotlib: run `pip install matplotlib`.") from error
    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")  # no pyplot: leaves the user's backend alone
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    values = np.concatenate([points[1] for points in series.values()])
    for number, (key, (steps, losses)) in enumerate(series.items()):
        window = smoothing or max(1, len(losses) // 50)
        axis.plot(steps, losses, color=f"C{number}", alpha=0.25, linewidth=0.8)
        label = f"{key} (mean of {window})" if window > 1 else key
        axis.plot(steps, _running_mean(losses, window), color=f"C{number}", linewidth=1.8, label=label)
    low, high = np.percentile(values, [1, 99])
    if low > 0 and high > 10 * low:  # a linear axis would press everything after the first steps onto the floor
        axis.set_yscale("log")
    axis.set(xlabel="step", ylabel="loss" if tuple(series) == ("loss",) else "value")
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(str(output))


def _series(path, key) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the finite values of a key; after a resume the later record of a step stands."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The metrics file {path} does not exist.")
    points = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            points[int(record["step"])] = float(record[key])
        except (ValueError, TypeError, KeyError):  # the last line of a killed run may be half a line
            continue
    steps = sorted(step for step, value in points.items() if math.isfinite(value))
    return np.array(steps, dtype=np.int64), np.array([points[step] for step in steps], dtype=np.float64)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place (of fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _check_captions(name, labels, count):
    if labels is not None and len(labels) != count:
        raise ValueError(f"{name} has {len(labels)} captions for {count} places: pass one for each.")


def _font(size: int):
    return ImageFont.load_default(size=size)


def _text_size(font, text) -> tuple[int, int]:
    left, top, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return math.ceil(right - left), math.ceil(bottom - top)


def _wrapped(font, text, width) -> str:
    """Break a caption between words so that it fits the width where its words do."""
    lines = [""]
    for word in str(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)

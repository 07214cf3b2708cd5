"""Masks for inpainting, True where there is a hole: drawn at random for training, or given as files, pictures, arrays.

Random ones are unions of strokes (chains of thick segments with round ends) and boxes, each wide enough that a network
has to paint and not only to interpolate. A convex shape meets a row of pixels in one interval, so a mask is made of
the intervals of its shapes row by row, without looking at pixels one by one.
"""

import math
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lfm_fast import ops
from lfm_fast.data.reading import UnusableImage, as_rgb, open_unconverted, to_tensor
from lfm_fast.ops.streams import STREAM_AUGMENTATION

KINDS = ("mixed", "strokes", "boxes")
SHARE = (0.05, 0.75)  # of the pixels, that holes take

_FIRST_BLOCK = 1  # of stream 4's words: those of block 0 decide about mirrors (lfm_fast.data.latents.flips_of)
_ATTEMPTS = 8  # at a mask whose share is in the range
_STROKES, _SEGMENTS, _BOXES = 5, 5, 4  # at most
_LENGTH, _WIDTH, _SIDE = (0.05, 0.8), (0.05, 0.4), (0.1, 0.6)  # of segments, strokes, boxes, in units of the image's
_STROKE_WORDS, _BOX_WORDS = 4 + 2 * _SEGMENTS, 4
_WORDS = 3 + _STROKES * _STROKE_WORDS + _BOXES * _BOX_WORDS
_BLOCKS = (_WORDS + 3) // 4


def free_form(sample_numbers, seed, size, *, kind="mixed", share=SHARE):
    """Random masks, (B, H, W) bool on the CPU: a function of (seed, sample number) alone, whatever the batch.

    "strokes": 1 to 5 chains of 1 to 5 segments, each chain 0.05 to 0.4 of the shorter side wide (two pixels at least),
    segments 0.05 to 0.8 long, turning anywhere, reflected at the edges. "boxes": 1 to 4, each side 0.1 to 0.6 of the
    image's, all of any proportions. "mixed": a third of the samples strokes, a third boxes, a third both. Every stroke
    and box is one connected region, so a mask has at most 5, 4 or 9. A mask with too small or large a share of holes
    is drawn again, up to 8 times; then it is one box of the middle share.

    Args:
        sample_numbers: (B,) int64.
        seed: integer in [0, 2^63).
        size: side, or (height, width), of 16 pixels or more.
        kind: "mixed", "strokes" or "boxes".
        share: (low, high), the share of the pixels that holes take, at least 0.1 apart.

    Raises ValueError for any other argument.

    >>> import torch
    >>> free_form(torch.tensor([3, 8]), seed=0, size=64).shape
    torch.Size([2, 64, 64])

    Source: Suvorov et al. (LaMa), arXiv 2109.07161, section 2.3 (wide masks); Li et al. (MAT), arXiv 2203.15270,
    section 4.1 (strokes and boxes together, by hole ratio).
    """
    height, width = _checked(size, kind, share)
    low, high = (bound * height * width for bound in share)
    numbers = sample_numbers.cpu()
    masks = torch.zeros(len(numbers), height, width, dtype=torch.bool)
    waiting = torch.arange(len(numbers))
    for attempt in range(_ATTEMPTS):
        words = _words(numbers[waiting], seed, attempt)
        drawn = _draw(words, height, width, kind)
        holes = drawn.flatten(1).sum(1)
        good = (low <= holes) & (holes <= high)
        masks[waiting[good]] = drawn[good]
        waiting = waiting[~good]
        if not len(waiting):
            return masks
    masks[waiting] = _box_of_share(_words(numbers[waiting], seed, _ATTEMPTS), height, width, sum(share) / 2)
    return masks


def _checked(size, kind, share):
    sides = (size, size) if isinstance(size, int) else size
    if not (isinstance(sides, (tuple, list)) and len(sides) == 2) or not all(
        isinstance(side, int) and side >= 16 for side in sides
    ):
        raise ValueError(f"size is {size!r}; masks have a side, or a height and a width, of at least 16 pixels")
    if kind not in KINDS:
        raise ValueError(f"kind of masks is {kind!r}; there is {', '.join(KINDS)}")
    fine = isinstance(share, (tuple, list)) and len(share) == 2
    if not fine or not (share[0] >= 0.0 and share[0] + 0.0999 < share[1] and share[1] <= 1.0):
        raise ValueError(f"share is {share!r}; expected (low, high) within [0, 1] and at least 0.1 apart")
    return tuple(sides)


def _words(numbers, seed, attempt):
    """(B, _WORDS) float64 in [0, 1), of one attempt."""
    offset = _FIRST_BLOCK + attempt * _BLOCKS
    return ops.philox_uniform(numbers, _WORDS, seed, STREAM_AUGMENTATION, offset).to(torch.float64)


def _draw(words, height, width, kind):
    which, strokes, boxes = words[:, 0], words[:, 1], words[:, 2]
    if kind != "mixed":
        which = torch.full_like(which, 0.0 if kind == "strokes" else 0.5)
    num_strokes = torch.where((which >= 1 / 3) & (which < 2 / 3), 0, 1 + (strokes * _STROKES).long())
    num_boxes = torch.where(which < 1 / 3, 0, 1 + (boxes * _BOXES).long())
    of_strokes = words[:, 3 : 3 + _STROKES * _STROKE_WORDS].unflatten(1, (_STROKES, _STROKE_WORDS))
    of_boxes = words[:, 3 + _STROKES * _STROKE_WORDS :].unflatten(1, (_BOXES, _BOX_WORDS))
    intervals = [_strokes(of_strokes, num_strokes, height, width), _boxes(of_boxes, num_boxes, height, width)]
    return _fill(*(torch.cat(parts) for parts in zip(*intervals)), len(words), width)


def _strokes(u, count, height, width):
    """The first `count` chains of each mask, u (B, S, _STROKE_WORDS): of every segment the number of its mask (R,), and
    the left and right ends of its rows (R, H)."""
    side = min(height, width)
    radius = (0.5 * side * _between(u[..., 0], _WIDTH)).clamp_min(1.0)
    length = side * _between(u[..., 4 : 4 + _SEGMENTS], _LENGTH)
    angle = 2 * math.pi * u[..., 4 + _SEGMENTS :]
    x, y = (
        _reflected(torch.cat([start[..., None] * extent, turn(angle) * length], dim=-1), extent)
        for start, turn, extent in ((u[..., 2], torch.cos, width), (u[..., 3], torch.sin, height))
    )
    used = torch.arange(_STROKES)[:, None] < count[:, None, None]  # (B, S, 1)
    used = used & (torch.arange(_SEGMENTS) <= (u[..., 1:2] * _SEGMENTS).long())
    ends = (value[used][:, None] for value in (x[..., :-1], y[..., :-1], x[..., 1:], y[..., 1:]))
    radius = radius[..., None].expand_as(used)[used][:, None]
    return used.nonzero()[:, 0], *_capsule(*ends, radius, torch.arange(height, dtype=torch.float64) + 0.5)


def _between(u, bounds):
    return bounds[0] + (bounds[1] - bounds[0]) * u


def _reflected(steps, extent):
    """Running sums of the steps (..., V), each reflected into [0, extent] before the next; a step is shorter."""
    places = [steps[..., 0]]
    for k in range(1, steps.shape[-1]):
        places.append(extent - (extent - (places[-1] + steps[..., k]).abs()).abs())
    return torch.stack(places, dim=-1)


def _capsule(x0, y0, x1, y1, radius, row):
    """Left and right ends, on each row, of the points within `radius` of a segment; left > right where there is none.

    The hull of two discs: the discs and, where the row passes between them, the rectangle that joins them.
    """
    lefts, rights = [], []
    for x, y in ((x0, y0), (x1, y1)):
        half = (radius**2 - (row - y) ** 2).sqrt()  # nan where the row misses the disc
        lefts.append((x - half).nan_to_num(nan=math.inf))
        rights.append((x + half).nan_to_num(nan=-math.inf))
    dx, dy = (torch.where(d.abs() < 1e-9, 1e-9, d) for d in (x1 - x0, y1 - y0))
    length = (dx * dx + dy * dy).sqrt()
    # 0 <= (p - p0) (p1 - p0) <= length^2 and |(p - p0) x (p1 - p0)| <= radius length, solved for x of p
    along = [x0 + (bound - dy * (row - y0)) / dx for bound in (0.0, length * length)]
    across = [x0 + (bound + dx * (row - y0)) / dy for bound in (-radius * length, radius * length)]
    left = torch.maximum(torch.minimum(*along), torch.minimum(*across))
    right = torch.minimum(torch.maximum(*along), torch.maximum(*across))
    lefts.append(left.where(left <= right, math.inf))
    rights.append(right.where(left <= right, -math.inf))
    return torch.stack(lefts).amin(0), torch.stack(rights).amax(0)


def _boxes(u, count, height, width):
    """The first `count` boxes of each mask, u (B, N, 4), as `_strokes` gives segments."""
    used = torch.arange(_BOXES) < count[:, None]
    u = u[used]
    tall, wide = height * _between(u[:, 0], _SIDE), width * _between(u[:, 1], _SIDE)
    top, left = (u[:, 2] * (height - tall))[:, None], (u[:, 3] * (width - wide))[:, None]
    row = torch.arange(height, dtype=torch.float64) + 0.5
    inside = (top <= row) & (row <= top + tall[:, None])
    return used.nonzero()[:, 0], left.where(inside, math.inf), (left + wide[:, None]).expand_as(inside)


def _fill(number, left, right, count, width):
    """(count, H, W) bool: in mask number[r] the pixels whose middle is in an interval of row r (R, H)."""
    height = left.shape[1]
    first = (left - 0.5).ceil().clamp(0, width)
    end = (right - 0.5).floor().clamp(-1, width - 1) + 1
    empty = end <= first
    row = (number[:, None] * height + torch.arange(height)) * (width + 1)
    first, end = ((row + place.masked_fill(empty, width).long()).flatten() for place in (first, end))
    change = torch.zeros(count * height * (width + 1), dtype=torch.int32)
    one = torch.ones((), dtype=torch.int32).expand_as(first)
    change.scatter_add_(0, first, one).scatter_add_(0, end, -one)
    return change.view(count, height, width + 1)[..., :width].cumsum(2, dtype=torch.int32) > 0


def _box_of_share(words, height, width, share):
    """One box each of about this share: (B, H, W) bool."""
    tall = round(height * math.sqrt(share))
    wide = min(width, round(share * height * width / tall))
    top = (words[:, 0, None] * (height - tall + 1)).long()
    left = (words[:, 1, None] * (width - wide + 1)).long()
    rows, columns = torch.arange(height), torch.arange(width)
    inside = (top <= rows) & (rows < top + tall), (left <= columns) & (columns < left + wide)
    return inside[0][:, :, None] & inside[1][:, None, :]


def to_latent(masks, sides):
    """Masks (B, H, W) as latents have them: (B, 1, h, w) float32, 1 in the hole and -1 outside, the nearest pixel's."""
    return F.interpolate(masks[:, None].float(), size=tuple(sides), mode="nearest") * 2 - 1


def read_mask(mask, *, hole=255):
    """A mask as (H, W) bool on the CPU, True in the hole.

    Args:
        mask: a file or a PIL image of any mode, by its brightness on white paper, or a NumPy array or tensor (H, W),
            (1, H, W) or (H, W, 1) of bool, of integers (0 and 1, or 0 to 255, in uint16 also to 65535), or of floats
            in [0, 1].
        hole: 255 where white pixels (True, 1, 255) are the hole, 0 where black ones are.

    Values between black and white are split at half, with a warning. Raises ValueError for a file that is no picture,
    another shape, and values out of range or not finite.

    >>> read_mask(np.array([[0, 255]], np.uint8)).tolist()
    [[False, True]]
    """
    if hole not in (0, 255) or isinstance(hole, bool):
        raise ValueError(f"hole is {hole!r}; it is 255 (white pixels are the hole) or 0 (black ones are)")
    values = _brightness(mask)
    if not bool(((values == 0) | (values == 1)).all()):
        warnings.warn("the mask is not black and white alone; what is brighter than half counts as white", stacklevel=2)
    return (values >= 0.5) == (hole == 255)


def _brightness(mask):
    """(H, W) float64 in [0, 1]."""
    if isinstance(mask, (str, Path)):
        try:
            mask = open_unconverted(mask)
        except UnusableImage as error:
            raise ValueError(f"mask {mask} cannot be used: {error}") from error
    if isinstance(mask, Image.Image):
        mask = _pixels(mask)
    if not isinstance(mask, (np.ndarray, torch.Tensor)):
        raise ValueError(f"mask is a {type(mask).__name__}; expected a file, a PIL image, an array or a tensor")
    given = to_tensor(mask, "mask")
    shape = tuple(given.shape)
    if len(shape) == 3 and 1 in (shape[0], shape[2]):
        given = given[0] if shape[0] == 1 else given[..., 0]
    if given.ndim != 2 or not given.numel():
        raise ValueError(f"mask has shape {shape}; expected (H, W): one value a pixel")
    kinds = "bool, integers from 0 to 255, or floats in [0, 1]"
    if given.is_complex():
        raise ValueError(f"mask holds {given.dtype}; expected {kinds}")
    values = given.to(torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError("mask holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    white = _white(given.dtype, high)
    if low < 0 or high > white:
        raise ValueError(f"mask ranges from {low:g} to {high:g}; expected {kinds}")
    return values / white


def _pixels(picture):
    """(H, W) of a PIL image: its numbers where they are 16 bits or floats, else its brightness on white."""
    if picture.mode == "F":
        return np.array(picture)
    if not picture.mode.startswith("I"):
        return np.array(as_rgb(picture)[0].convert("L"))
    numbers = np.array(picture).astype(np.int64)
    return numbers.astype(np.uint16) if numbers.min() >= 0 and numbers.max() <= 65535 else numbers


def _white(dtype, highest):
    """The value of white, for masks of 0 and 1, of 8 and of 16 bits; a type with room for more may hold less."""
    if dtype.is_floating_point or highest <= 1:
        return 1
    return 65535 if dtype == torch.uint16 and highest > 255 else 255

"""Whether pictures follow their layouts: ink where the boxes are, and in each box something of its class."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lfm_fast.models.box_encoder import NO_BOX

_INK = 0.12  # difference from the canvas, of the channel that differs most, from which a pixel is ink
_SIDE = 8  # of the crops that are compared: what a class looks like, not its details
_NEIGHBOURS = 5


@dataclass(frozen=True)
class LayoutAgreement:
    """How well some pictures follow some layouts.

    inside: share of the ink that lies in a box; filled: share of a box that is ink, mean over boxes; classes: share of
    boxes whose content looks most like their class, or None where nothing was given to compare with; boxes: how many.
    """

    inside: float
    filled: float
    classes: float | None
    boxes: int


@dataclass(frozen=True)
class ClassExamples:
    """What boxes of each class look like: crops (R, 3, 8, 8) and their classes (R,) int64."""

    crops: Tensor
    classes: Tensor

    @classmethod
    def of(cls, images: Tensor, boxes: Tensor) -> "ClassExamples":
        """The boxes of pictures (B, 3, H, W) in [0, 1] with boxes (B, N, 5)."""
        return cls(*_crops(images, boxes))

    def nearest_class(self, crops: Tensor) -> Tensor:
        """The class that most of each crop's five nearest examples have, (Q, 3, 8, 8) -> (Q,) int64."""
        distance = torch.cdist(crops.flatten(1), self.crops.flatten(1))
        nearest = distance.topk(min(_NEIGHBOURS, len(self.crops)), largest=False).indices
        votes = F.one_hot(self.classes[nearest], int(self.classes.max()) + 1).sum(dim=1).double()
        votes -= 1e-6 * torch.arange(votes.shape[1])  # the lower number where two have as many
        return votes.argmax(dim=1)


def layout_agreement(images: Tensor, boxes: Tensor, examples: ClassExamples | None = None) -> LayoutAgreement:
    """Measure how pictures follow layouts.

    The canvas of a picture is its median colour, so this is for scenes on a canvas that shows in most of the picture.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        boxes: (B, N, 5) float32, rows (class, x0, y0, x1, y1), class -1 being no box.
        examples: pictures of the classes, for `classes`.

    Raises:
        ValueError: other shapes, or layouts without any box.

    Example:
        >>> images = torch.ones(1, 3, 8, 8)
        >>> images[:, :, 2:4, 2:5] = 0
        >>> layout_agreement(images, torch.tensor([[[0, 0.25, 0.25, 0.5, 0.5]]])).inside
        0.6666666666666666
    """
    _check(images, boxes)
    ink = _ink(images)
    covered, shares = torch.zeros_like(ink), []
    for number, places in enumerate(_places(boxes, images.shape)):
        for _, rows, columns in places:
            covered[number, rows, columns] = True
            shares.append(ink[number, rows, columns].double().mean())
    total = int(ink.sum())
    classes = None
    if examples is not None:
        crops, asked = _crops(images, boxes)
        classes = float((examples.nearest_class(crops) == asked).double().mean())
    inside = int((ink & covered).sum()) / total if total else 0.0
    return LayoutAgreement(inside, float(torch.stack(shares).mean()), classes, len(shares))


def _check(images, boxes):
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images are {tuple(images.shape)} {images.dtype}, expected floats (B, 3, H, W) in [0, 1].")
    if boxes.dim() != 3 or boxes.shape[::2] != (len(images), 5):
        raise ValueError(f"boxes are {tuple(boxes.shape)}, expected ({len(images)}, N, 5): a layout for each image.")
    if not (boxes[..., 0] != NO_BOX).any():
        raise ValueError("there is no box in any of the layouts, so nothing to measure.")


def _canvas(images: Tensor) -> Tensor:
    return images.flatten(2).median(dim=2).values[:, :, None, None]


def _ink(images: Tensor) -> Tensor:
    """Where pictures (B, 3, H, W) differ from their canvas, (B, H, W) bool."""
    return (images - _canvas(images)).abs().amax(dim=1) > _INK


def _places(boxes: Tensor, shape):
    """Of each picture [(class, rows, columns)]: at least one pixel each."""
    height, width = shape[2:]
    for rows in boxes.tolist():
        yield [
            (int(label), _pixels(y0, y1, height), _pixels(x0, x1, width))
            for label, x0, y0, x1, y1 in rows
            if label != NO_BOX
        ]


def _pixels(low, high, side) -> slice:
    first = min(round(low * side), side - 1)
    return slice(first, max(round(high * side), first + 1))


def _crops(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """What is in each box, on white and resized: (Q, 3, 8, 8), and its class: (Q,) int64."""
    crops, classes = [], []
    on_white = (images - _canvas(images) + 1).clamp(0, 1)
    for picture, places in zip(on_white, _places(boxes, images.shape)):
        for label, rows, columns in places:
            crop = F.interpolate(picture[None, :, rows, columns], (_SIDE, _SIDE), mode="bilinear", antialias=True)
            crops.append(crop[0])
            classes.append(label)
    return torch.stack(crops), torch.tensor(classes)

"""Do pictures have the classes of their label maps where the maps say so: intersection over union."""

from dataclasses import dataclass

import torch

from lfm_fast.data.label_maps import check_ids, nearest_colour
from lfm_fast.data.palettes import get_palette


@dataclass(frozen=True)
class SegmentationScores:
    """How far predicted ids agree with label maps.

    Attributes:
        iou: (K,) float64, pixels of class k in both / in either, over all pictures together; NaN where in neither.
        mean_iou: mean of the classes that are in either.
        accuracy: share of pixels with the id of their map.
    """

    iou: torch.Tensor
    mean_iou: float
    accuracy: float


def segment(images, palette="embedded") -> torch.Tensor:
    """The class of every pixel by its nearest colour, for pictures drawn in a palette's colours: (N, H, W) int64.

    Classes of one colour cannot be told apart and become the first of them (`tellable` does the same to maps): opaque
    white is the background in the embedded set, which is laid on white.

    Args:
        images: (N, 3, H, W), uint8 or floating in [0, 1].
        palette: a palette whose classes have a colour of their own.

    Raises:
        ValueError: another shape, or a palette of photographs.

    Example:
        >>> segment(torch.tensor([1.0, 0.9, 0.2]).view(1, 3, 1, 1)).item(), get_palette("embedded").classes[9]
        (9, 'yellow')
    """
    palette = _coloured(palette)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, 3, H, W).")
    pixels = images.movedim(1, -1)
    scale = 255.0 if images.is_floating_point() else 1.0
    return nearest_colour(pixels.float() * scale, torch.tensor(palette.appearance))


def tellable(label_maps, palette="embedded") -> torch.Tensor:
    """Label maps (..., H, W) with each id replaced by the first id that looks the same.

    Example:
        >>> tellable(torch.tensor([[0, 2, 9]])).tolist()  # 2 is opaque white
        [[0, 0, 9]]

    Raises:
        ValueError: an unknown id, or a palette of photographs.
    """
    palette = _coloured(palette)
    first = [palette.appearance.index(colour) for colour in palette.appearance]
    return torch.tensor(first)[check_ids(label_maps, palette)]


def _coloured(palette):
    palette = get_palette(palette)
    if palette.appearance is None:
        raise ValueError(
            f"classes of {palette.name} have no colour of their own in pictures; segment these by a network of yours "
            "and compare with `compare`."
        )
    return palette


def compare(predicted, label_maps, num_classes: int) -> SegmentationScores:
    """Predicted ids against label maps, both whole numbers of one shape (..., H, W), as `SegmentationScores`.

        IoU_k = |predicted = k and map = k| / |predicted = k or map = k|

    Raises:
        ValueError: shapes differ, there is no pixel, or an id is outside 0 to num_classes - 1.

    Example:
        >>> compare(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1]]), 3).iou.tolist()
        [0.5, 0.5, nan]
    """
    if predicted.shape != label_maps.shape or not predicted.numel():
        raise ValueError(
            f"predicted ids have shape {tuple(predicted.shape)} and label maps {tuple(label_maps.shape)}; expected one "
            "shape with at least one pixel."
        )
    predicted, label_maps = predicted.flatten().long(), label_maps.flatten().long()
    low, high = (int(f(predicted, label_maps)) for f in (_lowest, _highest))
    if low < 0 or high >= num_classes:
        raise ValueError(f"ids range from {low} to {high}; expected 0 to {num_classes - 1}.")
    pairs = torch.bincount(label_maps * num_classes + predicted, minlength=num_classes**2)
    pairs = pairs.view(num_classes, num_classes).double()
    both = pairs.diagonal()
    either = pairs.sum(0) + pairs.sum(1) - both
    iou = both / either  # 0 / 0 is NaN: a class that is nowhere
    return SegmentationScores(iou, float(iou[either > 0].mean()), float(both.sum() / pairs.sum()))


def _lowest(a, b):
    return min(a.min(), b.min())


def _highest(a, b):
    return max(a.max(), b.max())


def map_agreement(images, label_maps, palette="embedded") -> SegmentationScores:
    """Do the pictures (N, 3, H, W) have the colours that their label maps (N, H, W) ask for, as `SegmentationScores`.

    Each picture is segmented by nearest colour; classes that look the same count as one.

    Raises:
        ValueError: numbers or sizes differ, and what `segment` and `tellable` refuse.
    """
    predicted, expected = segment(images, palette), tellable(label_maps, palette)
    return compare(predicted, expected, len(get_palette(palette)))

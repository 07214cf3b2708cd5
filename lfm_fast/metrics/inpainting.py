"""How near painted holes are to the truth, and whether their edges can be seen."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HoleErrors:
    """Errors of painted holes, each (B,) float64, one for a picture, values being in [0, 1].

    Attributes:
        rmse: root mean square error over the pixels of the hole and their channels.
        psnr: -20 log10 rmse, in dB.
        seam: mean absolute difference between neighbours (above, below, left, right) of which one is in the hole.
        seam_of_truth: the same of the true picture: a seam larger than it is an edge that was not there.
    """

    rmse: torch.Tensor
    psnr: torch.Tensor
    seam: torch.Tensor
    seam_of_truth: torch.Tensor


def hole_errors(images, truths, holes) -> HoleErrors:
    """Compare painted pictures with the true ones in their holes, and along the edges of these.

    Args:
        images, truths: (B, 3, H, W), uint8 or floating in [0, 1]; what is outside a hole is taken from the truth.
        holes: (B, H, W) bool, each with something in it and something outside.

    Raises ValueError for shapes that do not go together and for a mask that is one hole, or none.

    >>> truth, hole = torch.zeros(1, 3, 2, 2), torch.tensor([[[True, False], [False, False]]])
    >>> errors = hole_errors(truth + 0.1, truth, hole)
    >>> errors.psnr.round(decimals=3).tolist(), errors.seam.round(decimals=3).tolist(), errors.seam_of_truth.tolist()
    ([20.0], [0.1], [0.0])
    """
    if images.shape != truths.shape or images.ndim != 4 or holes.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"images {tuple(images.shape)}, truths {tuple(truths.shape)} and holes {tuple(holes.shape)} do not go "
            "together; expected (B, C, H, W) twice, and (B, H, W)"
        )
    shares = holes.flatten(1).double().mean(1)
    if bool(((shares == 0) | (shares == 1)).any()):
        raise ValueError("a mask is one hole or has none, so that there is nothing to compare, or no edge")
    images, truths = (_values(x) for x in (images, truths))
    images = torch.where(holes[:, None], images, truths)
    rmse = _mean((images - truths).square(), holes).sqrt()
    return HoleErrors(rmse, -20 * rmse.log10(), _seam(images, holes), _seam(truths, holes))


def filled_with_mean(images, holes):
    """The simplest painting: holes (B, H, W) of images (B, 3, H, W) in the mean colour of what is known of each."""
    values = _values(images)
    known = ~holes[:, None]
    colour = (values * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    return torch.where(known, values, colour)


def _values(images):
    return images.double() if images.is_floating_point() else images.double() / 255


def _mean(values, where):
    """Of values (B, C, H, W) at the places where (B, H, W), (B,)."""
    return (values.mean(1) * where).flatten(1).sum(1) / where.flatten(1).sum(1)


def _seam(images, holes):
    """Mean absolute difference of neighbours across the edge, (B,); where a mask has an edge it has a pair."""
    total, pairs = 0.0, 0
    for dim in (1, 2):
        one, other = (slice(None),) * dim + (slice(1, None),), (slice(None),) * dim + (slice(None, -1),)
        across = holes[one] != holes[other]
        steps = images.diff(dim=dim + 1).abs().mean(1)
        total, pairs = total + (steps * across).flatten(1).sum(1), pairs + across.flatten(1).sum(1)
    return total / pairs

"""Boxes with classes as tokens of a context, for networks that attend to one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm_fast.models.velocity_network import require_count

NO_BOX = -1  # the class of a row that holds no box


class BoxEncoder(nn.Module):
    """A set of boxes (B, N, 5), rows (class, x0, y0, x1, y1), as tokens (B, max_boxes, D).

    token = MLP([class embedding, sin(2^k pi c), cos(2^k pi c)]) over k < num_frequencies and the four coordinates c in
    [0, 1], x to the right and y down. A row of class -1, and each that is missing to max_boxes, is one learned token:
    how a layout is padded makes no difference. No token knows its row: permuting boxes permutes tokens. Output in the
    weights' dtype.

    Args:
        num_classes: classes of boxes, numbered from 0.
        max_boxes: boxes of one image at most.
        context_dim: D, the width of the network's context.
        hidden_size: of the class embedding and of the MLP's inner layer.
        num_frequencies: of each coordinate; the shortest wave is 2^(2 - num_frequencies) sides of the image long.
        planes, side: more than 0 for a picture of the layout beside the tokens, {"context": tokens, "condition": (B,
            planes, side, side)}: each cell holds the sum of learned vectors of the classes there, by the share of the
            cell that a box covers. Placing things by tokens alone takes a network far longer to learn.

    Raises ValueError for sizes that are no positive integers.

    >>> encoder = BoxEncoder(num_classes=3, max_boxes=4, context_dim=16)
    >>> encoder(torch.tensor([[[2, 0.1, 0.1, 0.5, 0.6], [-1, 0, 0, 0, 0]]])).shape
    torch.Size([1, 4, 16])

    Source: the grounding tokens of Li et al., "GLIGEN: Open-Set Grounded Text-to-Image Generation", arXiv 2301.07093,
    section 4.1, with a table of classes in place of text.
    """

    kind = "boxes"
    argument = "context"

    def __init__(
        self,
        *,
        num_classes: int,
        max_boxes: int,
        context_dim: int,
        hidden_size: int = 128,
        num_frequencies: int = 6,
        planes: int = 0,
        side: int = 0,
    ):
        super().__init__()
        self.config = {"num_classes": num_classes, "max_boxes": max_boxes, "context_dim": context_dim}
        self.config |= {"hidden_size": hidden_size, "num_frequencies": num_frequencies}
        self.config |= {"planes": planes, "side": side} if planes or side else {}
        for name, value in self.config.items():
            require_count(name, value)
        self.num_classes, self.max_boxes, self.num_frequencies = num_classes, max_boxes, num_frequencies
        self.class_table = nn.Embedding(num_classes, hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size + 8 * num_frequencies, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, context_dim),
        )
        self.absent = nn.Parameter(0.5 * torch.randn(context_dim))
        self.side, self.plane_table = side, nn.Embedding(num_classes, planes) if planes else None

    def forward(self, boxes: Tensor) -> Tensor | dict[str, Tensor]:
        boxes = F.pad(boxes, (0, 0, 0, self.max_boxes - boxes.shape[1]), value=NO_BOX)
        classes = boxes[..., 0].long()
        present = classes != NO_BOX
        dtype = self.class_table.weight.dtype
        places = self._features(boxes[..., 1:].to(torch.promote_types(dtype, torch.float32))).to(dtype)
        tokens = self.mlp(torch.cat([self.class_table(classes.clamp(min=0)), places], dim=-1))
        tokens = torch.where(present[..., None], tokens, self.absent.to(tokens.dtype))
        if self.plane_table is None:
            return tokens
        shares = torch.where(present[..., None, None], covered(boxes[..., 1:], self.side), 0)  # (B, N, side, side)
        vectors = self.plane_table(classes.clamp(min=0))
        return {"context": tokens, "condition": torch.einsum("bnhw,bnc->bchw", shares.to(dtype), vectors)}

    def _features(self, coordinates: Tensor) -> Tensor:
        """Coordinates (B, N, 4) -> (B, N, 8 num_frequencies)."""
        powers = torch.arange(self.num_frequencies, device=coordinates.device)
        angles = coordinates[..., None] * (math.pi * 2.0 ** powers.to(coordinates.dtype))
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)

    def check(self, boxes: Tensor, count: int) -> None:
        """Raise ValueError, one sentence, for anything but the boxes of `count` images, (count, N, 5)."""
        check_boxes(boxes, self.num_classes, self.max_boxes)
        if boxes.dim() != 3 or len(boxes) != count:
            raise ValueError(f"boxes are {tuple(boxes.shape)}, expected ({count}, N, 5): a layout for each image.")


def covered(corners: Tensor, side: int) -> Tensor:
    """The share of each of side x side cells that boxes (..., 4) in [0, 1] cover: (..., side, side)."""
    low = torch.arange(side, device=corners.device, dtype=corners.dtype)
    x0, y0, x1, y1 = (side * corners[..., i, None] for i in range(4))
    across = (x1.minimum(low + 1) - x0.maximum(low)).clamp(0, 1)
    down = (y1.minimum(low + 1) - y0.maximum(low)).clamp(0, 1)
    return down[..., :, None] * across[..., None, :]


def check_boxes(boxes: Tensor, num_classes: int, max_boxes: int | None = None) -> None:
    """Refuse what are no boxes (..., N, 5): rows (class, x0, y0, x1, y1), coordinates in [0, 1].

    A row of class -1 holds no box, whatever its coordinates.

    Raises:
        ValueError: one sentence: shape or type, a value that is not finite, a class that is none, coordinates outside
            [0, 1], a box without area, or more rows than max_boxes.
    """
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point() or boxes.dim() < 2 or boxes.shape[-1] != 5:
        what = f"{tuple(boxes.shape)} {boxes.dtype}" if isinstance(boxes, Tensor) else f"a {type(boxes).__name__}"
        raise ValueError(f"boxes are {what}, expected floats (B, N, 5) with rows (class, x0, y0, x1, y1).")
    if max_boxes is not None and boxes.shape[-2] > max_boxes:
        raise ValueError(f"a layout has {boxes.shape[-2]} boxes, but the network was made for {max_boxes} at most.")
    rows = boxes.reshape(-1, 5)
    rows = rows[rows[:, 0] != NO_BOX]  # one that is not a number stays
    if not rows.isfinite().all():
        raise ValueError("boxes hold values that are not finite; coordinates go from 0 to 1.")
    classes = rows[:, 0]
    unknown = classes[(classes != classes.round()) | (classes < 0) | (classes >= num_classes)]
    if len(unknown):
        raise ValueError(
            f"box class {unknown[0].item():g} is not known: classes are 0 to {num_classes - 1}, {NO_BOX} is no box."
        )
    outside = rows[((rows[:, 1:] < 0) | (rows[:, 1:] > 1)).any(dim=1)]
    if len(outside):
        raise ValueError(f"the box {_numbers(outside[0])} leaves the image; coordinates go from 0 to 1.")
    empty = rows[(rows[:, 3] <= rows[:, 1]) | (rows[:, 4] <= rows[:, 2])]
    if len(empty):
        raise ValueError(f"the box {_numbers(empty[0])} has no area; give (x0, y0, x1, y1) with x0 < x1 and y0 < y1.")


def _numbers(row: Tensor) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in row[1:].tolist()) + ")"

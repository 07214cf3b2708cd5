"""Scenes of the embedded data set: several emoji in boxes on a canvas, each scene a function of its number alone."""

import numpy as np
import torch
from PIL import Image

from lfm_fast import ops
from lfm_fast.data.embedded import SPLITS, EmbeddedImages
from lfm_fast.data.source import ImageSource
from lfm_fast.models.box_encoder import NO_BOX
from lfm_fast.ops.streams import STREAM_AUGMENTATION

NUM_SCENES = {"train": 8192, "held_out": 512, "all": 8192}
MAX_BOXES = 4
_SEED = 0x5CE4E5  # of the scenes alone: draws of training with a seed of its own are others
_SMALLEST = 20 / 64  # shortest longer side of a box, in sides of the picture
_LARGEST = (40 / 64, 34 / 64, 30 / 64, 28 / 64)  # longest, by the number of emoji: more of them find less room
_TRIES = 24  # places tried for a box; one that finds none is left out
_OVERLAP = 0.1  # share of the smaller box that another may cover
_DRAWS_OF_BOX = 3 + 2 * _TRIES  # class, picture, size, and two for each place


class EmbeddedLayouts(ImageSource):
    """Scenes of 1 to 4 emoji of a split, with their boxes: `.boxes` (N, 4, 5) float32, `.box_classes`.

    A row of boxes is (class, x0, y0, x1, y1): the number of the emoji's category and the extent of its ink in [0, 1],
    whole pixels of the picture; class -1 is no box. Two boxes cover at most a tenth of the smaller one. Half of the
    canvases are white, half pale. Scene number i is the same for any num_scenes and batch.

    Args:
        image_size: side in pixels, 8 to 512.
        split: whose emoji are used; each split has layouts of its own too.
        num_scenes: how many; None takes 8,192 ("held_out": 512).
        flip: allow mirrored pictures as augmentation; off, because letters and flags must not mirror.

    Raises:
        ValueError: as `EmbeddedImages`, and for a num_scenes that is no positive integer.
    """

    name = "embedded-layouts"

    def __init__(
        self, image_size: int = 64, *, split: str = "train", num_scenes: int | None = None, flip: bool = False
    ):
        self._emoji = EmbeddedImages(image_size, split=split)
        count = NUM_SCENES[split] if num_scenes is None else num_scenes
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"num_scenes={num_scenes!r} must be a positive integer.")
        names = [f"scene {i}" for i in range(count)]
        super().__init__(image_size, torch.zeros(count), ["scenes"], names)
        self.split, self.flip = split, flip
        self.box_classes = list(self._emoji.class_names)
        self._ink = [_extent(self._emoji.mask(i)[0].numpy()) for i in range(len(self._emoji))]
        self._of_class = [(self._emoji.labels == k).nonzero().flatten().tolist() for k in range(len(self.box_classes))]
        self._canvases, self._placed = self._plan(count)
        self.boxes = torch.zeros(count, MAX_BOXES, 5)
        self.boxes[..., 0] = NO_BOX
        for boxes, placed in zip(self.boxes, self._placed):
            for row, (emoji, corners) in zip(boxes, placed):
                row[0] = self._emoji.labels[emoji]
                row[1:] = torch.tensor(corners, dtype=torch.float64) / self.image_size

    def load(self, position: int) -> torch.Tensor:
        """Scene number `position` as (3, H, W) uint8."""
        side = self.image_size
        canvas = Image.new("RGB", (side, side), self._canvases[position])
        for emoji, (left, top, right, bottom) in self._placed[position]:
            picture = Image.fromarray(self._emoji.rgba(emoji).permute(1, 2, 0).numpy(), "RGBA").crop(self._ink[emoji])
            picture = picture.resize((right - left, bottom - top), Image.Resampling.HAMMING)
            canvas.paste(picture, (left, top), picture)
        return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()

    def _plan(self, count):
        """Of each scene the canvas's colour, and [(emoji, its box in pixels)]."""
        draws = 8 + MAX_BOXES * _DRAWS_OF_BOX
        seed = _SEED + SPLITS.index(self.split)
        uniform = ops.philox_uniform(torch.arange(count), draws, seed, STREAM_AUGMENTATION).double().numpy()
        canvases, scenes = [], []
        for scene in uniform:
            pale = tuple(int(c) for c in 225 + 31 * scene[2:5])
            canvases.append(pale if scene[1] < 0.5 else (255, 255, 255))
            scenes.append(self._place(1 + int(scene[0] * MAX_BOXES), scene[8:].reshape(MAX_BOXES, _DRAWS_OF_BOX)))
        return canvases, scenes

    def _place(self, number, draws):
        placed = []
        for which_class, which, size, *places in draws[:number]:
            candidates = self._of_class[int(which_class * len(self._of_class))]
            emoji = candidates[int(which * len(candidates))]
            left, top, right, bottom = self._ink[emoji]
            longer = self.image_size * (_SMALLEST + size * (_LARGEST[number - 1] - _SMALLEST))
            scale = longer / max(right - left, bottom - top)
            width, height = (max(1, round(scale * extent)) for extent in (right - left, bottom - top))
            for x, y in zip(places[::2], places[1::2]):
                left, top = int(x * (self.image_size - width + 1)), int(y * (self.image_size - height + 1))
                box = (left, top, left + width, top + height)
                if all(_overlap(box, other) <= _OVERLAP for _, other in placed):
                    placed.append((emoji, box))
                    break
        return placed


def _extent(alpha: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what a mask (H, W) shows."""
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _overlap(a, b) -> float:
    """The share of the smaller of two boxes that the other covers."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / smaller

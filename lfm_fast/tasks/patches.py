"""Pictures of any size for a network of one: read, fill, cut into squares, and paste what was painted into them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lfm_fast.data.reading import UnusableImage, as_rgb, decode, read_file, to_tensor

FITS = ("resize", "tile", "refuse")


def read_picture(image):
    """A picture as (3, H, W) float32 in [0, 1] on the CPU.

    Args:
        image: a file, a PIL image of any mode, or a NumPy array or tensor (H, W, 3) or (3, H, W), with a leading 1 or
            without, of uint8 or of floats in [0, 1]. Where both ends are 3, an array's channels are last, a tensor's
            first.

    Raises ValueError for a file that is no picture, other channels or types, and values out of range or not finite.

    >>> read_picture(np.full((4, 6, 3), 255, np.uint8)).shape
    torch.Size([3, 4, 6])
    """
    if isinstance(image, (str, Path, Image.Image)):
        try:
            image = np.array(as_rgb(image)[0] if isinstance(image, Image.Image) else decode(read_file(image)))
        except UnusableImage as error:
            name = "image" if isinstance(image, Image.Image) else f"image {image}"
            raise ValueError(f"{name} cannot be used: {error}") from error
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise ValueError(f"image is a {type(image).__name__}; expected a file, a PIL image, an array or a tensor")
    last, shape = isinstance(image, np.ndarray), tuple(image.shape)
    if image.ndim == 4 and shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]) or 0 in shape:
        raise ValueError(f"image has shape {shape}; expected one RGB picture, (H, W, 3) or (3, H, W)")
    pixels = to_tensor(image, "image")
    if image.shape[0] != 3 or (last and image.shape[2] == 3):
        pixels = pixels.permute(2, 0, 1)
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise ValueError(f"image holds {pixels.dtype}; expected uint8, or floats in [0, 1]")
    pixels = pixels.float()
    if not bool(pixels.isfinite().all()):
        raise ValueError("image holds values that are not finite")
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise ValueError(f"image ranges from {low:g} to {high:g}; expected uint8, or floats in [0, 1]")
    return pixels.clone(memory_format=torch.contiguous_format)


def filled(images, holes):
    """The images (B, 3, H, W) with their holes (B, H, W) filled smoothly from around, whatever was in them.

    Each hole takes the mean of what is known in the smallest square of a pyramid of halved images that knows anything,
    interpolated. An autoencoder spoils the latents beside a hole that is filled so half as much as beside a grey one.
    """
    known = (~holes)[:, None].to(images)
    values, weights = [images * known], [known]
    while max(values[-1].shape[-2:]) > 1:
        values.append(F.avg_pool2d(values[-1], 2, ceil_mode=True, count_include_pad=False))
        weights.append(F.avg_pool2d(weights[-1], 2, ceil_mode=True, count_include_pad=False))
    fill = torch.zeros_like(values[-1])
    for value, weight in zip(reversed(values), reversed(weights)):
        fill = F.interpolate(fill, size=value.shape[-2:], mode="bilinear", align_corners=False)
        fill = torch.where(weight > 0, value / weight.clamp_min(1e-12), fill)
    return torch.where(holes[:, None], fill, images)


class Resized:
    """The whole picture squeezed into one square, and what is painted there stretched to its size again."""

    def __init__(self, holes, side):
        self.holes, self.side = holes, side
        # known is what no hole has any part in
        self.small = F.adaptive_max_pool2d(holes[None].float(), side)[0] > 0

    def squares(self):
        """Yields (number, holes (side, side), cut, paste): cut(images (N, 3, H, W)) gives squares, paste(images,
        painted) the images, or the one of them all, with what was painted in them."""
        yield 0, self.small, self._cut, self._paste

    def _cut(self, images):
        return _scaled(images, (self.side, self.side))

    def _paste(self, images, painted):
        return torch.where(self.holes, _scaled(painted, images.shape[-2:]), images)


def _scaled(images, sides):
    if images.shape[-2:] == tuple(sides):
        return images
    return F.interpolate(images, size=tuple(sides), mode="bicubic", antialias=True).clamp(0, 1)


class Tiles:
    """Squares of the picture as it is, half overlapping, each with a part of the hole; painted one after the other.

    The next is always the one of which most is known, so that holes close from their edges inwards; what is painted is
    known to those that follow. A side shorter than the square is continued by its last row or column.
    """

    def __init__(self, holes, side):
        self.holes, self.side = holes, side
        tops, lefts = (_places(extent, side) for extent in holes.shape)
        self.corners = [(top, left) for top in tops for left in lefts]

    def squares(self):
        """As of `Resized`."""
        height, width = self.holes.shape
        padding = (0, max(self.side - width, 0), 0, max(self.side - height, 0))
        left_over = F.pad(self.holes, padding)
        while left_over.any():
            shares = [float(left_over[_window(corner, self.side)].float().mean()) for corner in self.corners]
            number = min((k for k, share in enumerate(shares) if share > 0), key=shares.__getitem__)
            window = _window(self.corners[number], self.side)
            holes = left_over[window].clone()
            left_over[window] = False
            yield number, holes, *self._cut_and_paste(window, holes, padding)

    def _cut_and_paste(self, window, holes, padding):
        def cut(images):
            return F.pad(images, padding, mode="replicate")[(..., *window)] if any(padding) else images[(..., *window)]

        def paste(images, painted):
            images = images.expand(len(painted), -1, -1, -1).clone()
            part = images[(..., *window)]  # at a padded side smaller than the square
            height, width = part.shape[-2:]
            part.copy_(torch.where(holes[:height, :width], painted[..., :height, :width], part))
            return images

        return cut, paste


def _places(extent, side):
    """Where squares begin along a side: every half square, and at the end."""
    last = max(extent - side, 0)
    return sorted({*range(0, last, max(side // 2, 1)), last})


def _window(corner, side):
    return tuple(slice(start, start + side) for start in corner)

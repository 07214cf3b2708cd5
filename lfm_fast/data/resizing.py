"""The centre crop of pixels that somebody has decoded, three times as fast as Pillow cuts it, on any device."""

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from lfm_fast.data.reading import LONGEST_RATIO, plan_crop

_BICUBIC = {"mode": "bicubic", "align_corners": False, "antialias": True}


def square_of(pixels: torch.Tensor, image_size: int) -> torch.Tensor:
    """What `lfm_fast.data.reading.centre_crop` makes of a picture: (H, W, 3) uint8 -> (S, S, 3) uint8.

    Halvings are Pillow's to the bit; enlarged or reduced bicubically, one number in 300 is a level off, and one in 4 of
    tall pictures, whose rows Pillow may scale before their columns.

    Example:
        >>> square_of(torch.full((40, 30, 3), 7, dtype=torch.uint8), 16).unique()
        tensor([7], dtype=torch.uint8)
    """
    pixels = _without_far_ends(pixels)
    plan = plan_crop((pixels.shape[1], pixels.shape[0]), image_size)
    for size in plan.halved:
        pixels = _halved(pixels, size)
    if (pixels.shape[1], pixels.shape[0]) != plan.scaled:
        pixels = _bicubic(pixels, plan.scaled)
    return pixels[plan.top : plan.top + image_size, plan.left : plan.left + image_size]


def _without_far_ends(pixels):
    height, width = (min(side, LONGEST_RATIO * min(pixels.shape[:2])) for side in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width].contiguous()


def _halved(pixels, size):
    """Means of 2 x 2 pixels, rounded as Pillow does it: after the columns, and again after the rows, .5 up."""
    if pixels.shape[0] % 2 or pixels.shape[1] % 2:  # Pillow's boxes are then of 2 or 3 pixels: only it knows which
        picture = Image.fromarray(pixels.cpu().numpy()).resize(size, Image.Resampling.BOX)
        return torch.from_numpy(np.array(picture)).to(pixels.device)
    kernel = _halved_in_8_bits if pixels.device.type == "cpu" else _halved_in_float
    return kernel(pixels.permute(2, 0, 1)[None], size)[0].permute(1, 2, 0)


def _halved_in_8_bits(planes, size):
    """A pixel of the result lies in the middle of two, and linear interpolation is their mean there."""
    return interpolate(planes, size=size[::-1], mode="bilinear", align_corners=False)


def _halved_in_float(planes, size):
    columns = _rounded(avg_pool2d(planes.float(), (1, 2)))
    return _rounded(avg_pool2d(columns, (2, 1))).to(torch.uint8)


def _bicubic(pixels, size):
    kernel = _bicubic_in_8_bits if pixels.device.type == "cpu" else _bicubic_in_float
    return kernel(pixels.permute(2, 0, 1)[None], size)[0].permute(1, 2, 0)


def _bicubic_in_8_bits(planes, size):
    return interpolate(planes, size=size[::-1], **_BICUBIC)


def _bicubic_in_float(planes, size):
    for height, width in ((planes.shape[2], size[0]), size[::-1]):  # to 8 bits in between, as Pillow does
        planes = _rounded(interpolate(planes.float(), size=(height, width), **_BICUBIC)).clamp(0, 255)
    return planes.to(torch.uint8)


def _rounded(values):
    return (values + 0.5).floor()

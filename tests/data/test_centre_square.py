"""The crop of all pictures against the same written out in NumPy: boxes, Keys's cubic, and a cut in the middle."""

import numpy as np
import pytest
from PIL import Image

from lfm_fast.data.reading import centre_crop


def box(x):
    return (x > -0.5) & (x <= 0.5)


def cubic(x):
    """Keys 1981, equation 8: a = -1/2."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0.0))


def resampled(pixels, axis, length, kernel):
    """Along one axis, to so many pixels of 8 bits: the kernel is as wide as a new pixel where there will be fewer."""
    scale = pixels.shape[axis] / length
    old, new = np.arange(pixels.shape[axis]) + 0.5, (np.arange(length) + 0.5) * scale
    weights = kernel((old[None] - new[:, None]) * (1 / max(scale, 1.0))).astype(float)
    weights /= weights.sum(1, keepdims=True)
    return np.floor(np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis) + 0.5)


def by_hand(pixels, side):
    """Dhariwal and Nichol 2021, as their ImageNet figures were computed."""
    while min(pixels.shape[:2]) >= 2 * side:
        height, width = pixels.shape[:2]
        pixels = resampled(resampled(pixels, 1, width // 2, box), 0, height // 2, box)
    height, width = pixels.shape[:2]
    height, width = (round(length * side / min(height, width)) for length in (height, width))
    pixels = resampled(resampled(pixels, 1, width, cubic), 0, height, cubic)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


SIZES = [
    *((64, 64, 64), (97, 64, 64), (64, 98, 64), (101, 69, 64), (69, 101, 64), (147, 69, 64), (69, 147, 64)),  # cut
    *((128, 128, 64), (129, 150, 64), (257, 131, 32), (140, 268, 32), (300, 513, 64)),  # halved
    *((33, 20, 64), (9, 16, 32), (61, 9, 16), (9, 67, 16), (71, 9, 24)),  # enlarged; almost eight times as long
]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{} to {}".format(*size))
def test_it_is_that_of_the_published_figures(size):
    width, height, side = size
    # not so far apart that the cubic leaves 0 to 255, beyond which the steps' order would matter
    pixels = np.random.default_rng(0).integers(70, 186, (height, width, 3)).astype(np.uint8)
    difference = centre_crop(Image.fromarray(pixels), side) - by_hand(pixels.astype(float), side)
    # where a sum lies at the edge of two levels, or Pillow takes the other axis first, as it does of some tall ones
    assert np.abs(difference).max() <= 1
    assert np.abs(difference).mean() < 0.5


@pytest.mark.parametrize(("width", "height"), [(1000, 20), (20, 1001), (1001, 41)])
def test_far_ends_do_not_reach_the_middle(width, height):
    """They are cut before anything is resized, which may move the middle by less than a pixel of the longer side."""
    row = np.linspace(60, 190, width)[None, :, None] if width > height else np.linspace(60, 190, height)[:, None, None]
    pixels = np.broadcast_to(row, (height, width, 3)).round().astype(np.uint8)
    difference = centre_crop(Image.fromarray(pixels), 32) - by_hand(pixels.astype(float), 32)
    assert np.abs(difference).max() <= 1

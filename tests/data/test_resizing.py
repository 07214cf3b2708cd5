"""The centre crop of pixels against Pillow's, and as it is computed where there are no 8-bit kernels."""

import numpy as np
import pytest
import torch
from photographs import photograph
from PIL import Image

from lfm_fast.data import resizing
from lfm_fast.data.reading import centre_crop
from lfm_fast.data.resizing import square_of

SIZES = [
    (64, 64, 64),
    (96, 64, 64),
    (128, 256, 32),
    (512, 256, 32),
    (90, 120, 64),
    (40, 30, 64),
    (129, 131, 32),
    (900, 90, 32),
]


@pytest.fixture(params=["8 bits", "float32"])
def kernels(request, monkeypatch):
    """The CPU's own, and what a GPU takes: the same sums in float32."""
    if request.param == "float32":
        halved, bicubic = resizing._halved_in_float, resizing._bicubic_in_float
        monkeypatch.setattr(resizing, "_halved_in_8_bits", halved)
        monkeypatch.setattr(resizing, "_bicubic_in_8_bits", bicubic)
    return request.param


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{} to {}".format(*size))
@pytest.mark.parametrize("content", ["photograph", "noise"])
def test_pillows_square(kernels, size, content):
    width, height, image_size = size
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)
    picture = photograph(width, height) if content == "photograph" else Image.fromarray(noise)
    expected = centre_crop(picture, image_size)
    found = square_of(torch.from_numpy(np.array(picture)), image_size)
    off = np.abs(found.numpy().astype(int) - expected)
    assert found.shape == (image_size, image_size, 3)
    assert found.dtype == torch.uint8
    assert off.max() <= 1  # each rounds after the columns and after the rows, in fixed point or in float32
    assert off.mean() <= 0.05


@pytest.mark.parametrize("size", [(128, 64, 32), (256, 256, 64), (512, 512, 32)])
def test_halvings_are_pillows_to_the_bit(kernels, size):
    """Noise has every sum of four, so every rounding."""
    width, height, image_size = size
    noise = np.random.default_rng(2).integers(0, 256, (height, width, 3)).astype(np.uint8)
    expected = centre_crop(Image.fromarray(noise), image_size)
    assert (square_of(torch.from_numpy(noise), image_size).numpy() == expected).all()


def test_tall_pictures_whose_rows_pillow_scales_first():
    picture = photograph(50, 110)
    off = np.abs(square_of(torch.from_numpy(np.array(picture)), 32).numpy().astype(int) - centre_crop(picture, 32))
    assert off.max() <= 2
    assert off.mean() <= 0.3


def test_a_part_of_a_larger_picture_is_cut_like_a_picture_of_its_own():
    pixels = torch.from_numpy(np.array(photograph(200, 150)))
    assert torch.equal(square_of(pixels[10:130, 20:160], 64), square_of(pixels[10:130, 20:160].contiguous(), 64))

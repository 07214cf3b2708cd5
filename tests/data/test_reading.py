"""One file at a time to a picture in RGB: turns, depths, transparency, drafts, and what is not even opened."""

import io
import os

import numpy as np
import pytest
import torch
from photographs import encoded, photograph, turned
from PIL import Image, ImageOps

from lfm_fast.data.reading import (
    LONGEST_RATIO,
    MAX_BYTES,
    UnusableImage,
    as_rgb,
    centre_square,
    check_image,
    draft_scale,
    open_file,
    to_tensor,
)


@pytest.mark.parametrize("turn", [None, *range(1, 9)])
def test_a_header_tells_the_upright_size(turn):
    content = encoded(photograph(30, 20), **({} if turn is None else {"exif": turned(turn)}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).size
    for whole in (True, False):
        found = check_image(content, whole=whole)
        assert (found.width, found.height) == upright == ((20, 30) if (turn or 1) >= 5 else (30, 20))


def test_bare_pixels_have_the_width_and_height_of_their_shape():
    found = check_image(bytes(20 * 30 * 3), raw_shape=(20, 30, 3))
    assert (found.width, found.height) == (30, 20)


def test_sixteen_bits_are_rounded_to_eight():
    values = np.arange(65536).astype(np.uint16).reshape(256, 256)
    picture, _ = as_rgb(Image.fromarray(values))
    assert (np.array(picture) == np.rint(values / 257)[..., None]).all()  # 257 = 65535 / 255


def test_levels_below_zero_have_no_agreed_range():
    with pytest.raises(UnusableImage, match="32-bit integer pixels beyond 65535"):
        as_rgb(Image.fromarray(np.array([[-1, 5]], np.int32)))


def test_what_is_half_transparent_is_half_white():
    picture, _ = as_rgb(Image.new("RGBA", (1, 1), (255, 0, 100, 51)))  # a fifth of it
    assert np.abs(np.array(picture)[0, 0] - np.array([255, 204, 224.0])).max() <= 1


@pytest.mark.parametrize(
    ("size", "at_least", "scale"),
    [
        ((512, 512), 256, 2),
        ((511, 512), 256, 1),
        ((512, 514), 256, 2),
        ((512, 513), 256, 1),  # half of it is no whole number
        ((2048, 512), 256, 2),  # the shorter side counts
        ((1024, 1028), 256, 4),
        ((1024, 1026), 256, 2),
        ((2048, 2048), 256, 8),
        ((8192, 8192), 256, 8),  # libjpeg knows no smaller one
    ],
)
def test_how_much_smaller_a_jpeg_may_be_decoded(size, at_least, scale):
    assert draft_scale(size, at_least) == draft_scale(size[::-1], at_least) == scale


@pytest.mark.parametrize("size", [(3000, 40), (41, 2999)])
def test_a_long_picture_is_never_enlarged_whole(size, monkeypatch):
    asked, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *how: asked.append(size) or resize(self, size, *how))
    assert centre_square(photograph(*size), 64).size == (64, 64)
    assert max(map(max, asked)) == LONGEST_RATIO * 64


def test_files_that_are_no_pictures_are_not_opened(tmp_path):
    for name in ("large.png", "empty.png"):
        (tmp_path / name).touch()
    os.truncate(tmp_path / "large.png", MAX_BYTES + 1)  # takes no room on the disk
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for whoever writes into it
    for name, says in (
        ("large.png", f"its {MAX_BYTES + 1} bytes are more than a picture can have"),
        ("empty.png", r"it is empty \(zero bytes\)"),
        ("pipe.png", "it is not a regular file"),
        ("gone.png", "it cannot be opened"),
    ):
        with pytest.raises(UnusableImage, match=says):
            open_file(tmp_path / name)


def test_arrays_of_any_bytes_and_strides_become_tensors():
    given = np.arange(12, dtype=">i2").reshape(3, 4).T[::-1]
    assert torch.equal(to_tensor(given, "x"), torch.tensor([[k + 4 * row for row in range(3)] for k in (3, 2, 1, 0)]))
    with pytest.raises(ValueError, match=r"x holds .*; expected numbers"):
        to_tensor(np.array(["a"]), "x")

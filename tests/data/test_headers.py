"""Headers read from bytes alone: what Pillow says of the same file, or nothing."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from photographs import encoded, turned
from PIL import Image, ImageOps

from lfm_fast.data.headers import plain_header

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)


PLAIN = {
    "jpeg": encoded(PICTURE, "jpeg"),
    "jpeg, progressive": encoded(PICTURE, "jpeg", progressive=True, quality=40),
    "jpeg, 4:4:4": encoded(PICTURE, "jpeg", subsampling=0),
    "jpeg, grey": encoded(PICTURE.convert("L"), "jpeg"),
    "jpeg, comment": encoded(PICTURE, "jpeg", comment=b"hello"),
    "png": encoded(PICTURE, "png"),
    "png, grey": encoded(PICTURE.convert("L"), "png"),
    "webp": encoded(PICTURE, "webp", quality=80),
    "webp, lossless": encoded(PICTURE, "webp", lossless=True),
    **{f"jpeg, turned {k}": encoded(PICTURE, "jpeg", exif=turned(k)) for k in range(1, 9)},
}
OTHERS = {
    "CMYK": encoded(PICTURE.convert("CMYK"), "jpeg"),
    "RGB inside": encoded(PICTURE, "jpeg", keep_rgb=True),
    "alpha": encoded(PICTURE.convert("RGBA"), "png"),
    "palette": encoded(PICTURE.convert("P"), "png"),
    "16 bits": encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "png"),
    "one bit": encoded(PICTURE.convert("1"), "png"),
    "transparent colour": encoded(PICTURE, "png", transparency=(1, 2, 3)),
    "turned png": encoded(PICTURE, "png", exif=turned(6)),
    "webp, alpha": encoded(PICTURE.convert("RGBA").rotate(7), "webp"),
    "webp, lossless, alpha": encoded(PICTURE.convert("RGBA").rotate(7), "webp", lossless=True),
    "webp, turned": encoded(PICTURE, "webp", exif=turned(6)),
    "gif": encoded(PICTURE, "gif"),
    "bmp": encoded(PICTURE, "bmp"),
    "tiff": encoded(PICTURE, "tiff"),
    "empty": b"",
    "text": b"not a picture at all",
    "several pictures": encoded(PICTURE, "mpo", save_all=True, append_images=[PICTURE]),
    "moving": encoded(PICTURE, "png", save_all=True, append_images=[PICTURE.rotate(90)]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_file_has_the_size_that_pillow_gives_it(name):
    header = plain_header(PLAIN[name])
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(PLAIN[name])))
    assert (header.width, header.height) == upright.size
    assert header.kind == name.split(",")[0]


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_is_left_to_pillow(name):
    assert plain_header(OTHERS[name]) is None


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_cut_off_is_left_to_pillow(name):
    content = PLAIN[name]
    for length in {0, 1, 2, 3, 5, 11, 20, 25, 30, len(content) // 2, len(content) - 2, len(content) - 1}:
        assert plain_header(content[:length]) is None


def test_segments_that_do_not_follow_each_other_are_left_to_pillow():
    content = PLAIN["jpeg"]
    assert plain_header(content[:2] + b"\xff" + content[2:]) is None  # a fill byte, which the standard allows
    assert plain_header(content[:2] + b"\xff\xe0\0\1" + content[2:]) is None  # shorter than its own length
    first = struct.unpack_from(">H", content, 4)[0] + 4
    assert plain_header(content[:first] + b"\0" + content[first:]) is None


@given(st.sampled_from(sorted(PLAIN)), st.integers(0, 2**32 - 1))
def test_no_bytes_make_it_fail(name, seed):
    generator = np.random.default_rng(seed)
    content = bytearray(PLAIN[name])
    for place in generator.integers(0, min(len(content), 400), 4):
        content[place] = generator.integers(256)
    header = plain_header(bytes(content))
    assert header is None or min(header[:2]) > 0

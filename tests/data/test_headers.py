"""Headers read from bytes alone: what Pillow says of the same file, or nothing."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lfm_fast.data.headers import plain_header

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(kind, picture=PICTURE, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


PLAIN = {
    "jpeg": encoded("jpeg"),
    "jpeg, progressive": encoded("jpeg", progressive=True, quality=40),
    "jpeg, 4:4:4": encoded("jpeg", subsampling=0),
    "jpeg, grey": encoded("jpeg", PICTURE.convert("L")),
    "jpeg, comment": encoded("jpeg", comment=b"hello"),
    "png": encoded("png"),
    "png, grey": encoded("png", PICTURE.convert("L")),
    "webp": encoded("webp", quality=80),
    "webp, lossless": encoded("webp", lossless=True),
    **{f"jpeg, turned {k}": encoded("jpeg", exif=exif(k)) for k in range(1, 9)},
}
OTHERS = {
    "CMYK": encoded("jpeg", PICTURE.convert("CMYK")),
    "RGB inside": encoded("jpeg", keep_rgb=True),
    "alpha": encoded("png", PICTURE.convert("RGBA")),
    "palette": encoded("png", PICTURE.convert("P")),
    "16 bits": encoded("png", Image.fromarray(np.zeros((4, 4), np.uint16))),
    "one bit": encoded("png", PICTURE.convert("1")),
    "transparent colour": encoded("png", transparency=(1, 2, 3)),
    "turned png": encoded("png", exif=exif(6)),
    "webp, alpha": encoded("webp", PICTURE.convert("RGBA").rotate(7)),
    "webp, lossless, alpha": encoded("webp", PICTURE.convert("RGBA").rotate(7), lossless=True),
    "webp, turned": encoded("webp", exif=exif(6)),
    "gif": encoded("gif"),
    "bmp": encoded("bmp"),
    "tiff": encoded("tiff"),
    "empty": b"",
    "text": b"not a picture at all",
    "several pictures": encoded("mpo", save_all=True, append_images=[PICTURE]),
    "moving": encoded("png", save_all=True, append_images=[PICTURE.rotate(90)]),
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

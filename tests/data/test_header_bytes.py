"""Files of the plain kind changed by a few bytes of their headers: which are plain still, and which are Pillow's."""

import struct

import numpy as np
import pytest
from photographs import encoded
from PIL import Image

from lfm_fast.data.headers import plain_header
from lfm_fast.data.reading import check_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8))
JPEG = encoded(PICTURE, quality=60)
FRAME, SCAN = JPEG.index(b"\xff\xc0"), JPEG.index(b"\xff\xda")
SOME = SCAN + 40  # within the scan


def segment(marker, content, length=None):
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2 if length is None else length) + content


def with_segment(marker, content=b"ab", length=None):
    return JPEG[:2] + segment(marker, content, length) + JPEG[2:]


def changed(content, place, new):
    return content[:place] + new + content[place + len(new) :]


def exif(*entries, order="<"):
    """A segment with (tag, kind, count, value) entries."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    values = [struct.pack(order + "HHI", *e[:3]) + struct.pack(order + "HH", e[3], 0) for e in entries]
    return segment(0xE1, b"Exif\0\0" + head + b"".join(values) + bytes(4))


def with_exif(*entries, **how):
    return JPEG[:2] + exif(*entries, **how) + JPEG[2:]


ORIENTATION = 0x0112
WHOLE_FRAME = JPEG[FRAME : FRAME + 19]
PLAIN = {
    "as it is": JPEG,
    "a sequential frame of the extended process": changed(JPEG, FRAME + 1, b"\xc1"),
    "an application's segment": with_segment(0xE9),
    "all eight restarts": encoded(PICTURE, restart_marker_blocks=1),
    "grey by any name": changed(grey := encoded(PICTURE.convert("L")), grey.index(b"\xff\xc0") + 10, b"\7"),
    "Adobe's segment that says YCbCr": with_segment(0xEE, b"Adobe\0d\0\0\0\0\1"),
    "another's segment": with_segment(0xE2, b"FPXR\0"),
    "turned among other things": with_exif((0x0100, 4, 1, 9), (ORIENTATION, 3, 1, 8), (0x0128, 3, 1, 2)),
    "the other order of bytes": with_exif((ORIENTATION, 3, 1, 5), order=">"),
}
OTHERS = {
    **{f"a marker {m:x} with a length": with_segment(m) for m in (0x01, 0xC3, 0xC5, 0xCC, 0xD0, 0xD8, 0xDC, 0xFF)},
    "a second frame": JPEG[:FRAME] + WHOLE_FRAME + JPEG[FRAME:],
    "a scan before its frame": JPEG[:FRAME] + JPEG[FRAME + 19 : -2] + WHOLE_FRAME + JPEG[-2:],
    "a start within the scan": JPEG[:SOME] + b"\xff\xd8" + JPEG[SOME:],
    "a scan's header of no length": changed(JPEG, SCAN + 2, b"\0\1"),
    "more behind its end": JPEG + b"\0",
    "12 bits": changed(JPEG, FRAME + 4, b"\x0c"),
    "a frame longer than its components": JPEG[:FRAME] + segment(0xC0, WHOLE_FRAME[4:] + b"ab") + JPEG[FRAME + 19 :],
    "components of other names": changed(JPEG, FRAME + 10, b"R"),
    "no height": changed(JPEG, FRAME + 5, b"\0\0"),
    "Adobe's segment that says RGB": with_segment(0xEE, b"Adobe\0d\0\0\0\0\0"),
    "Adobe's segment that says YCCK": with_segment(0xEE, b"Adobe\0d\0\0\0\0\2"),
    "an index of several pictures": with_segment(0xE2, b"MPF\0II*\0"),
    "two blocks of EXIF": JPEG[:2] + 2 * exif((ORIENTATION, 3, 1, 1)) + JPEG[2:],
    "a turn that there is not": with_exif((ORIENTATION, 3, 1, 9)),
    "a turn of no number": with_exif((ORIENTATION, 3, 1, 0)),
    "a turn of another type": with_exif((ORIENTATION, 4, 1, 6)),
    "several turns in one": with_exif((ORIENTATION, 3, 2, 6)),
    "two turns": with_exif((ORIENTATION, 3, 1, 6), (ORIENTATION, 3, 1, 8)),  # Pillow takes the first
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_still(name):
    """And of the size that Pillow gives it."""
    found, by_pillow = plain_header(PLAIN[name]), check_image(PLAIN[name], whole=False)
    assert (found.width, found.height) == (by_pillow.width, by_pillow.height)


@pytest.mark.parametrize("name", OTHERS)
def test_pillows(name):
    assert plain_header(OTHERS[name]) is None


PNG = encoded(PICTURE, "png")


def test_png():
    end, data = PNG.index(b"IEND") - 4, PNG.index(b"IDAT") - 4
    assert plain_header(PNG)[:2] == (53, 37)
    assert plain_header(PNG[:end] + b"\0\0\0\1tEXta1234" + PNG[end:])[:2] == (53, 37)
    for place in (26, 27, 28):  # another compression, another filter, interlaced
        assert plain_header(changed(PNG, place, b"\1")) is None
    assert plain_header(PNG[:data] + PNG[end:]) is None
    for more in (PNG + b"\0", PNG[:end] + b"\0\0\0\0acTL1234" + PNG[end:], PNG[:end] + b"\0\0\0\0tRNS1234" + PNG[end:]):
        assert plain_header(more) is None


def test_webp():
    webp = encoded(PICTURE, "webp", quality=60)
    (length,) = struct.unpack_from("<I", webp, 16)
    assert plain_header(webp)[:2] == (53, 37)
    scaled = changed(webp, 26, struct.pack("<HH", 53 | 1 << 14, 37 | 3 << 14))  # how large it is meant to be shown
    assert plain_header(scaled)[:2] == (53, 37)
    # a length that is odd is followed by a byte that is none of it
    assert plain_header(changed(webp, 16, struct.pack("<I", length - 1)))[:2] == (53, 37)
    assert plain_header(changed(webp, 16, struct.pack("<I", length - 2))) is None
    assert plain_header(changed(webp, 20, bytes([webp[20] | 1]))) is None  # a frame that needs the one before it
    assert plain_header(changed(webp, 26, b"\0\0")) is None
    more = webp + b"XMP \2\0\0\0ab"
    assert plain_header(changed(more, 4, struct.pack("<I", len(more) - 8))) is None
    assert plain_header(more) is None

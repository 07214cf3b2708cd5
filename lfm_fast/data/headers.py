"""Size and turn of a JPEG, PNG or WebP of the plain kind, told from its bytes before anything is decoded.

"Plain" are files that every decoder reads alike: 8 bits, grey or RGB, no transparency, one picture, whole at its end.
Everything else is Pillow's. Reading a header here takes microseconds; `PIL.Image.open` takes a hundred of them.
"""

import re
import struct
from typing import NamedTuple

EXIF_ORIENTATION = 0x0112  # the tag; 1 is upright
FIRST_TURNED = 5  # of its values, up to 8: width and height change places
_PNG = b"\x89PNG\r\n\x1a\n"
_FRAMES, _END, _SCAN = (0xC0, 0xC1, 0xC2), 0xD9, 0xDA
# lossless, differential and arithmetic frames; restarts and a start where none belongs; a height that comes later
_NOT_PLAIN = frozenset((0xC3, *range(0xC5, 0xD9), 0xDC, 0xFF))
# in a scan, 0xFF is followed by 0 or a restart. libjpeg gives up at anything else; DALI then calls half a picture whole
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")


class Header(NamedTuple):
    """Size of the upright picture in pixels, and the format's name."""

    width: int
    height: int
    kind: str


def plain_header(encoded: bytes) -> Header | None:
    """The header of a plain JPEG, PNG or WebP; None where Pillow is to look at it (and may refuse it).

    Example:
        >>> plain_header(b"not a picture") is None
        True
    """
    try:
        if encoded[:3] == b"\xff\xd8\xff":
            return _jpeg(encoded)
        if encoded[:8] == _PNG:
            return _png(encoded)
        if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
            return _webp(encoded)
    except (struct.error, IndexError):  # a field lies beyond the end
        return None
    return None


def _jpeg(encoded) -> Header | None:
    """Every segment where the one before it ends, every scan up to a marker that may follow (ISO/IEC 10918-1, B.1)."""
    place, size, turned, exifs = 2, None, False, 0
    while True:
        marker = encoded[place + 1]
        if encoded[place] != 0xFF or marker in _NOT_PLAIN or marker < 0xC0:
            return None
        if marker == _END:
            break
        (length,) = struct.unpack_from(">H", encoded, place + 2)
        body, place = place + 4, place + 2 + length
        if marker in _FRAMES:
            if size is not None:
                return None
            size = _frame(encoded, body, length)
        elif marker == 0xE1 and encoded[body : body + 6] == b"Exif\0\0":
            orientation = _exif_orientation(encoded[body + 6 : place])
            exifs += 1
            if orientation is None or exifs > 1:
                return None
            turned = orientation >= FIRST_TURNED
        elif marker == 0xE2 and encoded[body : body + 4] == b"MPF\0":
            return None  # several pictures
        elif marker == 0xEE and encoded[body : body + 5] == b"Adobe" and encoded[body + 11] != 1:
            return None  # RGB or CMYK instead of YCbCr
        if marker == _SCAN:
            following = _MARKER.search(encoded, place)
            if following is None or size is None:
                return None
            place = following.start()
        if length < 2:
            return None
    if size is None or place != len(encoded) - 2:
        return None
    return Header(*(size[::-1] if turned else size), "jpeg")


def _frame(encoded, body, length) -> tuple[int, int] | None:
    """(width, height) of 8-bit grey or YCbCr."""
    bits, height, width, components = struct.unpack_from(">BHHB", encoded, body)
    if bits != 8 or not width or not height or length != 8 + 3 * components:
        return None
    ids = encoded[body + 6 : body + 6 + 3 * components : 3]
    return (width, height) if components == 1 or ids == b"\1\2\3" else None


def _exif_orientation(tiff) -> int | None:
    """1 to 8, 1 where the block does not say; None for a block that is not well formed or says it twice."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, first)
    found = 0
    for place in range(first + 2, first + 2 + 12 * count, 12):
        tag, kind, values, value = struct.unpack_from(order + "HHIH", tiff, place)
        if tag == EXIF_ORIENTATION:
            if found or kind != 3 or values != 1 or not 1 <= value <= 8:
                return None
            found = value
    return found or 1


def _png(encoded) -> Header | None:
    """8 bits of grey or RGB, not interlaced; every chunk where the one before it ends (ISO/IEC 15948, 5.3)."""
    length, kind, width, height, bits, colour, *rest = struct.unpack_from(">I4sIIBBBBB", encoded, 8)
    if (length, kind, bits) != (13, b"IHDR", 8) or colour not in (0, 2) or any(rest):
        return None
    if not width or not height:
        return None
    place, data = 8, False
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", encoded, place)
        if kind in (b"tRNS", b"eXIf", b"acTL"):
            return None  # transparent, turned or animated
        data |= kind == b"IDAT"
        place += 12 + length
    return Header(width, height, "png") if data and place == len(encoded) else None


def _webp(encoded) -> Header | None:
    """The simple file format, lossy or lossless without alpha (Google's RIFF container, RFC 9649)."""
    size, _, kind, length = struct.unpack_from("<I4s4sI", encoded, 4)
    if size + 8 != len(encoded) or length + (length & 1) + 20 != len(encoded):
        return None
    if kind == b"VP8 " and encoded[23:26] == b"\x9d\x01\x2a" and not encoded[20] & 1:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", encoded, 26))
    elif kind == b"VP8L" and encoded[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", encoded, 21)
        if bits >> 28:  # alpha, or a version there is not
            return None
        width, height = (bits & 0x3FFF) + 1, (bits >> 14) + 1
    else:
        return None
    return Header(width, height, "webp") if width and height else None

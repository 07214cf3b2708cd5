"""One image of any kind, as bytes, to a square RGB picture, or a few words on why it cannot be used."""

import contextlib
import io
import os
import stat
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from lfm_fast.data.headers import EXIF_ORIENTATION, FIRST_TURNED

SUFFIXES = frozenset(
    "." + name
    for name in (
        *("png", "jpg", "jpeg", "jpe", "jfif", "webp", "avif", "bmp", "dib", "gif"),
        *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "tga", "ico"),
    )
)
MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: half a gigabyte of RGB
MAX_BYTES = 1 << 30  # above MAX_PIXELS of uncompressed RGBA
LONGEST_RATIO = 8  # of a picture's sides: what is longer loses its ends before it is resized


class UnusableImage(ValueError):
    """The file cannot become a picture; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Checked:
    """What decoding a file once told: its size, how it was converted (or None), why it is unusable (or None)."""

    width: int = 0
    height: int = 0
    conversion: str | None = None
    reason: str | None = None


def check_image(encoded, *, raw_shape=None, whole: bool = True) -> Checked:
    """Decode a picture's bytes once and describe them; never raises for damaged ones.

    `encoded` is bytes or an open file. With whole=False only the header is read: sizes, and no more.
    """
    try:
        if raw_shape is not None:
            return Checked(*decode(encoded, raw_shape=raw_shape).size)
        if not whole:
            return Checked(*_size_in_header(encoded))
        picture, conversion = _decoded(encoded, as_rgb)
    except UnusableImage as error:
        return Checked(reason=str(error))
    return Checked(picture.width, picture.height, conversion)


def decode(encoded, *, raw_shape=None, at_least: int | None = None) -> Image.Image:
    """Bytes (or an open file) of a picture, upright and in RGB; with raw_shape (H, W, 3) they are its pixels.

    With at_least, a JPEG may come `draft_scale` times smaller, its shorter side at_least as long: its blocks of 8 x 8
    pixels are then decoded to fewer, in a fraction of the time.

    Raises:
        UnusableImage: they are damaged, no picture, or too large to decode safely.
    """
    if raw_shape is None:
        return _decoded(encoded, as_rgb, at_least)[0]
    height, width, channels = raw_shape
    if len(encoded) != height * width * channels:
        raise UnusableImage(f"it has {len(encoded)} bytes, not {height}x{width}x{channels}")
    return Image.frombuffer("RGB", (width, height), encoded, "raw", "RGB", 0, 1)


def read_file(path) -> bytes:
    """A regular file's bytes. Raises UnusableImage where there is none, or nothing in it."""
    with open_file(path) as file:
        return file.read()


def open_file(path):
    """A regular file, open for reading. Raises as `read_file`."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a named pipe called x.png would block for ever
            raise UnusableImage("it is not a regular file")
        if status.st_size == 0:
            raise UnusableImage("it is empty (zero bytes)")
        if status.st_size > MAX_BYTES:
            raise UnusableImage(f"its {status.st_size} bytes are more than a picture can have")
        return open(path, "rb")
    except OSError as error:
        raise UnusableImage(f"it cannot be opened ({error.strerror})") from error


class CropPlan(NamedTuple):
    """Of a (width, height): its sizes by halving, the size resized to, and where the square begins in that."""

    halved: list[tuple[int, int]]
    scaled: tuple[int, int]
    left: int
    top: int


def plan_crop(size: tuple[int, int], image_size: int) -> CropPlan:
    """What `centre_square` does to a picture of this size.

    Sides are halved by box averaging while the shorter one is at least twice too long, then resized bicubically: the
    preprocessing under which the published ImageNet and CelebA-HQ numbers were computed (Dhariwal & Nichol 2021).
    """
    halved = []
    while min(size) >= 2 * image_size:
        size = (size[0] // 2, size[1] // 2)
        halved.append(size)
    scale = image_size / min(size)
    scaled = tuple(round(side * scale) for side in size)
    return CropPlan(halved, scaled, (scaled[0] - image_size) // 2, (scaled[1] - image_size) // 2)


def centre_square(picture: Image.Image, image_size: int) -> Image.Image:
    """The picture with its shorter side scaled to image_size and its middle cut out, as `plan_crop` says."""
    picture = _without_far_ends(picture)
    plan = plan_crop(picture.size, image_size)
    for size in plan.halved:
        picture = picture.resize(size, Image.Resampling.BOX)
    if picture.size != plan.scaled:
        picture = picture.resize(plan.scaled, Image.Resampling.BICUBIC)
    if plan.scaled != (image_size, image_size):
        return picture.crop((plan.left, plan.top, plan.left + image_size, plan.top + image_size))
    return picture


def centre_crop(picture: Image.Image, image_size: int) -> np.ndarray:
    """The pixels of `centre_square`, (image_size, image_size, 3) uint8 of an RGB picture."""
    return np.array(centre_square(picture, image_size))


def _without_far_ends(picture):
    """Cut what lies far outside the middle square: enlarging 100,000 x 2 pixels whole would fill the memory."""
    width, height = (min(side, LONGEST_RATIO * min(picture.size)) for side in picture.size)
    if (width, height) == picture.size:
        return picture
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def draft_scale(size: tuple[int, int], at_least: int) -> int:
    """How many times smaller a JPEG of this size may be decoded: 1, 2, 4 or 8.

    Only by what divides both sides: otherwise the smaller picture covers a little more than the whole one, and all that
    is cut from it would lie a fraction of a pixel aside.
    """
    scale = 1
    while scale < 8 and not any(side % (2 * scale) for side in size) and min(size) >= 2 * scale * at_least:
        scale *= 2
    return scale


def open_unconverted(path) -> Image.Image:
    """The whole file upright, in whatever mode it has. Raises UnusableImage as `read_file` and `decode`."""
    return _decoded(read_file(path), lambda picture: picture)


def _decoded(encoded, convert, at_least=None):
    """convert(upright picture)."""
    with _opened(encoded) as picture:
        if at_least is not None and picture.format == "JPEG":
            scale = draft_scale(picture.size, at_least)
            picture.draft(None, (picture.width // scale, picture.height // scale))
        picture.load()
        return convert(_upright(picture))


def _size_in_header(encoded) -> tuple[int, int]:
    with _opened(encoded) as picture:
        turned = _orientation(picture) >= FIRST_TURNED
        return picture.size[::-1] if turned else picture.size


@contextlib.contextmanager
def _opened(encoded):
    """A picture whose header has been read and found decodable; what goes wrong inside is an UnusableImage too."""
    try:
        if isinstance(encoded, bytes | memoryview) and not len(encoded):
            raise UnusableImage("it is empty (zero bytes)")
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes | memoryview) else encoded) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UnusableImage(f"{picture.width}x{picture.height} pixels are more than can be decoded safely")
            yield picture
    except UnusableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableImage("it has more pixels than can be decoded safely") from error
    except Image.UnidentifiedImageError as error:
        raise UnusableImage("it is not an image that Pillow knows") from error
    # on damaged files Pillow's plugins raise a dozen kinds, from SyntaxError to struct.error
    except Exception as error:
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise UnusableImage(f"it is damaged or truncated ({detail})") from error


def _orientation(picture) -> int:
    try:
        return int(picture.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # as in _upright
        return 1


def _upright(picture):
    """Turn the picture as its EXIF orientation says; a damaged EXIF block costs the turn, not the picture."""
    try:
        ImageOps.exif_transpose(picture, in_place=True)  # a copy of what needs no turn would take a tenth of the time
        return picture
    except Exception:  # the EXIF parser raises whatever the damaged bytes lead it to
        return picture


def as_rgb(picture) -> tuple[Image.Image, str | None]:
    """(the picture in RGB, how it was converted or None). Raises UnusableImage for pixels without an agreed range."""
    mode = picture.mode
    if mode == "F":
        raise UnusableImage("32-bit floating-point pixels have no agreed range")
    if mode.startswith("I"):
        return _from_sixteen_bits(picture), "16-bit grey to 8-bit RGB"
    if picture.has_transparency_data:
        return _on_white(picture), "transparency laid on white"
    if mode == "RGB":
        return picture, None
    name = {"P": "palette", "L": "grey", "1": "black and white"}.get(mode, mode)
    return picture.convert("RGB"), f"{name} to RGB"


def _on_white(picture):
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def _from_sixteen_bits(picture):
    """0..65535 to 0..255, rounded: Pillow's own conversion cuts everything above 255 off."""
    values = np.array(picture).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise UnusableImage("32-bit integer pixels beyond 65535 have no agreed range")
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2))


def to_tensor(given, name: str) -> torch.Tensor:
    """A NumPy array of any strides and byte order, or a tensor, as a tensor on the CPU; arrays are copied.

    Raises:
        ValueError: the array, which is called `name` then, holds what no tensor can.
    """
    if isinstance(given, torch.Tensor):
        return given.detach().cpu()
    try:
        return torch.from_numpy(np.array(given, dtype=given.dtype.newbyteorder("=")))
    except TypeError:
        raise ValueError(f"{name} holds {given.dtype.str}; expected numbers") from None

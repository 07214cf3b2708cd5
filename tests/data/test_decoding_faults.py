"""Damaged pictures, vanishing files, failing decoders, other processes: never a wrong picture, never a hang."""

import gc
import multiprocessing
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from photographs import by_pillow, encoded, photograph

from lfm_fast.data import decoders, open_images
from lfm_fast.data.decoders import UndecodableImage, decoder_named
from lfm_fast.data.reading import UnusableImage

if decoders.dali_is_there():
    from lfm_fast.data import dali as module
    from lfm_fast.data.dali import PATIENCE, DaliDecoder
needs_dali = pytest.mark.skipif(not decoders.dali_is_there(), reason="DALI is not installed")
BOTH = ["pil", pytest.param("dali", marks=needs_dali)]


# -- damage: named, never a wrong picture


def huge_png():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"0" * 10)), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def huge_jpeg():
    content = bytearray(encoded(photograph(40, 40)))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 60000, 60000)
    return bytes(content)


PNG, JPEG, WEBP = (encoded(photograph(48, 40), kind) for kind in ("png", "jpeg", "webp"))
DAMAGED = {
    "zero bytes": (b"", "zero bytes"),
    "text": (b"hello, this is not a picture", "not an image"),
    "png cut": (PNG[: len(PNG) // 2], "damaged or truncated"),
    "png flipped": (PNG[:200] + bytes([PNG[200] ^ 255]) + PNG[201:], "damaged or truncated"),
    "jpeg cut": (JPEG[: len(JPEG) // 2], "damaged or truncated"),
    "jpeg without tables": (JPEG.replace(b"\xff\xdb", b"\xff\xfe"), "damaged or truncated"),
    "webp cut": (WEBP[: len(WEBP) // 2], "damaged or truncated|not an image"),
    "bomb, png": (huge_png(), "more pixels than can be decoded"),
    "bomb, jpeg": (huge_jpeg(), "more pixels than can be decoded"),
}


@pytest.mark.parametrize("decoder", BOTH)
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_picture_is_named_and_the_next_batch_is_right(decoder, name):
    content, reason = DAMAGED[name]
    healthy = encoded(photograph(50, 40), "png")
    decoder = decoder_named(decoder)
    for place, contents in ((1, [healthy, content, healthy]), (0, [content])):
        with pytest.raises(UndecodableImage, match=reason) as raised:
            decoder.decode(contents, 32)
        assert raised.value.place == place
    assert torch.equal(decoder.decode([healthy], 40)[0], by_pillow(healthy, 40))


@pytest.mark.parametrize("decoder", BOTH)
def test_a_file_that_vanishes_or_changes_during_a_run_is_named(tmp_path, decoder):
    for k in range(6):
        photograph(40, 40, k).save(tmp_path / f"{k}.jpg")
    images = open_images(tmp_path, 32, decoder=decoder)
    first = images.batch(range(6))
    (tmp_path / "3.jpg").unlink()
    with pytest.raises(ValueError, match=r"3\.jpg in .* now it cannot be opened"):
        images.batch([0, 3])
    (tmp_path / "3.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"3\.jpg in .* now it is damaged or truncated"):
        images.batch([5, 0, 3])
    assert torch.equal(images.batch([2, 5]), first[[2, 5]])
    assert torch.equal(images.load(4), first[4])


@needs_dali
def test_a_picture_of_another_size_than_its_header_is_not_believed(monkeypatch):
    """Should the two ever disagree on a file, nothing stretched comes out: Pillow decodes it."""
    real = module.plain_header
    monkeypatch.setattr(module, "plain_header", lambda content: real(content)._replace(width=50))
    content = encoded(photograph(60, 40))
    assert torch.equal(DaliDecoder().decode([content, content], 32)[1], by_pillow(content, 32))


@needs_dali
def test_where_dali_keeps_failing_pillow_takes_over_and_says_so(monkeypatch):
    asked = []

    def broken(*arguments):
        asked.append(arguments)
        raise RuntimeError("no memory on the device")

    monkeypatch.setattr(module, "_pipeline", broken)
    decoder, contents = DaliDecoder(), [encoded(photograph(60, 40))]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(PATIENCE + 3):
            assert torch.equal(decoder.decode(contents, 32)[0], by_pillow(contents[0], 32))
    assert len(asked) == PATIENCE
    assert [str(w.message) for w in warned] == [
        f"DALI failed {PATIENCE} times in a row, Pillow decodes from here on: no memory on the device"
    ]


@needs_dali
def test_a_failure_now_and_then_costs_a_run_and_not_dali(monkeypatch):
    real, decoder, contents = module._pipeline, DaliDecoder(), [encoded(photograph(60, 40))]
    for _ in range(3):
        decoder._pipeline = None
        monkeypatch.setattr(module, "_pipeline", lambda *arguments: 1 / 0)
        for _ in range(PATIENCE - 1):
            decoder.decode(contents, 32)
        monkeypatch.setattr(module, "_pipeline", real)
        decoder.decode(contents, 32)
        assert decoder._pipeline is not None


def test_a_reader_that_cannot_read_is_named_by_either(tmp_path):
    class Contents(list):
        def __getitem__(self, place):
            if place == 1:
                raise UnusableImage("page 7 is damaged")
            return super().__getitem__(place)

    for decoder in ("pil", "dali") if decoders.dali_is_there() else ("pil",):
        with pytest.raises(UndecodableImage, match="page 7 is damaged") as raised:
            decoder_named(decoder).decode(Contents([PNG, PNG, PNG]), 32)
        assert raised.value.place == 1


# -- processes


def _decode_in_child(decoder, queue):
    queue.put(decoder.decode([PNG, JPEG], 32).numpy())


@pytest.mark.parametrize("name", BOTH)
def test_another_process_gets_the_decoder_by_pickle(name):
    decoder = decoder_named(name)
    expected = decoder.decode([PNG, JPEG], 32)
    assert torch.equal(pickle.loads(pickle.dumps(decoder)).decode([PNG, JPEG], 32), expected)


@pytest.mark.parametrize("name", BOTH)
def test_a_forked_process_decodes_the_same(name):
    """It inherits threads that do not run, and must not wait for them."""
    decoder = decoder_named(name)
    expected = decoder.decode([PNG, JPEG], 32).numpy()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_decode_in_child, args=(decoder, queue), daemon=True)
    child.start()
    found = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert np.abs(found.astype(int) - expected).max() <= 1


@needs_dali
def test_a_forked_process_keeps_what_it_would_wait_for():
    """Letting go of a pipeline waits for its threads, and a fork has none of them."""
    decoder = DaliDecoder()
    decoder.decode([PNG, JPEG], 32)
    circle = [decoder]
    circle.append(circle)  # until memory is next looked through, in whichever process that is
    del decoder, circle
    child = multiprocessing.get_context("fork").Process(target=gc.collect, daemon=True)
    child.start()
    child.join(60)
    ended = child.exitcode
    child.kill()
    assert ended == 0

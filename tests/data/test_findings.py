"""What was found of pictures, kept for later runs: the same again, or nothing at all."""

import os
import time

import numpy as np
import pytest
from photographs import encoded
from PIL import Image

from lfm_fast.data import findings, stored
from lfm_fast.data.findings import Findings, found_before, marks_of
from lfm_fast.data.reading import Checked
from lfm_fast.data.store import Store
from lfm_fast.data.stored import StoredImages

NAMES = ["a.png", "b/ü.jpg", os.fsdecode(b"c\xff.png"), "d.png", "e.png"]
KEYS = [[7, 1], [8, 2], [9, 3], None, [7, 1]]
FOUND = [
    Checked(3, 70_000),
    Checked(5, 6, "grey to RGB"),
    Checked(reason="it is damaged or truncated (ünexpected)"),
    Checked(1, 2),
    Checked(2**32 - 1, 1, "grey to RGB"),
]


def made(names=NAMES, keys=KEYS, found=FOUND):
    pictures = Findings(marks_of(names, keys))
    for position, one in enumerate(found):
        pictures[position] = one
    return pictures


def taken(names, keys, path):
    pictures = found_before(path, "1", marks_of(names, keys))
    return [pictures[k] if pictures.known[k] else None for k in range(len(names))]


def test_what_was_found_is_found_again_by_name_and_key(tmp_path):
    path = tmp_path / "folder" / "note"
    assert taken(NAMES, KEYS, path) == [None] * 5
    made().save(path, "1")
    assert taken(NAMES, KEYS, path) == FOUND
    assert taken(NAMES[::-1], KEYS[::-1], path) == FOUND[::-1]
    assert taken(["e.png", "new", "a.png"], [[7, 1], [7, 1], [7, 2]], path) == [FOUND[4], None, None]
    assert taken([], [], path) == []
    assert not found_before(path, "2", marks_of(NAMES, KEYS)).known.any()  # of another form


def test_what_is_found_since_stands_beside_what_was_found_before(tmp_path):
    made().save(tmp_path / "note", "1")
    pictures = found_before(tmp_path / "note", "1", marks_of(["new", *NAMES], [[1, 1], *KEYS]))
    pictures[0] = Checked(4, 4, "palette to RGB")
    pictures[1] = Checked(reason="it is empty")
    pictures.save(tmp_path / "note", "1")
    expected = [Checked(4, 4, "palette to RGB"), Checked(reason="it is empty"), *FOUND[1:]]
    assert taken(["new", *NAMES], [[1, 1], *KEYS], tmp_path / "note") == expected


def test_only_what_is_known_is_kept(tmp_path):
    made(found=FOUND[:2]).save(tmp_path / "note", "1")
    assert taken(NAMES, KEYS, tmp_path / "note") == [*FOUND[:2], None, None, None]


def test_a_picture_takes_28_bytes(tmp_path):
    names = [f"n0{k:07d}/n0{k:07d}_{k}.JPEG" for k in range(5000)]
    made(names, [[100_000 + k, k] for k in range(5000)], [Checked(500, 375)] * 5000).save(tmp_path / "note", "1")
    assert 28 * 5000 < (tmp_path / "note").stat().st_size < 28 * 5000 + 1000


def test_hashes_that_agree_by_half_are_others():
    marks = np.array([[1, 5], [3, 3], [2, 9]], np.uint64)
    wanted = np.array([[3, 3], [2, 8], [1, 5], [0, 0], [9, 9], [2, 9]], np.uint64)
    assert findings._places_in(marks, wanted).tolist() == [1, -1, 0, -1, -1, 2]
    assert findings._places_in(marks[:0], wanted).tolist() == [-1] * 6


def test_a_damaged_note_is_no_note(tmp_path):
    path = tmp_path / "note"
    made().save(path, "1")
    content, lost = path.read_bytes(), 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        found = taken(NAMES, KEYS, path)
        assert found in (FOUND, [None] * 5)  # the same: of the header some bytes do not matter
        lost += found != FOUND
    assert lost > 0.9 * len(content)
    for length in range(0, len(content), 11):
        path.write_bytes(content[:length])
        assert taken(NAMES, KEYS, path) == [None] * 5


class Slow(Store):
    """60 pictures of which each takes a while; somebody presses Ctrl-C at one of them."""

    def __init__(self, path, stops_at=None):
        super().__init__(path, "slow", [str(k) for k in range(60)], [0] * 60, ["all"])
        self.content, self.stops_at, self.reads = encoded(Image.new("RGB", (8, 8)), "png"), stops_at, []

    def key(self, position):
        return [position]

    def read(self, position):
        self.reads.append(position)
        if position == self.stops_at:
            raise KeyboardInterrupt
        time.sleep(0.01)
        return self.content


def test_an_interrupted_check_ends_at_once_and_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "THREADS", 2)
    first, second, third = Slow(tmp_path, stops_at=10), Slow(tmp_path), Slow(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        StoredImages(first, 8)
    assert len(first.reads) < 40
    assert len(StoredImages(second, 8)) == 60
    assert sorted(second.reads) == list(range(10, 60))
    assert len(StoredImages(third, 8)) == 60
    assert third.reads == []


def test_an_interruption_between_two_pictures_leaves_nobody_at_work(tmp_path, monkeypatch):
    def interrupted(fresh, **_):
        for count, found in enumerate(fresh):
            if count == 10:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(stored, "THREADS", 2)
    monkeypatch.setattr(stored, "tqdm", interrupted)
    store = Slow(tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:  # and keeps what its frames hold, as who reports it does
        StoredImages(store, 8)
    reads = len(store.reads)
    time.sleep(0.1)
    assert reads == len(store.reads) < 40, caught


def test_few_pictures_wait_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "_AT_ONCE", 7)
    store = Slow(tmp_path)
    assert len(StoredImages(store, 8)) == 60
    assert sorted(store.reads) == list(range(60))

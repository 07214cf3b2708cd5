"""Notes in the cache folder: of a place and not of its name, and never a reason to stop."""

import os

import pytest

from lfm_fast.data.cache import note_folder, read_note, write_note


def test_a_note_is_of_the_place_itself(tmp_path):
    for name in ("a/set", "b/set"):
        (tmp_path / name).mkdir(parents=True)
        write_note("kind", tmp_path / name, {"of": name})
    (tmp_path / "link").symlink_to(tmp_path / "a" / "set")
    assert read_note("kind", tmp_path / "link") == read_note("kind", tmp_path / "a" / "set") == {"of": "a/set"}
    assert read_note("kind", tmp_path / "b" / "set") == {"of": "b/set"}
    assert read_note("another kind", tmp_path / "b" / "set") == {}
    assert note_folder("kind", tmp_path / "link") == note_folder("kind", tmp_path / "a" / "set")


def test_a_name_that_is_no_text_has_notes_too(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    write_note("kind", name, {"a": 1})
    assert read_note("kind", name) == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"5", b"\xff\xfe"])
def test_a_note_that_is_damaged_is_none(tmp_path, content):
    write_note("kind", tmp_path, {"a": 1})
    note_folder("kind", tmp_path).with_suffix(".json").write_bytes(content)
    assert read_note("kind", tmp_path) == {}

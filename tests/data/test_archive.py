"""A file of many pictures: what was there when it was opened, or a reason, however the system gives it out."""

import os

import pytest

from lfm_fast.data.archive import Archive
from lfm_fast.data.reading import MAX_BYTES, UnusableImage


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "archive"
    file.write_bytes(bytes(range(100)))
    return file


def test_a_system_that_gives_a_few_bytes_at_once_gives_all_of_them(path, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 7), offset))
    archive = Archive(path)
    assert archive.read(5, 90) == bytes(range(5, 95))
    monkeypatch.setattr(
        os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 7), offset)[: 50 - offset]
    )
    with pytest.raises(UnusableImage, match="it lies behind the end"):  # and does not wait for ever
        archive.read(5, 90)


@pytest.mark.parametrize("piece", [(90, 11), (101, 0), (-1, 5), (5, -1), (2**70, 1)])
def test_what_is_not_within_the_file_is_not_asked_of_the_system(path, piece, monkeypatch):
    archive = Archive(path)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UnusableImage, match="it lies behind the end of its archive"):
        archive.read(*piece)


def test_more_than_a_picture_can_have_is_not_read(path):
    os.truncate(path, MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(UnusableImage, match=f"its {MAX_BYTES + 1} bytes are more than a picture can have"):
        Archive(path).read(0, MAX_BYTES + 1)


def test_a_file_of_the_same_size_written_later_is_another(path):
    archive = Archive(path)
    path.write_bytes(bytes(100))
    os.utime(path, ns=(0, archive.key[1] + 1))
    assert archive.current_key() != archive.key
    with pytest.raises(UnusableImage, match="its archive has changed since it was opened"):
        archive.read(0, 10)


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    """To open a pipe would wait for whoever writes into it."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match="is not a regular file"):
            Archive(tmp_path / name)

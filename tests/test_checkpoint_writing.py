"""Writing files that a kill or a full disk cannot spoil."""

import contextlib
import os
import resource
import signal
import socket
from pathlib import Path

import pytest
import torch

from lfm_fast import checkpoint
from lfm_fast.checkpoint import atomic_write, read_weights, replace_files, save_weights


def test_an_atomic_write_replaces_only_when_whole(tmp_path):
    path = tmp_path / "new folder" / "stats.json"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert temporary.parent == path.parent  # a rename does not cross file systems
        assert not path.exists()
    for error in (RuntimeError, KeyboardInterrupt):
        with contextlib.suppress(error), atomic_write(path) as temporary:
            temporary.write_text("sec")
            raise error
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_an_atomic_write_syncs_the_data_then_renames_then_syncs_the_folder(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def record_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix or "folder")
        fsync(descriptor)

    def record_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", record_fsync)
    monkeypatch.setattr(checkpoint.os, "replace", record_replace)
    folder = tmp_path / "folder"
    save_weights(folder / "w.safetensors", {"a": torch.zeros(2)})
    assert events == [".partial", "rename", "folder"]


def test_a_full_disk_leaves_the_previous_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.ones(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*w.safetensors"):
            save_weights(path, {"a": torch.ones(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(read_weights(path)[0]["a"], torch.ones(10))
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_the_previous_file_and_the_next_write_clears_the_rest(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"previous")
    child = os.fork()
    if child == 0:
        try:
            with atomic_write(path) as temporary:
                temporary.write_bytes(b"ne")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)  # the child must never go on with the tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == b"previous"
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_write(tmp_path / "running") as other:
        other.write_bytes(b"of a process that runs")
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"next")
        assert other.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"w.safetensors", "running"}
    assert path.read_bytes() == b"next"


def test_partial_files_of_other_machines_stay(tmp_path):
    """On a disk that machines share: whether that process runs, only its own machine can say."""
    nobody = 2**22 + 1  # beyond the largest number of a process
    here, elsewhere = (tmp_path / f".w.{host}~{nobody}~0.partial" for host in (socket.gethostname(), "elsewhere"))
    for path in (here, elsewhere):
        path.touch()
    save_weights(tmp_path / "w.safetensors", {"a": torch.zeros(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [elsewhere.name, "w.safetensors"]


def test_a_kill_while_files_are_replaced_leaves_the_previous_ones(tmp_path):
    (tmp_path / "index").write_text("previous")
    child = os.fork()
    if child == 0:
        try:
            with replace_files(tmp_path, last="index") as temporary:
                (temporary / "index").write_text("next")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)  # the child must never go on with the tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "index").read_text() == "previous"
    assert len(list(tmp_path.iterdir())) == 2
    with replace_files(tmp_path, last="index") as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "a").write_text("a")
        (temporary / "index").write_text("next")
        assert (tmp_path / "index").read_text() == "previous"
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {"index", "below", "below/a"}
    assert (tmp_path / "index").read_text() == "next"


def test_the_file_that_says_all_is_there_goes_first_and_comes_last(tmp_path, monkeypatch):
    """On the disk, too: each file before any is renamed, and each folder after its renames."""
    (tmp_path / "b").write_text("previous")
    events, fsync, replace, unlink = [], os.fsync, os.replace, Path.unlink

    def record_fsync(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_replace(source, target):
        events.append(("rename", Path(target).name))
        replace(source, target)

    def record_unlink(path, missing_ok=False):
        events.append(("remove", path.name))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(checkpoint.os, "fsync", record_fsync)
    monkeypatch.setattr(checkpoint.os, "replace", record_replace)
    monkeypatch.setattr(Path, "unlink", record_unlink)
    with replace_files(tmp_path, last="b") as temporary:
        for name in "abc":
            (temporary / name).write_text("next")
    here = ("sync", tmp_path.name)
    assert sorted(events[:3]) == [("sync", name) for name in "abc"]
    assert events[3] == ("remove", "b")
    assert sorted(events[4:8:2]) == [("rename", "a"), ("rename", "c")]
    assert events[8:] == [("rename", "b"), here]
    assert events[5] == events[7] == here


def test_others_may_read_what_is_written(tmp_path):
    plain, weights = tmp_path / "plain", tmp_path / "weights.safetensors"
    plain.touch()
    save_weights(weights, {"a": torch.zeros(2)})
    assert weights.stat().st_mode == plain.stat().st_mode

"""Rows of a shard read from its file: those that safetensors reads, or one sentence, whatever happens to the file."""

import copy
import errno
import gc
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm_fast.data import shards
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.shards import open_shard

ROWS = torch.randn(9, 3, 5, 2, generator=torch.Generator().manual_seed(0))
CHANGED = r"^[^\n]*a\.safetensors was changed or cut short while it was in use: make or copy it again\.$"


@pytest.fixture
def path(tmp_path):
    save_file({"latents": ROWS, "labels": torch.arange(9)}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_rows_are_those_that_safetensors_reads(tmp_path, dtype):
    values = (30 * ROWS).to(dtype)
    save_file({"b": torch.zeros(3, dtype=torch.uint8), "latents": values, "labels": torch.arange(9)}, tmp_path / "a")
    rows = open_shard(tmp_path / "a")["latents"]
    expected = load_file(tmp_path / "a")["latents"]
    assert (rows.dtype, rows.shape, rows.ndim, len(rows)) == (dtype, expected.shape, 4, 9)
    for which in ([3], [], [0, 1, 2, 7], [8, 8, 7, 0], [5, 6, 7, 8], [2, 3, 3, 4]):
        assert torch.equal(rows[torch.tensor(which, dtype=torch.int64)], expected[which])
    for which in (slice(None), slice(2, 5), slice(7, 99), slice(4, 4), slice(0, 9, 4)):
        assert torch.equal(rows[which], expected[which])
    for row in (-1, 9):
        with pytest.raises(IndexError, match=f"row {row} of 9"):
            rows[torch.tensor([0, row])]


@pytest.mark.parametrize("held", [True, False])
def test_a_file_cut_short_is_a_sentence(path, monkeypatch, held):
    """Mapped, each of these would end the process by SIGBUS."""
    if not held:
        monkeypatch.setattr(shards, "_most_held", lambda: 0)
    content, found = path.read_bytes(), open_shard(path)
    for length in (len(content) - 1, len(content) // 2, 8, 0):
        os.truncate(path, length)
        with pytest.raises(ValueError, match=CHANGED):
            found["latents"][torch.tensor([8])]
    assert found["labels"].tolist() == list(range(9))  # read at opening


def test_a_file_cut_short_during_the_very_read_is_a_sentence(path, monkeypatch):
    real, size = os.preadv, path.stat().st_size

    def cut_first(descriptor, buffers, offset):
        os.truncate(path, size - 1)
        return real(descriptor, buffers, offset)

    rows = open_shard(path)["latents"]
    monkeypatch.setattr(shards.os, "preadv", cut_first)
    with pytest.raises(ValueError, match=CHANGED):
        rows[:]


def test_reads_that_give_less_at_once_are_gone_on_with(path, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(shards.os, "preadv", lambda descriptor, data, at: real(descriptor, [data[0][:7]], at))
    assert torch.equal(open_shard(path)["latents"][:], ROWS)


def test_a_disk_that_fails_is_a_sentence(path, monkeypatch):
    rows = open_shard(path)["latents"]

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shards.os, "preadv", fails)
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read any more \(Input/output error\)\.$"):
        rows[:]
    with pytest.raises(ValueError, match="Input/output error"):
        open_shard(path)


def test_a_file_written_again_in_its_place_is_refused(path):
    """Of the same size: its rows would be another cache's."""
    rows, before = open_shard(path)["latents"], path.stat()
    save_file({"latents": ROWS.flip(0), "labels": torch.arange(9)}, path.with_name("b"))
    other = path.with_name("b").read_bytes()
    assert len(other) == before.st_size
    with open(path, "r+b") as file:
        file.write(other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))  # the clock of a file system is coarse
    with pytest.raises(ValueError, match=CHANGED):
        rows[:]


def test_a_file_that_is_touched_is_read_on(path):
    """As those do who keep files from being tidied away."""
    rows = open_shard(path)["latents"]
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    assert torch.equal(rows[:], ROWS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=CHANGED):
        rows[:]


def test_rows_are_on_the_cpu_whatever_new_tensors_are_on(path):
    rows = open_shard(path)["latents"]
    with torch.device("meta"):
        assert torch.equal(rows[:], ROWS)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_labels_without_sign(tmp_path, dtype):
    save_file({"latents": ROWS, "labels": torch.arange(9).to(dtype)}, tmp_path / "a.safetensors")
    assert open_shard(tmp_path / "a.safetensors")["labels"].long().tolist() == list(range(9))


def test_where_no_read_fills_memory_that_is_there(path, monkeypatch):
    monkeypatch.delattr(shards.os, "preadv")
    assert torch.equal(open_shard(path)["latents"][:], ROWS)


def test_one_that_is_replaced_or_deleted_is_read_on_where_it_is_open(path, monkeypatch):
    held = open_shard(path)["latents"]
    monkeypatch.setattr(shards, "_most_held", lambda: 0)
    others = open_shard(path)["latents"]
    save_file({"latents": -ROWS[:5], "labels": torch.arange(5)}, path.with_name("b"))
    os.replace(path.with_name("b"), path)
    assert torch.equal(held[:], ROWS)
    with pytest.raises(ValueError, match=CHANGED):
        others[:]
    path.unlink()
    assert torch.equal(held[:], ROWS)
    with pytest.raises(ValueError, match=r"cannot be read any more \(No such file or directory\)"):
        others[:]


@pytest.mark.parametrize("allowed", [0, 3, 99])
def test_no_more_files_are_held_than_allowed_and_none_for_longer_than_needed(path, monkeypatch, allowed):
    gc.collect()  # what other tests have left
    before, held = open_files(), len(shards._File._held)
    monkeypatch.setattr(shards, "_most_held", lambda: held + allowed)
    found = [open_shard(path)["latents"] for _ in range(5)]
    for _ in range(2):
        assert open_files() == before + min(5, allowed)
        assert all(torch.equal(rows[torch.tensor([4])], ROWS[4:5]) for rows in found)
    del found
    assert open_files() == before


def test_half_of_the_descriptors_that_a_process_may_have_are_left(monkeypatch):
    import resource

    for soft, most in ((1024, 512), (resource.RLIM_INFINITY, None)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert shards._most_held() == most or shards._most_held() > 10**6


@pytest.mark.parametrize("again", [copy.deepcopy, lambda rows: pickle.loads(pickle.dumps(rows))])
def test_a_copy_opens_the_file_for_itself(path, again):
    rows = open_shard(path)["latents"]
    other = again(rows)
    del rows  # and its descriptor
    assert torch.equal(other[:], ROWS)
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=CHANGED):
        other[:]


def test_numbers_of_a_kind_that_is_not_known_are_refused(tmp_path):
    save_file({"latents": torch.zeros(2, 1, 1, 1).to(torch.float8_e4m3fn)}, tmp_path / "a")
    with pytest.raises(ValueError, match=re.escape("it holds latents in F8_E4M3, which is not known here")):
        open_shard(tmp_path / "a")


def test_a_cache_of_a_shard_cut_short_says_which(path):
    cache = LatentCache([open_shard(path)], [str(k) for k in range(9)], [0.0] * 3, [1.0] * 3, {})
    assert torch.equal(cache.read(torch.tensor([2, 0]))[0], ROWS[[2, 0]])
    os.truncate(path, 300)
    with pytest.raises(ValueError, match=CHANGED):
        cache.read(torch.tensor([2, 0]))

"""Where a run's folders lie: in one's home, or where this process may not read or write."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_resume import StoppingSource, curve, settings
from tiny_run import TinySource

from lfm_fast.autoencoder import load_autoencoder
from lfm_fast.data import open_images
from lfm_fast.data.foreign_latents import latent_layout
from lfm_fast.data.mapped_images import MappedImages
from lfm_fast.data.opening import open_store
from lfm_fast.train import resume
from lfm_fast.train.config import parse_args
from lfm_fast.train.loop import train
from lfm_fast.train.source import latent_format


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's home, which is another folder than the current one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_tilde_is_ones_home(home):
    """Shells leave it as it is in --output=~/runs."""
    first = train(settings("~/runs"), StoppingSource(3))
    assert first == home / "runs" / "000-DiT-Tiny"
    assert train(settings("~/runs"), StoppingSource(6)) == first, "the run is found again"
    assert parse_args(["--resume", "~/runs/000-DiT-Tiny"]).steps == 12
    assert train(settings("~/runs", resume="~/runs/000-DiT-Tiny"), TinySource()) == first
    assert curve(first)[-1]["step"] == 12
    assert list(Path().iterdir()) == []


def test_a_tilde_before_an_autoencoder_is_ones_home(home):
    load_autoencoder("embedded").save_pretrained(home / "vae")
    assert latent_format("~/vae") == latent_format("embedded")
    assert load_autoencoder("~/vae").fingerprint == load_autoencoder("embedded").fingerprint
    with pytest.raises(ValueError, match="'~/other' does not exist"):
        latent_format("~/other")


@pytest.mark.parametrize("how", ["its folder", errno.EACCES, errno.EROFS])
def test_a_run_that_may_not_be_written_to_is_not_gone_on_with(tmp_path, monkeypatch, capfd, how):
    first = train(settings(tmp_path), StoppingSource(3))
    before = (first / "metrics.jsonl").read_bytes()
    if how == "its folder":
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != first)
    else:
        cannot_lock(first, how, monkeypatch)
    capfd.readouterr()
    assert train(settings(tmp_path), TinySource()).name == "001-DiT-Tiny"
    assert f"Not going on with {first}: it cannot be written. A new run begins.\n" in capfd.readouterr().out
    sentence = f"--resume {first}: {first} cannot be written; copy it elsewhere, and give the copy"
    for path in (first, resume.run_checkpoints(first)[0]):
        with pytest.raises(ValueError, match=re.escape(sentence.partition(": ")[2])):
            train(settings(tmp_path, resume=str(path)), TinySource())
    assert (first / "metrics.jsonl").read_bytes() == before


def test_a_run_that_cannot_be_locked_for_now_is_not_begun_again(tmp_path, monkeypatch):
    first = train(settings(tmp_path), StoppingSource(3))
    cannot_lock(first, errno.ENOSPC, monkeypatch)
    for where in ("auto", str(first)):
        with pytest.raises(OSError, match="No space left on device"):
            train(settings(tmp_path, resume=where), TinySource())
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def cannot_lock(folder, number, monkeypatch):
    """As of somebody else's folder, which root may write to."""
    opened = os.open

    def refused(path, *how, **more):
        if path == folder / ".lock":
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(os, "open", refused)


def test_a_class_that_cannot_be_listed_is_refused_and_shifts_no_label(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photos" / name / "1.png")
    assert open_store(tmp_path / "photos").class_names == ["a", "b", "c"]
    closed, scandir = tmp_path / "photos" / "b", os.scandir

    def forbidden(path="."):
        if os.fspath(path) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(closed))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(ValueError, match=rf"cannot be read as folder \(Permission denied: {closed}\)"):
        open_store(tmp_path / "photos")


def picture(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8) if pixels is None else pixels).save(path)


def test_the_current_folder_and_the_one_above_have_classes_too(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/deep/2.png", "b/.hidden.png"):
        picture(tmp_path / name)
    (tmp_path / ".hidden").mkdir()
    for here, place in ((tmp_path, "."), (tmp_path / "a", "..")):
        monkeypatch.chdir(here)
        store = open_store(place)
        assert (store.names, store.labels) == (["a/1.png", "b/deep/2.png"], [0, 1])


def test_label_maps_behind_a_link_are_found(tmp_path):
    """A data set whose parts lie on several disks."""
    for k in range(3):
        picture(tmp_path / "ade" / "images" / "training" / f"{k}.png")
        picture(tmp_path / "other" / f"{k}.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "ade" / "annotations").mkdir()
    (tmp_path / "ade" / "annotations" / "training").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "again").symlink_to(tmp_path / "other")  # in a circle
    images = MappedImages(open_images(tmp_path / "ade", 8), "ade20k")
    assert (len(images), images.report.skipped) == (3, [])


def test_a_folder_that_may_not_be_looked_into_is_a_sentence(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", forbidden)
    with pytest.raises(ValueError, match=rf"^{tmp_path} cannot be read \(Permission denied\)\.$"):
        latent_layout(tmp_path)

"""Runs whose newest or only checkpoints cannot be read: nothing that was made before or after them is lost."""

import pytest
from test_resume import StoppingSource, assert_same_checkpoint, curve, settings
from tiny_run import TinySource

from lfm_fast.train import resume
from lfm_fast.train.loop import train


def files(folder):
    return {path: path.read_bytes() for path in folder.glob("**/*") if path.is_file() and path.name != "log.txt"}


def test_new_checkpoints_before_a_damaged_one_stay(tmp_path):
    config = settings(tmp_path, keep_checkpoints=2, checkpoint_every=3)
    folder = train(config, StoppingSource(10))
    newest, previous = resume.run_checkpoints(folder)
    newest.write_bytes(b"")
    previous.rename(resume.checkpoint_path(folder, 3))  # named as if it were older: steps 4 to 9 come again
    resume.keep_newest(folder, 1, step=6)
    assert [path.name for path in resume.run_checkpoints(folder)] == ["0000010.safetensors", "0000003.safetensors"]


def test_a_stop_before_a_damaged_checkpoint_is_saved_as_it_says(tmp_path, capfd):
    config = settings(tmp_path, keep_checkpoints=2)
    folder = train(config, StoppingSource(10))
    newest, previous = resume.run_checkpoints(folder)
    assert previous == resume.checkpoint_path(folder, 8)
    newest.write_bytes(b"")
    capfd.readouterr()
    train(config, StoppingSource(9))
    assert resume.run_checkpoints(folder) == [newest, resume.checkpoint_path(folder, 9), previous]
    assert f"saved {resume.checkpoint_path(folder, 9)}" in capfd.readouterr().out
    whole = train(settings(tmp_path / "whole"), TinySource())
    train(config, TinySource())
    assert curve(folder) == curve(whole)
    assert_same_checkpoint(resume.run_checkpoints(folder)[0], resume.run_checkpoints(whole)[0])


def test_a_finished_run_whose_last_checkpoint_is_damaged_makes_it_again(tmp_path, capfd):
    folder = train(settings(tmp_path), TinySource())
    newest, previous = resume.run_checkpoints(folder)[:2]
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    capfd.readouterr()
    assert train(settings(tmp_path), TinySource()) == folder
    said = capfd.readouterr().out
    assert f"Skipping {newest}" in said
    assert f"going on from {previous}" in said
    again, first = newest.with_name("again.safetensors"), newest.with_name("first.safetensors")
    again.write_bytes(newest.read_bytes())
    first.write_bytes(whole)
    assert_same_checkpoint(again, first)
    assert train(settings(tmp_path), TinySource()).name == "001-DiT-Tiny", "a whole finished run is left alone"


def test_a_run_without_one_whole_checkpoint_is_left_as_it_is(tmp_path, capfd):
    folder = train(settings(tmp_path), StoppingSource(6))
    for path in resume.run_checkpoints(folder):
        path.write_bytes(path.read_bytes()[:-1])
    before = files(folder)
    capfd.readouterr()
    new = train(settings(tmp_path), TinySource())
    assert new.name == "001-DiT-Tiny"
    assert "Skipping" in capfd.readouterr().out
    assert files(folder) == before
    assert curve(new) == curve(train(settings(tmp_path / "whole"), TinySource()))
    with pytest.raises(ValueError, match="none of its checkpoints can be read"):
        train(settings(tmp_path, resume=str(folder)), TinySource())


def test_a_checkpoint_that_cannot_be_read_leaves_no_new_folder(tmp_path):
    folder = train(settings(tmp_path), TinySource())
    older = resume.run_checkpoints(folder)[1]
    data = bytearray(older.read_bytes())
    data[-1] ^= 1
    older.write_bytes(data)
    with pytest.raises(ValueError, match="none of its checkpoints can be read"):
        train(settings(tmp_path, resume=str(older)), TinySource())
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]

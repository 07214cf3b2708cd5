import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import SETTINGS, Run, TinyAutoencoder, TinySource, flags

import lfm_fast
from lfm_fast.distributed import World
from lfm_fast.train import resume
from lfm_fast.train.config import from_preset, parse_args
from lfm_fast.train.journal import read_metrics
from lfm_fast.train.loop import build_state, train


class StoppingSource(TinySource):
    """Sends this process a SIGTERM in the middle of step `stop_at`."""

    def __init__(self, stop_at):
        super().__init__()
        self.stop_at = stop_at

    def batch(self, sample_numbers, seed):
        if int(sample_numbers[0]) // 8 == self.stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(sample_numbers, seed)


def settings(folder, **changes):
    return from_preset(**{**SETTINGS, "output": str(folder), **changes})


def curve(folder):
    """What must not depend on interruptions: every value of metrics.jsonl that is no measurement of time or memory."""
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr", "epoch")} for line in read_metrics(folder)]


def assert_same_checkpoint(one, other):
    (tensors, metadata), (others, other_metadata) = resume.read_verified(one), resume.read_verified(other)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    changing = {"training", "seconds"}
    assert {k: v for k, v in metadata.items() if k not in changing} == {
        k: v for k, v in other_metadata.items() if k not in changing
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(settings(folder, label_dropout=0.3, schedule="cosine", log_every=3), TinySource())


@pytest.mark.parametrize("stop_at", [1, 4, 5, 11])
def test_a_resumed_run_is_equal_to_the_bit(tmp_path, uninterrupted, stop_at):
    config = settings(tmp_path, label_dropout=0.3, schedule="cosine", log_every=3)
    first = train(config, StoppingSource(stop_at))
    assert resume.newest_step(first) == stop_at
    second = train(config, TinySource())
    assert second == first
    assert curve(second) == curve(uninterrupted)
    assert_same_checkpoint(resume.run_checkpoints(second)[0], resume.run_checkpoints(uninterrupted)[0])


def test_a_finished_run_is_not_resumed(tmp_path):
    config = settings(tmp_path, steps=2)
    folders = [train(config, TinySource()).name for _ in range(2)]
    assert folders == ["000-DiT-Tiny", "001-DiT-Tiny"]


def test_auto_leaves_runs_of_other_settings_alone(tmp_path):
    first = train(settings(tmp_path), StoppingSource(3))
    assert train(settings(tmp_path, seed=4), StoppingSource(3)) != first
    assert train(settings(tmp_path, resume="never"), StoppingSource(3)).name == "002-DiT-Tiny"
    assert resume.newest_step(first) == 3


def test_a_longer_run_goes_on_from_a_finished_one_by_path(tmp_path):
    first = train(settings(tmp_path, steps=6), TinySource())
    assert train(settings(tmp_path, steps=12, resume=str(first)), TinySource()) == first
    whole = train(settings(tmp_path / "whole"), TinySource())
    assert curve(first) == curve(whole)


def test_an_older_checkpoint_continues_in_a_new_folder(tmp_path):
    first = train(settings(tmp_path), TinySource())
    older = resume.checkpoint_path(first, 4)
    second = train(settings(tmp_path, resume=str(older)), TinySource())
    assert second.name == "001-DiT-Tiny"
    assert curve(second) == curve(first)
    assert resume.newest_step(first) == 12


def test_resuming_by_path_takes_the_settings_of_the_run(tmp_path):
    first = train(settings(tmp_path), StoppingSource(3))
    for path in (first, resume.run_checkpoints(first)[0]):
        config = parse_args(["--resume", str(path), "--checkpoint-every", "2"])
        assert config.checkpoint_every == 2
        assert (
            config.different_curve(dataclasses.replace(settings(tmp_path), num_classes=3, task="labelled").as_dict())
            == []
        )


def test_settings_of_another_version_are_one_sentence(tmp_path, capsys):
    folder = train(settings(tmp_path, steps=1), TinySource())
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "momentum": 0.5}))
    with pytest.raises(SystemExit):
        parse_args(["--resume", str(folder)])
    assert "settings this version does not know (momentum)" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, capfd, damage):
    config = settings(tmp_path)
    folder = train(config, StoppingSource(10))
    newest, previous = resume.run_checkpoints(folder)[:2]
    data = bytearray(newest.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[len(data) // 2] ^= 1
    newest.write_bytes({"empty": b"", "text": b"hello"}.get(damage, bytes(data)))
    capfd.readouterr()
    train(config, TinySource())
    lines = capfd.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(f"Skipping {newest}")]) == 1
    assert f"going on from {previous}" in lines[1]
    whole = train(settings(tmp_path / "whole"), TinySource())
    assert curve(folder) == curve(whole)
    assert_same_checkpoint(resume.run_checkpoints(folder)[0], resume.run_checkpoints(whole)[0])


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    folder = train(settings(tmp_path, steps=2), TinySource())
    with pytest.raises(ValueError, match=r"holds the network .* but the settings ask for"):
        train(settings(tmp_path, label_dropout=0.2, resume=str(folder)), TinySource())


@pytest.mark.parametrize("part", ["", "checkpoints/0000006.safetensors"])
def test_fewer_steps_than_were_made_are_refused_before_anything_changes(tmp_path, capfd, part):
    folder = train(settings(tmp_path, steps=6), TinySource())
    before = {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
    config = settings(tmp_path, steps=5, resume=str(folder / part))
    with pytest.raises(ValueError, match="it has reached step 6, and the settings ask for 5"):
        train(config, TinySource())
    assert {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()} == before


@pytest.mark.parametrize(
    "text", ["[1, 2]", "5", '{"steps": "many"}', '{"steps": 5, "flip": 1}', '{"momentum": 1}', "{"]
)
def test_a_config_that_is_none_is_one_sentence_and_status_2(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit) as caught:
        parse_args(["--resume", str(tmp_path)])
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("line", ["[1]", "7", '{"loss": 1}', '{"step": "one"}', '{"step": 1, "seconds": "long"}'])
def test_metrics_of_another_kind_are_one_sentence_and_stay(tmp_path, line):
    folder = train(settings(tmp_path, steps=2), TinySource())
    (folder / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: this is no line of metrics"):
        train(settings(tmp_path, steps=3, resume=str(folder)), TinySource())
    assert (folder / "metrics.jsonl").read_text() == line + "\n"


def test_files_of_the_user_in_a_run_folder_stay(tmp_path):
    folder = train(settings(tmp_path), StoppingSource(3))
    mine = [folder / name for name in ("notes.tmp", "checkpoints/.mine.partial", "samples/a.tmp", ".x~1~2.partial")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert train(settings(tmp_path), TinySource()) == folder
    assert train(settings(tmp_path, steps=13, resume=str(folder)), TinySource()) == folder
    assert [path.read_text() for path in mine] == ["mine"] * 4


def test_a_checkpoint_of_another_name_continues_in_a_new_folder(tmp_path):
    first = train(settings(tmp_path, steps=4), TinySource())
    (path,) = resume.run_checkpoints(first)
    best = path.rename(path.with_name("best.safetensors"))
    second = train(settings(tmp_path, steps=6, resume=str(best)), TinySource())
    assert (second.name, resume.newest_step(second)) == ("001-DiT-Tiny", 6)


@pytest.mark.parametrize(
    ("name", "value"), [("version", None), ("version", "two"), ("version", 99), ("step", "3"), ("config", [1])]
)
def test_wrong_metadata_is_one_sentence(tmp_path, name, value):
    (path,) = resume.run_checkpoints(train(settings(tmp_path, steps=1), TinySource()))
    tensors, metadata = resume.read_verified(path)
    changed = {key: text for key, text in {**metadata, name: value}.items() if text is not None}
    resume.save_weights(path, tensors, changed)
    with pytest.raises(ValueError, match=name):
        resume.read_verified(path)


def test_a_path_that_is_nothing_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(train(settings(tmp_path, steps=1), TinySource()))
    assert parse_args(["--resume", "."]).steps == 1
    with pytest.raises(SystemExit):
        parse_args(["--resume", ""])
    assert "--resume is empty; give auto, never, a run folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--resume is empty"):
        train(settings(tmp_path, steps=2, resume=""), TinySource())
    with pytest.raises(SystemExit):
        parse_args(["--resume", str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="no such checkpoint or run folder"):
        train(settings(tmp_path, resume=str(tmp_path / "nothing")), TinySource())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        train(settings(tmp_path, resume=str(tmp_path / "empty")), TinySource())


def test_only_the_newest_checkpoints_stay(tmp_path):
    folder = train(settings(tmp_path, checkpoint_every=2, keep_checkpoints=2), TinySource())
    assert sorted(os.listdir(folder / "checkpoints")) == ["0000010.safetensors", "0000012.safetensors"]


def test_the_checkpoint_is_a_network_for_everybody(tmp_path):
    config = settings(tmp_path, steps=2, num_classes=3, label_dropout=0.2)
    path = resume.run_checkpoints(train(config, TinySource()))[0]
    tensors, _ = resume.read_verified(path)
    for part, prefix in (("ema", "ema."), ("model", "model.")):
        model = lfm_fast.load_checkpoint(path, weights=part)
        assert model.config["num_classes"] == 3
        assert all(torch.equal(value, tensors[prefix + name]) for name, value in model.state_dict().items())


def test_a_damaged_checkpoint_is_nobodys_network(tmp_path):
    path = resume.run_checkpoints(train(settings(tmp_path, steps=1), TinySource()))[0]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its checksum"):
        lfm_fast.load_checkpoint(path)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 1e-3}\n{"step": 3, "lo')
    resume.truncate_metrics(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.1}\n'


def test_two_runs_never_share_a_folder(tmp_path):
    config = settings(tmp_path, steps=2)
    for number in range(3):
        folder, paths = resume.choose_run(config, 2)
        assert (folder.name, paths) == (f"{number:03d}-DiT-Tiny", [])
        resume.write_config(folder, config)
    resume.unlock(tmp_path / "001-DiT-Tiny")
    assert resume.choose_run(config, 2)[0].name == "001-DiT-Tiny"  # unfinished, and nobody holds it now
    with pytest.raises(ValueError, match="no checkpoint"):
        resume.choose_run(dataclasses.replace(config, resume=str(tmp_path / "001-DiT-Tiny")), 2)
    for number in range(3):
        resume.unlock(tmp_path / f"{number:03d}-DiT-Tiny")


def test_a_folder_in_use_is_refused(tmp_path):
    folder = train(settings(tmp_path, steps=2), TinySource())
    assert resume.lock(folder)
    with pytest.raises(ValueError, match="another process is training"):
        train(settings(tmp_path, steps=4, resume=str(folder)), TinySource())
    resume.unlock(folder)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
    class Broken(TinySource):
        def batch(self, sample_numbers, seed):
            z_0, y = super().batch(sample_numbers, seed)
            return (z_0 * float("nan") if int(sample_numbers[0]) >= 5 * 8 else z_0), y

    with pytest.raises(FloatingPointError, match="no longer finite at step 8") as caught:
        train(settings(tmp_path, log_every=100), Broken())
    assert "\n" not in str(caught.value)
    folder = tmp_path / "000-DiT-Tiny"
    assert resume.newest_step(folder) == 4
    assert f"{resume.checkpoint_path(folder, 4)} is from before" in str(caught.value)
    with pytest.raises(FloatingPointError, match="no checkpoint had been written yet"):
        train(settings(tmp_path / "new", checkpoint_every=100, log_every=6), Broken())


# --- a full disk ---


def test_a_checkpoint_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    config = settings(tmp_path)
    folder = train(config, StoppingSource(4))
    state = build_state(dataclasses.replace(config, num_classes=3), TinySource(), World())
    state.step = 5

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"cannot write .*0000005.safetensors: No space left on device") as caught:
        resume.save_checkpoint(folder, state, config)
    assert "\n" not in str(caught.value)
    assert os.listdir(folder / "checkpoints") == ["0000004.safetensors"]


def test_a_full_disk_loses_no_finished_checkpoint(tmp_path):
    """Files above a limit cannot be written: sentences, no leftovers, and the run goes on when there is room."""
    folder = train(settings(tmp_path), StoppingSource(4))
    before = resume.run_checkpoints(folder)[0].read_bytes()
    run = Run(flags(output=tmp_path), tmp_path / "out.txt", largest_file=100_000)
    assert run.status() == 1
    lines = run.text().splitlines()
    assert "error: cannot write" in lines[-1]
    assert len([line for line in lines if line.startswith("Training goes on, but cannot write")]) == 1
    assert "Traceback" not in run.text()
    assert os.listdir(folder / "checkpoints") == ["0000004.safetensors"]
    assert resume.run_checkpoints(folder)[0].read_bytes() == before
    train(settings(tmp_path), TinySource())
    assert curve(folder) == curve(train(settings(tmp_path / "whole"), TinySource()))


# --- signals, from outside ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    run = Run(flags(output=tmp_path, steps=100_000), tmp_path / "out.txt", {"TINY_DELAY": "0.01"})
    run.wait_for("step 3/")
    run.signal(number)
    assert run.status() == 0
    step = int(re.search(r"Stopped after step (\d+) and saved", run.text())[1])
    folder = tmp_path / "000-DiT-Tiny"
    assert resume.newest_step(folder) == step
    assert f"--resume {folder}" in run.text().splitlines()[-1]
    again = Run(["--resume", str(folder), "--steps", str(step + 2)], tmp_path / "out2.txt")
    assert again.status() == 0
    assert f"going on from {resume.checkpoint_path(folder, step)}" in again.text()
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, step + 3))


def test_a_signal_during_the_first_grid_counts(tmp_path):
    class Slow(TinyAutoencoder):
        def decode(self, latents):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().decode(latents)

    folder = train(settings(tmp_path, sample_every=5), TinySource(), Slow())
    assert resume.newest_step(folder) == 1


def test_a_second_interrupt_quits_at_once(tmp_path):
    run = Run(flags(output=tmp_path), tmp_path / "out.txt", {"TINY_DELAY": "30"})
    run.wait_for("Training DiT-Tiny")
    time.sleep(0.3)  # it is inside its first, long step
    run.signal(signal.SIGINT)
    time.sleep(1.2)
    run.signal(signal.SIGINT)
    assert run.status() == 130


def test_the_program_itself(tmp_path):
    """`python train_fast.py` in a process of its own, from another directory: a mistake is one sentence."""
    program = Path(lfm_fast.__file__).parent.parent / "train_fast.py"
    command = [sys.executable, str(program), "--data", str(tmp_path / "nowhere"), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(program.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr
    assert done.stderr.count("\n") == 1


def test_config_is_written_beside_the_run(tmp_path):
    folder = train(settings(tmp_path, steps=1), TinySource())
    written = json.loads((folder / "config.json").read_text())
    assert (written["learning_rate"], written["num_classes"], written["task"]) == (1e-3, 3, "labelled")

"""The quickstart around its training: what it keeps, and what it says when interrupted. `.ci/run` runs the whole."""

import runpy
import sys
from pathlib import Path

import pytest

from lfm_fast.checkpoint import save_weights
from lfm_fast.train import resume
from lfm_fast.train.journal import Journal

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "quickstart.py"


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """Runs it with flags, its training replaced by one that makes `made` steps of those asked for, in no time."""

    def run(*flags, made=10**9):
        script = runpy.run_path(str(SCRIPT))
        shown = []

        def train(config):
            print(f"{config.steps} steps to {config.output}")
            folder, _ = resume.choose_run(config, config.steps)
            resume.unlock(folder)
            resume.write_config(folder, config)
            last = min(made, config.steps)
            save_weights(resume.checkpoint_path(folder, last), {})
            for step in range(config.log_every, last + 1, config.log_every):
                Journal(folder).metrics(step=step, steps_per_s=5.0)
            return folder

        names = script["main"].__globals__
        names |= {"train": train, "show": lambda folder, *_: shown.append(folder) or "well"}
        monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output", str(tmp_path / "quickstart"), *flags])
        return script["main"](), shown

    return run


def test_earlier_runs_stay(quickstart, tmp_path):
    for number in range(2):
        status, shown = quickstart("--steps", "20")
        assert status == 0
        assert shown == [tmp_path / "quickstart" / "run" / f"{number:03d}-{shown[0].name[4:]}"]
    assert len(list((tmp_path / "quickstart" / "run").glob("*/checkpoints/*"))) == 2


def test_the_length_follows_from_the_time(quickstart, capsys):
    (folder,) = quickstart("--minutes", "2")[1]
    assert resume.newest_step(folder) == 2 * 60 * 5
    said = capsys.readouterr().out
    assert "5.0 steps a second: 600 steps will take about 2.0 minutes" in said


def test_what_training_says_of_the_timed_steps_is_kept_back(quickstart, capsys):
    """They are made in a folder that is gone when somebody looks for the checkpoint in it."""
    quickstart("--minutes", "2")
    said = [line.split(" steps to ")[0] for line in capsys.readouterr().out.splitlines() if "steps to " in line]
    assert said == ["600"]


def test_how_to_draw_more_is_a_command_that_this_shell_finds(quickstart, capsys, monkeypatch, tmp_path):
    (tmp_path / "env").mkdir()
    for name in ("python", "lfm-fast"):
        (tmp_path / "env" / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "python"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    (folder,) = quickstart("--steps", "20")[1]
    assert f"  env/lfm-fast sample --model {folder} --class Flags" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("made", [0, 3, 11])
def test_an_interrupt_while_the_steps_are_timed_is_one_word(quickstart, made, capsys, tmp_path):
    assert quickstart(made=made) == (130, [])
    assert capsys.readouterr().err == "interrupted\n"
    assert not (tmp_path / "quickstart").exists()


def test_an_interrupt_while_it_trains_draws_nothing_and_says_how(quickstart, capsys):
    assert quickstart("--steps", "20", made=13) == (0, [])
    said = capsys.readouterr().out
    assert "No pictures yet." in said
    assert "lfm-fast sample --model" in said


def test_an_output_that_cannot_be_written_is_said_before_the_work(quickstart, capsys, tmp_path):
    (tmp_path / "quickstart").touch()
    with pytest.raises(SystemExit) as stop:
        quickstart("--steps", "20")
    assert stop.value.code == 2
    assert "cannot be written" in capsys.readouterr().err

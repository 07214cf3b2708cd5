"""What the programs say: warnings as sentences."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest

from lfm_fast import LatentFlow
from lfm_fast.cli import main
from lfm_fast.train import loop

TRAIN_FAST = str(Path(__file__).resolve().parents[1] / "train_fast.py")


def by_script():
    return runpy.run_path(TRAIN_FAST)["main"]()


@pytest.mark.parametrize(
    ("program", "start"), [("train_fast.py", by_script), ("lfm-fast train", lambda: main(["train"]))]
)
def test_a_warning_is_its_sentence_without_a_line_of_code(program, start, monkeypatch, capsys):
    def training(config):
        warnings.warn("the moon is full", stacklevel=2)
        return 7

    monkeypatch.setattr(loop, "main", training)
    monkeypatch.setattr(sys, "argv", ["train_fast.py"])
    assert start() == 7
    assert capsys.readouterr().err == f"{program}: the moon is full\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["train", "--learning_rate", "1e-4"],
            "lfm-fast train: error: there is no flag --learning_rate; did you mean --learning-rate?",
        ),
        (["train", "--lr=1e-4"], "there is no flag --lr; did you mean --learning-rate?"),
        (["sample", "--num-image", "3"], "lfm-fast sample: error: there is no flag --num-image; did you mean --num-im"),
        (["encode", "--data", "a", "--output", "b", "--xyz", "3"], "there is no flag --xyz; --help lists"),
        (["train", "-n", "2"], "there is no flag -n; --help lists"),
        (["sample", "--guidance", "2"], "argument --guidance: invalid choice: '2'"),
        (["tune-grid", "--num", "2"], "did you mean --num-steps or --num-samples or --num-held-out?"),
        (["sample", "Flags"], "'Flags' belongs to no flag"),
    ],
)
def test_a_misspelt_flag_is_one_sentence_of_its_command(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"usage: lfm-fast {arguments[0]} ")
    assert says in said[1]


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 2
    said = capsys.readouterr().out
    assert [name for name in ("train", "sample", "encode", "info") if f"\n    {name} " not in said] == []


def test_a_misspelt_class_is_told_the_nearest_of_many():
    flow = LatentFlow.from_pretrained("embedded")
    flow.class_names = (*(f"{k} Dogs" for k in range(500)), "Red Panda")
    with pytest.raises(ValueError, match=r"^there is no class 'red' \(nearest: Red Panda\); there is 0 Dogs") as no:
        flow.labels("red", 1)
    assert str(no.value).endswith(", 19 Dogs and 481 more")
    with pytest.raises(ValueError, match=r"'rde panda' \(nearest: Red Panda\); there is"):
        flow.labels("rde panda", 1)


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "tune-grid", "encode", "convert", "bench", "info"])
def test_help_fits_a_terminal_of_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []

"""What the programs say, to whom, and where nobody listens."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lfm_fast import LatentFlow
from lfm_fast._terminal import start
from lfm_fast.cli import main
from lfm_fast.data.opening import LAYOUTS
from lfm_fast.data.palettes import PALETTES
from lfm_fast.train import loop
from lfm_fast.train.journal import Journal
from lfm_fast.train.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]


def by_script():
    return runpy.run_path(str(ROOT / "train_fast.py"))["main"]()


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


def fails_with(error):
    def run():
        raise error

    return run


def test_a_package_that_is_missing_is_one_sentence_with_the_python_that_lacks_it(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "PIL", raising=False)
    assert start("draw", fails_with(ModuleNotFoundError("No module named 'PIL'", name="PIL.Image"))) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"draw: the package pillow is not installed in this Python, {sys.executable}; install it")
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["lfm_fast.paint", "torch.no_such_part"])
def test_a_part_that_a_package_lacks_is_a_mistake_and_no_missing_package(name):
    with pytest.raises(ModuleNotFoundError):
        start("draw", fails_with(ModuleNotFoundError(f"No module named {name!r}", name=name)))


def test_a_file_that_cannot_be_opened_is_named():
    done = started("lambda: open('/no/such.png')", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "draw: No such file or directory: /no/such.png\n")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files here")
def test_printing_is_stopped_without_an_open_file_left():
    stop = "[__import__('lfm_fast._terminal', fromlist=['x']).stop_printing() for _ in range(3)]"
    count = "len(__import__('os').listdir('/proc/self/fd'))"
    done = started(
        f"lambda: -(lambda before, _, after: after - before)({count}, {stop}, {count})", stdout=subprocess.PIPE
    )
    assert done.returncode == 0, done.stderr


def started(run, **how):
    """A process that starts `run`, the text of a function; without torch, in no time."""
    code = f"import sys; from lfm_fast._terminal import start; sys.exit(start('draw', {run}))"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    how = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT, **how, "env": {**buffered, **how.get("env", {})}}
    return subprocess.run([sys.executable, "-c", code], **how)


def test_a_reader_who_has_gone_is_no_complaint():
    reading, writing = os.pipe()
    os.close(reading)
    done = started("lambda: print('a picture') or 0", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_to_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = started("lambda: print('a picture') or 0", stdout=full)
    assert (done.returncode, done.stderr) == (1, "draw: No space left on device\n")


def test_letters_that_the_terminal_lacks_are_spelt_out():
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = started("lambda: print('wrote \\u00fc.png') or 0", stdout=subprocess.PIPE, env=ascii_only)
    assert (done.returncode, done.stdout) == (0, "wrote \\xfc.png\n")


def test_a_run_goes_on_and_keeps_its_log_when_nobody_reads_what_it_prints(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as unread, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", unread)
        for line in ("the first line", "the second line"):
            Journal(tmp_path).say(line)
    assert (tmp_path / "log.txt").read_text() == "the first line\nthe second line\n"


def test_help_names_what_there_is_to_choose_from():
    # in a process of its own: other tests add networks to this one's
    program = (
        "from lfm_fast.models import NETWORKS; from lfm_fast.cli import main; print(*NETWORKS); main(['train', '-h'])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"COLUMNS": "80"}, capture_output=True)
    networks, said = done.stdout.decode().split("\n", 1)
    said = " ".join(said.split())  # each name whole on its line, to be copied
    assert [name for name in (*networks.split(), *PALETTES, *PRESETS, *LAYOUTS) if name not in said] == []
    assert "--model STR the network; one of DiT-S/2, DiT-S/4" in said
    assert "--palette STR of label maps; one of embedded, celebamask-hq" in said

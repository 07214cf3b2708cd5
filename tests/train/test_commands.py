"""How the programs of this environment are called from a shell that may not find them."""

import sys

import pytest

from lfm_fast.distributed import World
from lfm_fast.train import loop
from lfm_fast.train.commands import command


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Makes a folder of programs and sets the search path; this Python is the one in env/bin, below where we are."""

    def programs(folder, *names):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (tmp_path / folder / name).touch(mode=0o755)
        return tmp_path / folder

    own = programs("work/env/bin", "python3", "lfm-fast")
    monkeypatch.setattr(sys, "executable", str(own / "python3"))
    monkeypatch.chdir(tmp_path / "work")

    def searched(*folders):
        monkeypatch.setenv("PATH", ":".join(str(tmp_path / folder) for folder in folders))

    searched()
    return programs, searched


def test_a_program_that_the_shell_finds_is_its_name(environment):
    programs, searched = environment
    searched("work/env/bin", "other")
    programs("other", "lfm-fast")
    assert command("lfm-fast") == "lfm-fast"


def test_one_that_it_does_not_find_is_a_path_from_here(environment):
    assert command("lfm-fast") == "env/bin/lfm-fast"


def test_one_of_another_environment_is_not_ours(environment):
    programs, searched = environment
    programs("other", "lfm-fast")
    searched("other", "work/env/bin")
    assert command("lfm-fast") == "env/bin/lfm-fast"


def test_one_that_lies_elsewhere_has_its_whole_path(environment, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert command("lfm-fast") == str(tmp_path / "work" / "env" / "bin" / "lfm-fast")


def test_where_there_is_no_python_it_has_the_name_that_it_has(environment):
    assert command("python") == "python3"


def test_a_program_that_pip_put_elsewhere_is_its_name(environment):
    assert command("torchrun") == "torchrun"


@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        ("train_fast.py", 1, "python train_fast.py --resume"),
        ("/somewhere/train_fast.py", 2, "torchrun --nproc-per-node 2 /somewhere/train_fast.py --resume"),
        ("/venv/bin/lfm-fast", 1, "lfm-fast train --resume"),
        ("/somewhere/lfm_fast/cli/__main__.py", 2, "torchrun --nproc-per-node 2 -m lfm_fast.cli train --resume"),
        ("/venv/bin/pytest", 1, "python train_fast.py --resume"),
        ("/somewhere/pytest/__main__.py", 1, "python train_fast.py --resume"),
        ("scripts/quickstart.py", 1, "python train_fast.py --resume"),
    ],
)
def test_how_to_go_on_starts_what_was_started(monkeypatch, name, ranks, words):
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(loop, "command", str)  # as in a shell that finds this environment's programs
    assert " ".join([*loop._program(World(size=ranks, local_size=ranks)), "--resume"]) == words

"""How the programs of this environment are called from a shell that may not find them."""

import sys

import pytest

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

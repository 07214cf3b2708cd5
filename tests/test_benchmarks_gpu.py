"""What the benchmarks for a GPU share: lines and their verdicts, files that survive, parts that are stopped, timing."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.elsewhere import elsewhere

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Where there is a GPU as well."""
    monkeypatch.setattr(gpu, "device", lambda: CPU)


@pytest.fixture
def results(tmp_path):
    return gpu.Results(tmp_path / "some.json", "first", seconds=100.0)


def cells(results):
    return [gpu.row(results.part, line) for line in gpu.read(results.file)["parts"][results.part]["lines"]]


def test_a_line_is_held_against_what_is_wanted(results):
    results.add("rate", 0.9, "of copy", 0.9)
    results.add("rate", 0.89, "of copy", 0.9)
    results.add("error", 4, "ulp", 4, at_most=True)
    results.add("error", 5, "ulp", 4, at_most=True)
    results.add("figure", 1234.5, "images/s", seconds={"median": 1.0})
    results.add("wrong", 5.0, "x", 1.0, right=False)
    results.not_run("more", "there is no xformers")
    assert cells(results) == [
        ("first", "rate", "0.9 of copy", ">= 0.9 of copy", "met"),
        ("first", "rate", "0.89 of copy", ">= 0.9 of copy", "BELOW"),
        ("first", "error", "4 ulp", "<= 4 ulp", "met"),
        ("first", "error", "5 ulp", "<= 4 ulp", "ABOVE"),
        ("first", "figure", "1,234 images/s", "", ""),
        ("first", "wrong", "5 x", ">= 1 x", "WRONG RESULT"),
        ("first", "more", "not run", "", "there is no xformers"),
    ]


def test_parts_share_a_file_and_each_line_is_in_it_at_once(results):
    results.add("one", 1.0, "x")
    second = gpu.Results(results.file, "second", seconds=100.0)
    second.add("two", 2.0, "x")
    found = gpu.read(results.file)
    assert [line["title"] for part in found["parts"].values() for line in part["lines"]] == ["one", "two"]
    assert {part["status"] for part in found["parts"].values()} == {"stopped"}
    assert {"date", "device", "versions", "commit"} <= found["about"].keys()
    assert not gpu.well(found)
    for each in (results, second):
        each.write("ok")
    assert gpu.well(gpu.read(results.file))
    second.add("three", 2.0, "x", right=False)
    second.write("ok")
    assert not gpu.well(gpu.read(results.file))


def test_calls_take_turns_and_the_slower_one_is_seen():
    order = []
    calls = {"fast": lambda: order.append("fast"), "slow": lambda: (order.append("slow"), time.sleep(2e-3))}
    found = gpu.timed(calls, CPU, seconds=0.02)
    assert len(found["fast"]) == len(found["slow"]) >= 5
    assert gpu.median(found["slow"]) >= 2e-3 > gpu.median(found["fast"])
    timed = order[-2 * len(found["fast"]) :]
    assert timed[:4] == ["fast", "slow", "slow", "fast"]
    assert gpu.ratio([2.0, 6.0, 4.0], [1.0, 2.0, 2.0])["median"] == 2.0


def test_ceilings_are_of_this_device():
    found = gpu.ceilings(smoke=True)
    assert found["copy_bytes_per_second"] > 1e6
    assert min(found["gemm_flops_per_second"].values()) > 1e6


PARTS = {
    "good": gpu_parts.Part(lambda results: results.add("one", 1.0, "x", 2.0), 60.0, anywhere=True),
    "bad": gpu_parts.Part(lambda results: results.add("two", 1 / 0, "x"), 60.0, usual=False),
}
for _part in PARTS.values():
    _part.run.__doc__ = "What it is."


def test_the_command_line_runs_parts_and_prints_the_table(tmp_path, capsys):
    told = ["--smoke", "--output", str(tmp_path / "out.json")]
    assert gpu_parts.main("some", "nothing", PARTS, told) == 0
    said = capsys.readouterr().out
    assert "good  one" in said
    assert "BELOW" in said
    assert "SMOKE" in said
    assert gpu_parts.main("some", "nothing", PARTS, ["--table", str(tmp_path / "out.json")]) == 0
    assert "BELOW" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        gpu_parts.main("some", "nothing", PARTS, ["bad", *told])
    assert gpu.read(tmp_path / "out.json")["parts"]["bad"]["status"] == "failed"
    assert gpu_parts.main("some", "nothing", PARTS, ["third", *told]) == 2
    assert "there are good, bad" in capsys.readouterr().err
    assert gpu_parts.main("some", "nothing", PARTS, ["bad", *told[1:]]) == 2
    assert "PyTorch sees no GPU here: --smoke runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_parts.main("some", "nothing", PARTS, ["--help"])
    assert "bad (only where named)" in capsys.readouterr().out


def test_a_part_in_a_process_of_its_own_is_said_to_have_failed(tmp_path, capfd):
    """There is no such module: the process fails, and its part stands in the file."""
    told = ["--output", str(tmp_path / "out.json"), "--seconds", "30"]
    assert gpu_parts.main("some", "benchmarks.no_such_module", PARTS, told) == 1
    assert "good: failed with status 1" in capfd.readouterr().out


def test_a_program_is_stopped_with_all_that_it_started(tmp_path):
    pid = tmp_path / "pid"
    child = "import sys, time; time.sleep(60)"
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    parent += f"open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    assert gpu_parts.run([sys.executable, "-c", parent], 0.5) == "out of time after 0.5 s"
    deadline = time.monotonic() + 10
    while _runs(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert gpu_parts.run([sys.executable, "-c", "pass"], 30.0) is None
    assert gpu_parts.run([sys.executable, "-c", "raise SystemExit(3)"], 30.0) == "failed with status 3"


def test_a_program_that_is_killed_ends_what_it_started(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = "import signal, sys; from benchmarks import gpu_parts; signal.signal(signal.SIGTERM, gpu_parts._leave); "
    program += f"gpu_parts.run([sys.executable, '-c', {child!r}], 60.0)"
    parent = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not (pid.is_file() and pid.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert os.getsid(int(pid.read_text())) == os.getsid(0)
    parent.terminate()
    assert parent.wait(60) == 128 + signal.SIGTERM
    while _runs(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_another_process_answers_dies_or_is_ended():
    with elsewhere(LFM_FAST_SOME_NAME="told") as there:
        assert there(os.getenv, "LFM_FAST_SOME_NAME", seconds=60.0) == "told"
        first = there(os.getpid, seconds=60.0)
        assert first == there(os.getpid, seconds=60.0) != os.getpid()
        with pytest.raises(RuntimeError, match="longer than"):
            there(time.sleep, 60, seconds=0.5)
        assert not _runs(first)
        with pytest.raises(RuntimeError, match="died"):
            there(os.kill, there(os.getpid, seconds=60.0), signal.SIGKILL, seconds=60.0)
        with pytest.raises(ZeroDivisionError):
            there(divmod, 1, 0, seconds=60.0)


def test_work_ends_when_the_time_is_over(results):
    assert list(gpu_parts.until(results, [1, 2, 3])) == [1, 2, 3]
    assert list(gpu_parts.until(results, [1, 2, 3], reserve=1e6)) == []
    assert cells(results)[-1] == ("first", "3 more", "not run", "", "no time was left for them in first")

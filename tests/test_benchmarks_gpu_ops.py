"""The ops' benchmark for a GPU, on a CPU: every part runs, wrong results are called wrong, reports are understood."""

import functools
import re
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_attention, gpu_code, gpu_counters, gpu_noise, gpu_ops, gpu_parts, gpu_shapes
from lfm_fast.ops import _registry

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/gpu_bench_ops.sh"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Where there is a GPU as well."""
    monkeypatch.setattr(gpu, "device", lambda: torch.device("cpu"))


def lines_of(file):
    return {part: of["lines"] for part, of in gpu.read(file)["parts"].items()}


def test_every_part_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_counters.shutil, "which", lambda name: None)
    parts = [name for name in gpu_ops.PARTS if name != "code"]
    file = tmp_path / "ops.json"
    assert gpu_parts.main("ops", "benchmarks.gpu_ops", gpu_ops.PARTS, [*parts, "--smoke", "--output", str(file)]) == 0
    said, found = capsys.readouterr().out, lines_of(file)
    assert list(found) == parts
    measured = {line["title"] for line in found["rows"] if "reached" in line}
    assert "modulated_layer_norm_backward DiT-XL bf16, cpp" in measured
    assert "guided_step guided, bf16 velocity, cpp" in measured
    for part in parts:
        assert found[part], part
        assert all(f"{part:<11} {line['title']}" in said for line in found[part])
    by_reached = {line["unit"] for lines in found.values() for line in lines if "reached" in line}
    assert by_reached >= {"of copy", "ulp", "elements differ", "x the best", "x"}
    assert found["counters"] == [{"title": "ncu", "why_not": "it is not installed here"}]
    assert gpu.read(file)["parts"]["rows"]["status"] == "ok"


@pytest.fixture
def results(tmp_path):
    return gpu.Results(tmp_path / "ops.json", "rows", seconds=100.0, smoke=True)


def test_a_fast_and_wrong_kernel_is_called_wrong(results, monkeypatch):
    case = gpu_shapes.cases(smoke=True)[0]
    workload = gpu_ops.OpWorkload(case.row, case.size)
    kernels = dict(workload.row.kernels)
    wrong = {**kernels, "cpp": lambda *args: tuple(1.2 * x for x in kernels["cpp"](*args))}
    monkeypatch.setattr(workload.row, "kernels", wrong)
    gpu_ops.add_shares(results, "a row", workload, wanted=0.9, factor=1.0)
    assert [line["right"] for line in lines_of(results.file)["rows"]] == [False]
    monkeypatch.setattr(workload.row, "kernels", kernels)
    gpu_ops.add_shares(results, "a row", workload, wanted=1e-9, factor=2.0)
    line = lines_of(results.file)["rows"][-1]
    assert (line["right"], line["met"]) == (True, True)
    seconds = line["facts"]["seconds"]["cpp"]["median"]
    copied = gpu.ceilings(True)["copy_bytes_per_second"]
    assert line["reached"] == pytest.approx(2 * workload.moved / seconds / copied)


def raises(*args):
    raise RuntimeError("no kernel image\nat length")


def test_a_kernel_that_raises_leaves_the_others_their_lines(results, monkeypatch):
    case = gpu_shapes.cases(smoke=True)[0]
    workload = gpu_ops.OpWorkload(case.row, case.size)
    others = dict(workload.others())
    monkeypatch.setattr(workload, "others", lambda: {"failing": (raises, raises), "untold": (raises, None), **others})
    gpu_ops.add_shares(results, "a row", workload, wanted=1e-9, factor=1.0)
    *failed, line = lines_of(results.file)["rows"]
    why = {each["title"]: each["why_not"] for each in failed}
    assert why == dict.fromkeys(("a row, failing", "a row, untold"), "RuntimeError: no kernel image")
    assert (line["title"], line["right"], line["met"]) == ("a row, cpp", True, True)
    monkeypatch.setattr(workload.row, "kernels", {**workload.row.kernels, "cpp": raises})
    gpu_ops.add_shares(results, "again", workload, wanted=1e-9, factor=1.0)
    assert "why_not" in {each["title"]: each for each in lines_of(results.file)["rows"]}["again, cpp"]


def test_a_row_that_raises_leaves_the_other_rows(results, monkeypatch):
    real, failing = gpu_ops.OpWorkload, gpu_shapes.cases(smoke=True)[0].row

    def build(row, size):
        return raises() if row == failing else real(row, size)

    monkeypatch.setattr(gpu_ops, "OpWorkload", build)
    gpu_ops.rows(results)
    lines = lines_of(results.file)["rows"]
    assert {line["why_not"] for line in lines if line["title"].startswith(f"{failing} ")} == {
        "RuntimeError: no kernel image"
    }
    assert any("reached" in line for line in lines)


def test_attention_that_raises_leaves_the_other_shapes(results, monkeypatch):
    real = gpu_attention.run

    def run(name, args, gradient):
        return raises() if gradient is None or name == "math" else real(name, args, gradient)

    monkeypatch.setattr(gpu_attention, "run", run)
    gpu_attention.attention(results)
    lines = lines_of(results.file)["rows"]
    (whole,) = [line for line in lines if "RuntimeError: no kernel image" in line.get("why_not", "")]
    assert whole["title"].endswith(", forward")
    (line,) = [line for line in lines if line["title"].endswith("forward and backward")]
    assert line["facts"]["not_run"]["math"] == "RuntimeError: no kernel image"


def test_a_row_without_a_kernel_here_says_why(results, monkeypatch):
    case = gpu_shapes.cases(smoke=True)[0]
    workload = gpu_ops.OpWorkload(case.row, case.size)
    monkeypatch.setattr(_registry.Op, "willing", lambda *args, **kwargs: [])
    gpu_ops.add_shares(results, "a row", workload, wanted=0.9, factor=1.0)
    (line,) = lines_of(results.file)["rows"]
    assert "triton: on CPU tensors it runs in Triton's interpreter alone" in line["why_not"]


def test_launches_are_held_against_what_is_wanted(results):
    gpu_ops.add_launches(results, "a", ["kernel", "kernel"], 1)
    gpu_ops.add_launches(results, "b", ["kernel"], 1)
    gpu_ops.add_launches(results, "c", None, 1)
    assert [line.get("met") for line in lines_of(results.file)["rows"]] == [False, True, None]


def test_sizes_are_several_times_the_cache():
    for case in gpu_shapes.cases(smoke=False):
        elements = torch.Size(case.size["shape"]).numel()
        # beside a tensor in bf16 a state or a result in float32
        assert elements * case.size.get("dtype", torch.float32).itemsize >= gpu_shapes.TENSOR // 2, case
        assert elements < 2**31
        assert case.backward is None or f"{case.row}_backward" in _registry.rows()


def test_distances_in_units_in_the_last_place():
    a = torch.tensor([1.0, 1.0, -1.0, 0.0, -1e-45, 2.0])
    b = torch.tensor([1.0, 1.0 + 2**-22, -1.0 + 2**-24, -0.0, 1e-45, 4.0])
    assert gpu_noise.ulps(a, b).tolist() == [0, 2, 1, 0, 2, 2**23]
    assert gpu_noise.ulps(b, a).tolist() == [0, 2, 1, 0, 2, 2**23]


def test_results_that_move_are_counted():
    x = torch.zeros(5)
    drawn = iter([[x], [x], [x + torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0])]])
    assert gpu_noise.different(lambda: next(drawn)) == 2
    assert gpu_noise.different(lambda: [torch.full((3,), torch.nan)]) == 0
    drawn = iter([[torch.zeros(2)], [-torch.zeros(2)]])
    assert gpu_noise.different(lambda: next(drawn), times=2) == 2


NCU = "\n".join(
    [
        "==PROF== Connected to process 1",
        'a line of "the program" itself',
        ",".join(f'"{name}"' for name in ("ID", "Process ID", "Kernel Name", "Block Size", *gpu_counters.METRICS)),
        ",".join(f'"{unit}"' for unit in ("", "", "", "", "%", "byte", "byte", "ns", "%", "register/thread", "%")),
        '"0","1","_kernel","(128, 1, 1)","91.5","1,000,000","2000000","123456","77.7","40","12.5"',
        '"1","1","other","(128, 1, 1)","","","","","","",""',
        "",
    ]
)


def test_counters_are_read_from_what_ncu_says(results):
    (kernel,) = gpu_counters.parsed(NCU)
    assert kernel["name"] == "_kernel"
    assert kernel[gpu_counters.READ] == 1e6
    gpu_counters.add_kernel(results, "a_row", gpu_shapes.cases(True)[0], kernel)
    assert gpu_counters.parsed("==ERROR== ERR_NVGPUCTRPERM") == []
    (line,) = lines_of(results.file)["rows"]
    assert line["reached"] == 91.5
    assert line["note"] == "123 us, 1 MB read, 2 written, 78 % of warps, 40 registers, 12 % hits in L2"


def test_ncu_that_counts_nothing_says_why(results, monkeypatch):
    monkeypatch.setattr(gpu_counters.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_counters, "said_by", lambda command: ("", "==ERROR== ERR_NVGPUCTRPERM\n"))
    monkeypatch.setattr(gpu_counters, "SECONDS", 1.0)
    gpu_counters.counters(results)
    lines = lines_of(results.file)["rows"]
    assert {line["why_not"] for line in lines} == {"==ERROR== ERR_NVGPUCTRPERM"}
    assert len({line["title"] for line in lines}) == len(lines) >= 5


SASS = """
	Function : _first
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0040*/                   LDGSTS.E.128 [R1], desc[UR4][R2.64] ;
	Function : _second
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/                   STL.64 [R1+0x8], R2 ;
"""


def test_accesses_are_counted_by_width():
    found = gpu_code.accesses_of(SASS)
    assert found == {"_first": {"LDG 128": 2, "STG 16": 1}, "_second": {"LDG 32": 1, "STL 64": 1}}


def test_a_kernel_that_spills_does_not_reach_what_is_wanted(results):
    kernel = {"name": "k", "registers": 40, "stack": 0, "shared": 0, "accesses": {"LDG 128": 2}}
    gpu_code.add_usage(results, "a row", kernel)
    gpu_code.add_usage(results, "a row", {**kernel, "accesses": {"STL 64": 3}})
    gpu_code.add_usage(results, "a row", {**kernel, "stack": 8})
    assert [line["met"] for line in lines_of(results.file)["rows"]] == [True, False, False]


def test_the_script_names_every_part():
    text = SCRIPT.read_text()
    assert text.rstrip().endswith('-m benchmarks.gpu_ops "$@"')
    for name, part in gpu_ops.PARTS.items():
        assert re.search(rf"\b{name}\b", text), name
        assert part.seconds <= 480.0
    assert sum(part.seconds for part in gpu_ops.PARTS.values() if part.usual) <= 25 * 60


def test_on_a_gpu_the_host_is_ahead_and_events_tell_the_time(monkeypatch):
    """The order of things on a device that is not there: it sleeps, then every call stands between two events."""
    log, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.at = clock[0]

        def elapsed_time(self, other):
            return other.at - self.at

    def call(name, milliseconds):
        log.append(name)
        clock[0] += milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    calls = {"a": functools.partial(call, "a", 1.0), "b": functools.partial(call, "b", 3.0)}
    found = gpu.timed(calls, torch.device("cuda"), seconds=0.0)
    assert found == {"a": [1e-3] * 5, "b": [3e-3] * 5}
    start = log.index("sleep")
    assert log[start : start + 7] == ["sleep", "event", "a", "event", "event", "b", "event"]
    assert log[-1] == "wait"
    assert log[start:].count("wait") == 1

"""The benchmark of training on a GPU, on a CPU: every part runs, wrong contenders are called wrong."""

import operator
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks import curves, gpu, gpu_contenders, gpu_parts, gpu_training
from benchmarks.elsewhere import elsewhere
from benchmarks.gpu_contenders import Way, host_times, in_turn, taking
from benchmarks.names import AGAIN, COMPILED, DIFFUSERS, DIFFUSERS_COMPILED, EAGER, FAST, REFERENCE
from benchmarks.training import Ours
from lfm_fast.models import NETWORKS, DiT
from lfm_fast.ops import _registry

CPU = torch.device("cpu")
SCRIPT = Path(__file__).resolve().parents[1] / "scripts/gpu_bench_train.sh"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Where there is a GPU as well."""
    monkeypatch.setattr(gpu, "device", lambda: torch.device("cpu"))


@pytest.fixture
def little(monkeypatch):
    sizes = {"hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    monkeypatch.setitem(NETWORKS, "DiT-Little", (DiT, sizes))
    monkeypatch.setattr(gpu_training, "_SMALL", "DiT-Little")


@pytest.fixture
def results(tmp_path):
    return gpu.Results(tmp_path / "training.json", "some", seconds=100.0, smoke=True)


def lines_of(file):
    return {part: of["lines"] for part, of in gpu.read(file)["parts"].items()}


def test_every_part_runs(little, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_training, "MAIN", (FAST,))
    monkeypatch.delitem(gpu_training.WAYS, DIFFUSERS_COMPILED)  # PyTorch alone is traced: that takes seconds
    monkeypatch.setattr("benchmarks.gpu_feeding.SMOKE_NETWORK", "DiT-Little")
    parts, file = ["gate", "small", "batches", "latents", "images"], tmp_path / "training.json"
    told = [*parts, "--smoke", "--output", str(file)]
    assert gpu_parts.main("training", "benchmarks.gpu_training", gpu_training.PARTS, told) == 0
    found = lines_of(file)
    assert list(found) == parts
    assert all(found.values())
    by_title = {line["title"]: line for line in found["small"]}
    for name in gpu_training.WAYS:  # each is timed, or the reason stands there
        line = by_title[f"DiT-Little, 3 images, {name}"]
        assert ("why_not" in line) == (name in (gpu_training.GRAPH, gpu_training.FP8, gpu_training.TF32))
    rates = {name: by_title[f"DiT-Little, 3 images, {name}"].get("reached") for name in gpu_training.WAYS}
    for name in (COMPILED, EAGER, DIFFUSERS, REFERENCE):
        assert by_title[f"DiT-Little, 3 images, fast path over {name}"]["reached"] == rates[FAST] / rates[name]
    again = by_title["DiT-Little, 3 images, the fast path again over the first time"]
    assert again["reached"] == rates[AGAIN] / rates[FAST]
    products = gpu.ceilings(True)["gemm_flops_per_second"]["bfloat16"]
    share = by_title[f"DiT-Little, 3 images, {FAST}, share of the products' ceiling"]["reached"]
    with torch.device("meta"):
        flops = (
            3 * DiT(image_size=32, num_classes=10, label_dropout=0.1, **NETWORKS["DiT-Little"][1]).flops_per_sample()
        )
    assert share == pytest.approx(rates[FAST] * flops / products)
    assert [line["wanted"] for line in found["latents"]] == [0.01, 0.01]


def test_a_contender_with_another_gradient_is_called_wrong(little, monkeypatch, results):
    right = Ours.result
    monkeypatch.setattr(Ours, "result", lambda ours: [1.1 * x for x in right(ours)])
    gpu_training.compare(results, "DiT-S/2", 128, (FAST, EAGER))
    lines = {line["title"].split(", ", 2)[2]: line for line in lines_of(results.file)["some"]}
    assert (lines[FAST]["right"], lines[EAGER]["right"]) == (False, True)
    assert lines[FAST]["facts"]["error"] == pytest.approx(0.1, rel=0.1)


def test_a_fast_path_on_another_curve_fails_the_gate(little, monkeypatch, results):
    real = curves.losses

    def losses(config, source, reference):
        found = real(config, source, reference)
        return found if reference or config.precision == "bf16" else [1.5 * x for x in found]

    monkeypatch.setattr(curves, "losses", losses)
    gpu_training.gate(results)
    lines = lines_of(results.file)["some"]
    seeds = lines[0]["reached"]
    assert [line["wanted"] for line in lines] == [None, None, seeds, seeds]
    assert [line["right"] for line in lines] == [True, True, True, False]
    assert lines[1]["reached"] < seeds / 10  # the order of sums, beside another seed


def test_contenders_have_processes_of_their_own_and_failures_are_reasons(monkeypatch, results):
    started = []

    @contextmanager
    def counted():
        with elsewhere() as run:
            started.append(run)
            yield run

    monkeypatch.setattr(gpu_contenders, "elsewhere", counted)
    results.smoke = False
    names = ("%(batch_size)d", "%(more)d", "%(batch_size)x")
    ways = {name: Way(None) for name in names} | {"absent": Way(None, package="no_such_package")}
    found = dict(in_turn(results, ways, operator.mod, 60.0, "a network", {"batch_size": 12}))
    assert found == {names[0]: "12", names[2]: "c"}
    assert len(set(map(id, started))) == 3
    why = {line["title"]: line["why_not"] for line in lines_of(results.file)["some"]}
    reasons = {"a network, %(more)d": "KeyError: 'more'", "a network, absent": "no_such_package is not installed"}
    assert why == reasons


def test_without_time_left_nothing_is_begun(tmp_path):
    results = gpu.Results(tmp_path / "training.json", "some", seconds=1.0)
    assert list(in_turn(results, {"first": Way(None)}, operator.mod, 60.0, "a network", {})) == []
    assert [line["why_not"] for line in lines_of(results.file)["some"]] == ["no time was left for it in some"]


def test_ways_hold_in_every_thread_and_end():
    row, chosen = _registry.row("modulated_layer_norm"), []
    args = row.bind(**row.arguments(**row.cases[0]))
    before = row.choose(args)

    def look():
        chosen.append(row.choose(args))

    for rows in ("reference", "all"):
        with taking(rows):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
    look()
    assert chosen == ["reference", before, before]
    assert before == "cpp"


def test_all_takes_what_is_opt_in():
    backend = next(b for b in _registry.row("interpolate").backends if b.name == "cuda")
    with taking("all"):
        assert all(b.opt_in is None for row in _registry.rows().values() for b in row.backends)
    assert backend.opt_in is not None
    assert backend in _registry.row("interpolate").backends


def test_host_times_are_those_of_one_call():
    seconds = host_times(lambda: time.sleep(0.01), CPU, 0.05, at_once=2, fewest=3)
    assert len(seconds) >= 3
    assert min(seconds) >= 0.01


def test_the_script_names_every_part():
    said = SCRIPT.read_text()
    usual = [name for name, part in gpu_training.PARTS.items() if part.usual]
    assert " ".join(f"[{name}]" for name in usual) in said
    for name, part in gpu_training.PARTS.items():
        assert part.seconds + gpu_parts._GRACE <= 600
        assert name in said


def test_the_memory_of_a_forward_is_only_asked_of_a_gpu(little, results):
    told = {"network": "DiT-Little", "batch_size": 2, "smoke": True}
    facts = gpu_training.measured(FAST, told)
    assert (facts["activation_bytes"], facts["step_bytes"], facts["all_bytes"]) == (None, None, None)
    assert facts["update_share"] > 0
    assert gpu_contenders.LARGEST_ERROR["bfloat16"] >= facts["error"]

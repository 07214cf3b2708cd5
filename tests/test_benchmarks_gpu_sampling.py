"""The benchmark of sampling on a GPU, on a CPU: every part runs, ratios are those of times, wrong is called wrong."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tape import record_on_the_cpu

import lfm_fast
from benchmarks import autoencoders, gpu, gpu_parts, gpu_sampling, gpu_starting, solving
from benchmarks.gpu_sampling import GRAPH, GRAPH_AGAIN, WAYS
from benchmarks.names import COMPILED, DIFFUSERS, DIFFUSERS_COMPILED, EAGER, FAST, REFERENCE
from benchmarks.networks import GuidedSampling, network
from benchmarks.workloads import relative_error
from lfm_fast.models import NETWORKS, DiT

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/gpu_bench_sample.sh"
STEPS = 2  # of a smoke run


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Where there is a GPU as well."""
    monkeypatch.setattr(gpu, "device", lambda: torch.device("cpu"))


@pytest.fixture
def little(monkeypatch):
    sizes = {"hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    monkeypatch.setitem(NETWORKS, "DiT-Little", (DiT, sizes))
    for module in (gpu_sampling, gpu_starting):
        monkeypatch.setattr(module, "_SMALL", "DiT-Little")
    for name in (DIFFUSERS, DIFFUSERS_COMPILED):  # PyTorch alone is traced: that takes seconds
        monkeypatch.setitem(WAYS, name, replace(WAYS[name], package="no_such_package"))


@pytest.fixture
def results(tmp_path):
    return gpu.Results(tmp_path / "sampling.json", "some", seconds=100.0, smoke=True)


def lines_of(file):
    return {line["title"]: line for part in gpu.read(file)["parts"].values() for line in part["lines"]}


def test_one_image_by_every_contender(little, monkeypatch, results):
    monkeypatch.setitem(WAYS, gpu_sampling.BLOCKS, WAYS[DIFFUSERS])  # under a tape Dynamo compiles nothing
    record_on_the_cpu(monkeypatch)  # tapes stand for CUDA graphs
    gpu_sampling.latency(results)
    lines, title = lines_of(results.file), "DiT-Little, 1 image"
    reasons = dict.fromkeys((gpu_sampling.BLOCKS, DIFFUSERS, DIFFUSERS_COMPILED), "no_such_package is not installed")
    reasons[gpu_sampling.FP8] = "fp8 exists on CUDA alone"
    for name in WAYS:
        line = lines[f"{title}, {name}"]
        assert line.get("why_not") == reasons.get(name), name
        if name in reasons:
            continue
        facts = line["facts"]
        assert line["reached"] == 1e3 * facts["seconds"]["median"] / facts["evaluations"]
        assert facts["evaluations"] == 2 * STEPS
        assert 0 < facts["error"] < 3e-2
        assert line["right"]
    reached = {name: lines[f"{title}, {name}"].get("reached") for name in WAYS}
    best = reached[GRAPH]
    for name in (EAGER, COMPILED, REFERENCE, FAST, GRAPH_AGAIN):
        ratio = lines[f"{title}, {name}, times as long"]["reached"]
        assert ratio == pytest.approx(reached[name] / best)


def test_decoded_images(little, monkeypatch, results):
    monkeypatch.setitem(WAYS, COMPILED, WAYS[DIFFUSERS])
    gpu_sampling.throughput(results)
    lines, title = lines_of(results.file), "DiT-Little, 2 images, decoded"
    for name in (EAGER, FAST):
        line = lines[f"{title}, {name}"]
        assert line["reached"] == pytest.approx(2 / line["facts"]["seconds"]["median"])
    assert f"{title}, {EAGER}, times as long" in lines
    assert lines[f"{title}, {GRAPH}"]["why_not"].startswith("a CUDA graph needs a CUDA device")


def test_what_decodes_gives_the_same_pictures():
    latents, found = lfm_fast.noise(2, (4, 8, 8), seed=3), {}
    for name in (FAST, EAGER):
        found[name] = gpu_sampling._decoder("narrow", name, torch.device("cpu"), smoke=True)(latents)
    assert found[FAST].shape == (2, 3, 16, 16)
    assert relative_error([found[FAST]], [found[EAGER]]) < 3e-2  # both in bfloat16


def test_a_sampler_of_other_latents_is_called_wrong(little, monkeypatch, results):
    real = lfm_fast.sample
    monkeypatch.setattr(lfm_fast, "sample", lambda *args, **kwargs: 1.1 * real(*args, **kwargs))
    told = {"network": "DiT-Little", "images": 2, "num_steps": STEPS, "decode": None, "fewest": 1, "smoke": True}
    wrong, right = gpu_sampling.measured(FAST, told), gpu_sampling.measured(EAGER, told)
    assert (wrong["right"], right["right"]) == (False, True)
    assert wrong["error"] == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("method", ["heun", "euler"])
def test_a_loop_by_hand_solves_as_torchdiffeq_does(little, method):
    """In float64, where rounding is 1e-13 after so few steps."""
    workload = GuidedSampling(3, 4, "bfloat16", method, "DiT-Little")
    z_0 = workload.by_hand(network("float64", "DiT-Little"), 4, workload.z_1.double())
    assert relative_error([z_0], workload.truth()) < 1e-12


def test_time_at_equal_error(little, monkeypatch, results):
    monkeypatch.setattr(solving, "TOLERANCE", 1e-1)  # few evaluations
    monkeypatch.setattr(solving, "ADAMS", 1e-1)
    monkeypatch.setattr(gpu_sampling, "AT_EQUAL_ERROR", {"method": "heun", "num_steps": 5})
    model = network("float32", "DiT-Little")
    monkeypatch.setattr(solving, "field", lambda name, dtype, device: (copy.deepcopy(model).to(dtype), 10, (4, 32, 32)))
    for cached in ("start", "solution"):
        monkeypatch.setattr(solving, cached, getattr(solving, cached).__wrapped__)
    gpu_sampling.equal_error(results)
    lines = lines_of(results.file)
    theirs = lines["2 samples, torchdiffeq dopri5 over torchdiffeq dopri5"]
    assert theirs["reached"] == 1.0
    for line in lines.values():
        assert ("more than theirs" in line["note"]) == any(
            line["facts"][key] > theirs["facts"][key] for key in ("error", "error_p90")
        )
    kept = lines[f"2 samples, torchdiffeq dopri5 over {FAST}, kept, float32"]
    assert kept["note"].endswith("10 evaluations")
    assert kept["reached"] == theirs["facts"]["seconds"]["median"] / kept["facts"]["seconds"]["median"]


@pytest.mark.parametrize("broken", ["ours", "theirs"])
def test_a_sampler_that_raises_leaves_the_others_their_lines(little, monkeypatch, results, broken):
    names = ("torchdiffeq dopri5", FAST, gpu_sampling.AGAIN)

    class AtEqualError:
        z_1 = y = model = null_label = None
        by_sample = {name: {"error": 0.1, "error_p90": 0.2} for name in names}
        nfe = dict.fromkeys(names, 8.0)

        def __init__(self, *_, **__):
            pass

        def contenders(self):
            failing = names[0] if broken == "theirs" else FAST
            call = {name: (lambda: 1 / 0) if name == failing else (lambda: None) for name in names}
            return {name: gpu_sampling.Contender(call[name], call[name]) for name in names}

    monkeypatch.setattr(gpu_sampling, "AtEqualError", AtEqualError)
    gpu_sampling.equal_error(results)
    lines = lines_of(results.file)
    assert {f"2 samples, {FAST}, kept, float32", f"2 samples, {FAST}, kept, fast network, bfloat16"} <= lines.keys()
    failing, other = (FAST, names[0]) if broken == "ours" else (names[0], FAST)
    assert lines[f"2 samples, {names[0]} over {failing}"]["why_not"] == "ZeroDivisionError: division by zero"
    told = f"2 samples, {names[0]} over {other}" if broken == "ours" else f"2 samples, {FAST}"
    assert lines[told]["unit"] == ("x" if broken == "ours" else "s")


def test_the_autoencoders_lines(monkeypatch, results):
    def measured(direction, *arguments, **options):
        rates = {FAST: 1000.0, gpu_sampling.FAST_COMPILED: 600.0, DIFFUSERS: 400.0, DIFFUSERS_COMPILED: 500.0}
        contenders = {name: {"images_per_second": rate, "error": 1e-3} for name, rate in rates.items()}
        contenders[DIFFUSERS_COMPILED]["error"] = 1.0
        failed = {autoencoders.TRITON: "RuntimeError: no kernel image"} if direction == "encode" else {}
        return {"title": direction, "largest_error": 3e-2, "contenders": contenders, "failed": failed}

    monkeypatch.setattr(autoencoders, "measured", measured)
    gpu_sampling.vae(results)
    lines = lines_of(results.file)
    assert [lines[f"{each}, {FAST}"]["met"] for each in ("encode", "decode")] == [False, True]  # of 1,200 and 550
    assert lines[f"encode, {DIFFUSERS}"]["wanted"] is None
    assert lines[f"encode, {DIFFUSERS_COMPILED}"]["right"] is False
    assert lines["decode, best over eager"]["reached"] == 2.5
    assert lines[f"encode, {autoencoders.TRITON}"]["why_not"] == "RuntimeError: no kernel image"


def test_an_autoencoder_that_raises_leaves_the_others(monkeypatch):
    real = autoencoders.run

    def run(found, direction, x):
        if "compile" in type(found.decode).__name__ or hasattr(found.decode, "_torchdynamo_orig_callable"):
            raise RuntimeError("Inductor fails\nat length")
        return real(found, direction, x)

    monkeypatch.setattr(autoencoders, "run", run)
    how = (2, 32, "float32", torch.device("cpu"), 1, "narrow")
    record = autoencoders.measured("decode", *how, backend="eager")
    assert list(record["failed"].values()) == ["RuntimeError: Inductor fails"]
    assert len(record["contenders"]) == 4
    assert not record["right"]
    assert "not run, RuntimeError: Inductor fails" in autoencoders.text(record)


def test_graphs_compiled_again_are_counted(little, monkeypatch, results):
    gpu_starting.recompilations(results)
    (line,) = lines_of(results.file).values()
    assert (line["reached"], line["right"], line["met"]) == (0, True, True)
    real = DiT.compile
    monkeypatch.setattr(DiT, "compile", lambda model, *args, **options: real(model, *args, dynamic=False, **options))
    gpu_starting.recompilations(results)
    line = list(lines_of(results.file).values())[-1]
    assert (line["reached"], line["met"]) == (2, False)  # one more for each other size
    monkeypatch.setattr(DiT, "compile", lambda model, *args, **options: None)
    torch.compiler.reset()
    gpu_starting.recompilations(results)
    assert list(lines_of(results.file).values())[-1]["right"] is False  # nothing was compiled, nothing seen


def test_starts_are_cold_once(little, monkeypatch, results):
    caches = []
    monkeypatch.setattr(gpu_starting, "run_fresh", lambda command, cache: caches.append((command[1:], cache)))
    gpu_starting.start(results)
    assert [line["wanted"] for line in lines_of(results.file).values()] == [15.0, 4.0, 15.0, 4.0]
    commands = [command for command, _ in caches]
    first = ("benchmarks.gpu_starting", "step", "DiT-Little")
    assert commands == [first, first, (first[0], "image", first[2]), (first[0], "image", first[2])]
    assert caches[0][1] == caches[1][1] != caches[2][1] == caches[3][1]


def test_a_start_that_fails_says_why(little, monkeypatch, results):
    def fails(command, cache):
        raise AssertionError("Traceback\nRuntimeError: no such device\n")

    monkeypatch.setattr(gpu_starting, "run_fresh", fails)
    gpu_starting.start(results)
    assert {line["why_not"] for line in lines_of(results.file).values()} == {"RuntimeError: no such device"}


@pytest.mark.parametrize("what", ["first_step", "first_image"])
def test_what_is_started_runs(little, what):
    getattr(gpu_starting, what)("DiT-Little")


def test_the_script_names_every_part():
    said = SCRIPT.read_text()
    assert " ".join(f"[{name}]" for name in gpu_sampling.PARTS) in said
    assert all(part.seconds + gpu_parts._GRACE <= 600 for part in gpu_sampling.PARTS.values())

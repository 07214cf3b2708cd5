"""The benchmarks measure what they say: exact answers, errors, memory, and a report that keeps its records' numbers."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lfm_fast
from benchmarks import conftest, feeding, latents, measure, names, plain, report
from benchmarks.networks import Forward, GuidedSampling, flow_match_scheduler
from benchmarks.solving import Mixture, Solving
from benchmarks.training import TrainingStep
from benchmarks.workloads import LARGEST_ERROR, Contender, OpWorkload, Workload, exact_normals, relative_error
from lfm_fast import cli, ops
from lfm_fast.models import NETWORKS, DiT

ROOT = Path(__file__).resolve().parents[1]


def contender(median, **facts):
    seconds = {"median": median, "low": 0.9 * median, "high": 1.1 * median, "least": 0.8 * median}
    ratio = {key: value / 2e-3 for key, value in seconds.items()}
    return {"seconds": seconds, "ratio": ratio, **facts}


RECORD = {
    "group": "ops", "title": "interpolate", "precision": "float32", "bytes": 6000, "flops": 600, "images": None,
    "note": "", "rounds": 7, "load_average": [0.5, 0.5], "not_run": {"torch.compile": "quick mode"},
    "noise": {"median": 1.01, "low": 0.99, "high": 1.03, "least": 0.98},
    "contenders": {"fast path": contender(2e-3, error=1.5e-7), "reference path": contender(8e-3, nfe=12)},
}  # fmt: skip
ABOUT = {
    "mode": "full", "versions": {"torch": "2"}, "device": "cpu", "cpu_capability": "AVX2", "cores": 2, "threads": 2,
    "load_average": [0.5, 0.5, 0.5],
    "ceilings": {"copy_bytes_per_second": 1e10, "gemm_flops_per_second": {"float32": 4e11}, "cache_bytes": 2**20},
}  # fmt: skip


def test_the_field_of_one_gaussian_is_solved_exactly():
    """From N(0, I) to N(mean, spread^2 I) the straight path's flow is z_0 = mean + spread z_1."""
    field = Mixture(torch.float64, components=1, spread=0.5)
    z_1 = lfm_fast.noise(3, Mixture.shape, dtype=torch.float64)
    z_0 = lfm_fast.sample(field, z_1, method="rk4", num_steps=100)
    assert relative_error([z_0], [field.means.view(1, *Mixture.shape) + 0.5 * z_1]) < 1e-7


def test_labels_choose_among_the_components():
    field, z = Mixture(torch.float64), lfm_fast.noise(2, Mixture.shape, dtype=torch.float64)
    t = torch.full((2,), 0.4, dtype=torch.float64)
    one, two = (field(t, z, torch.tensor([label, label])) for label in (0, 1))
    assert not torch.allclose(one, two)
    assert torch.equal(field(t, z), field(t, z, torch.tensor([Mixture.null_label] * 2)))


def test_exact_normals_are_those_of_the_op():
    index = torch.tensor([3, 2**40 + 1])
    exact, drawn = exact_normals(index, 1001, 9, 2, 4), ops.philox_normal(index, 1001, 9, 2, 4)
    assert 0 < relative_error([drawn], [exact]) < 2e-7


def test_an_op_passes_through_more_inputs_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr("benchmarks.workloads.working_set_bytes", lambda device: 5 * 2**20)
    workload = OpWorkload("interpolate", {"shape": (64, 4, 32, 32)})  # 2 MiB and a little of inputs
    seen = {next(workload.sets)[0].data_ptr() for _ in range(10)}
    assert len(seen) == 3
    assert relative_error(workload.result(), workload.truth()) < 1e-6


def test_relative_error_is_that_of_the_worst_tensor():
    got, want = [torch.ones(4), torch.tensor([3.0, 4.5])], [torch.ones(4).double(), torch.tensor([3.0, 4.0]).double()]
    assert relative_error(got, want) == pytest.approx(0.1)


def test_a_result_that_is_no_number_has_no_error_that_is_one():
    """Whichever tensor it is in."""
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    for got in ([good, bad], [bad, good]):
        assert not relative_error(got, [good.double()] * 2) <= 1e9


def test_peak_memory_and_operators_of_a_call():
    x = torch.ones(1024)
    peak, shares = measure.profiled(lambda: (x + 1) * 2)
    assert 2 * 4096 <= peak < 2 * 4096 + 64  # the numbers 1 and 2 are held as well
    assert shares["aten::add"] > 0
    assert shares["aten::mul"] > 0
    assert sum(shares.values()) == pytest.approx(1)


@pytest.fixture
def small(monkeypatch):
    """At their sizes a call takes long: a smaller network, the same workloads."""
    network = (DiT, {"hidden_size": 48, "depth": 2, "num_heads": 2, "patch_size": 4})
    monkeypatch.setitem(NETWORKS, "DiT-Small", network)
    monkeypatch.setattr("benchmarks.networks.NETWORK", "DiT-Small")
    monkeypatch.setattr("benchmarks.networks.flops", lambda *name: 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "make",
    [
        lambda precision: Forward(3, precision),
        lambda precision: TrainingStep(3, precision),
        lambda precision: GuidedSampling(2, 3, precision),
        lambda precision: GuidedSampling(2, 3, precision, "euler"),
    ],
    ids=["forward", "training", "heun", "euler"],
)
def test_networks_and_their_rivals_compute_the_same(small, make, precision):
    """Each contender within the bound that the gate sets; and twice, for what a step leaves behind."""
    workload = make(precision)
    contenders = workload.contenders()
    assert list(contenders)[0] == names.FAST
    assert {names.REFERENCE, names.EAGER, names.DIFFUSERS} <= set(contenders)
    for name, contender in contenders.items():
        with plain.forced(contender.backend):
            contender.call()
            if contender.result is not None:
                error = relative_error(contender.result(), workload.truth_of(name))
                assert 0 < error < LARGEST_ERROR[precision], name


def test_wrong_conditions_are_far_beyond_the_gate(small):
    """One sample's conditions applied to the whole batch, the mistake that a batch of one hides."""
    workload = Forward(3, "bfloat16")
    right = workload.contenders()[names.EAGER].result()
    workload.y, workload.t = workload.y[:1].repeat(3), workload.t[:1].repeat(3)
    wrong = workload.contenders()[names.EAGER].result()
    workload = Forward(3, "bfloat16")
    assert relative_error(right, workload.truth()) < LARGEST_ERROR["bfloat16"]
    assert relative_error(wrong, workload.truth()) > 2 * LARGEST_ERROR["bfloat16"]


class Doubling(Workload):
    """2 x, by a fast path that is right and another contender whose result is given."""

    images, rounds, measures_memory = 4, 2, False

    def __init__(self, other):
        self.x, self.other = torch.linspace(1, 2, 64), other

    def call(self):
        return self.x * 2

    def truth(self):
        return [self.x.double() * 2]

    def contenders(self):
        return {**super().contenders(), "other": Contender(lambda: self.x + self.x, lambda: [self.other(self.x)])}


class Pedantic:
    """What `compare` needs of pytest-benchmark's fixture."""

    group = "ops"

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, call, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            call()


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (lambda x: x + x, False),
        (lambda x: 2.00001 * x, False),
        (lambda x: 2.0001 * x, True),
        (lambda x: x * float("nan"), True),
    ],
    ids=["right", "rounded", "wrong", "not finite"],
)
def test_a_contender_that_is_wrong_fails_the_run(monkeypatch, other, wrong):
    """The error gate: 1e-5 in float32; the record is kept, so that the table shows it."""
    monkeypatch.setattr(measure, "records", [])
    failure = None
    try:
        measure.compare(Pedantic(), "doubling", Doubling(other), seconds=0.01, compiled="not here")
    except AssertionError as error:
        failure = str(error)
    assert (failure is not None) == wrong
    assert failure is None or ("other is off by" in failure and "fast path" not in failure)
    (record,) = measure.records
    assert record["contenders"]["other"]["images_per_second"] > 0
    assert record["not_run"] == {"torch.compile": "not here"}


def test_solvers_are_compared_at_equal_evaluations():
    workload = Solving("mixture", "heun", num_steps=6, batch_size=2, reference_steps=40)
    error = relative_error(workload.result(), workload.truth())
    ((name, (_, result)),) = workload.others().items()
    other = relative_error(result(), workload.truth())
    assert workload.nfe == {"fast path": 12, "reference path": 12, name: 12}
    assert error == pytest.approx(other, rel=0.05)  # the same method
    assert 1e-6 < error < 0.5
    assert error < workload.largest_error([error, other]) < 4 * error


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_diffusers_schedulers_take_the_same_grid(method):
    scheduler = flow_match_scheduler(method, 5)
    times = [float(t) / 1000 for t in scheduler.timesteps]
    grid = [1.0, 0.8, 0.6, 0.4, 0.2]
    expected = grid if method == "euler" else [1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2]  # and the last to 0: Euler
    assert times == pytest.approx(expected, abs=1e-6)
    assert float(scheduler.sigmas[-1]) == 0


def test_batches_for_training_are_exact(small, tmp_path, monkeypatch):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "notes"))
    monkeypatch.setattr(feeding.CacheFeeding, "num_items", 8)
    monkeypatch.setattr(feeding.FolderFeeding, "num_items", 12)
    for workload in (feeding.CacheFeeding(str(tmp_path / "a"), 2), feeding.FolderFeeding(str(tmp_path / "b"), 2)):
        assert 0 < relative_error(workload.result(), workload.truth()) < 1e-5  # float32 through the embedded VAE
        for contender in workload.contenders().values():
            with plain.forced(contender.backend):
                contender.call()
                contender.call()
        assert workload.facts("fast path", 1e-3)["share_of_step"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_in_memory_are_exact_however_they_are_made(small, dtype):
    workload = latents.ResidentFeeding(8, 4, dtype)
    for contender in workload.contenders().values():
        with plain.forced(contender.backend):
            contender.call()
            if contender.result is not None:
                assert 0 < relative_error(contender.result(), workload.truth()) < 1e-6
    assert workload.facts("fast path", 1e-3)["share_of_step"] > 0


def write_result(file):
    """A result file of three workloads, some of whose contenders lack this or that."""
    forward = {**RECORD, "group": "forward", "title": "forward, 4", "images": 4, "precision": "bfloat16", "not_run": {}}
    facts = {"images_per_second": 8.0, "flops_per_second": 1e9, "share_of_gemm": 0.2}
    forward["contenders"] = {
        "fast path": contender(2e-3, **facts, shares={"aten::mm": 0.7, "other": 0.3}, error=1e-3),
        "fast path, again": contender(2e-3, **facts),
        "diffusers": contender(5e-3, **facts),
    }
    larger = {**forward, "title": "forward, 16", "images": 16}
    op = {**RECORD, "contenders": {**RECORD["contenders"]}}
    op["contenders"]["fast path"] |= {"bytes_per_second": 1e9, "share_of_copy": 0.1}
    benchmarks = [
        {"group": r["group"], "extra_info": {k: v for k, v in r.items() if k != "group"}} for r in (op, forward, larger)
    ]
    file.write_text(json.dumps({"machine_info": {"lfm_fast": ABOUT}, "benchmarks": benchmarks}))


def test_report_shows_the_numbers_of_a_result_file(tmp_path, capsys, monkeypatch):
    write_result(file := tmp_path / "result.json")
    monkeypatch.setattr(sys, "argv", ["report", str(file)])
    report.main()
    shown = capsys.readouterr().out
    for text in (
        "interpolate: 7 rounds, noise 1.010",
        "not run: torch.compile: quick mode",
        "8.000",
        "4.00",
        "1.5e-07",
        "NFE 12",
        "8 images/s",
    ):
        assert text in shown
    assert "| reference path | 8.000 |" in report.text(ABOUT, [RECORD], markdown=True)
    assert "| forward, 4 | 2 ms | 2.50 x | 0.99 .. 1.03 |" in report.readme(report.read(file)[1])


def test_the_command_line_draws_results(tmp_path, capsys):
    write_result(tmp_path / "result.json")
    assert cli.main(["bench", "--report", str(tmp_path / "result.json"), "--output", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    pictures = sorted(path.name for path in (tmp_path / "docs" / "images").iterdir())
    assert pictures == [f"benchmark-{name}.png" for name in ("ceilings", "latency", "ratios", "shares", "throughput")]
    assert all(f"](images/{name})" in page for name in pictures)
    assert "| forward, 16 | 2 ms |" in page
    (tmp_path / "broken.json").write_text("{}")
    assert cli.main(["bench", "--report", str(tmp_path / "broken.json"), "--output", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--report", "x.json", "--mode", "quick"], "--report draws what was measured before"),
        (["--output", "/dev/null/x"], "cannot be written"),
    ],
)
def test_mistakes_of_the_command_line_are_one_sentence(arguments, says, capsys):
    assert cli.main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_an_installed_package_has_no_benchmarks(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.bench, "__file__", str(tmp_path / "lfm_fast" / "cli" / "bench.py"))
    assert cli.main(["bench"]) == 2
    assert "run this from a clone of the repository" in capsys.readouterr().err


def test_the_suite_has_the_groups_that_users_are_told():
    modules = [import_module(f"benchmarks.{path.stem}") for path in (ROOT / "benchmarks").glob("test_*.py")]
    tests = [test for module in modules for name, test in vars(module).items() if name.startswith("test_")]
    found = [mark.kwargs["group"] for test in tests for mark in test.pytestmark if mark.name == "benchmark"]
    assert len(found) == len(tests)
    assert set(found) == set(names.GROUPS) == set(cli.bench.GROUPS)


def test_a_group_can_be_run_alone():
    def item(group):
        return SimpleNamespace(get_closest_marker=lambda name: SimpleNamespace(kwargs={"group": group}))

    left_out = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    for chosen, kept in ((None, ["ops", "data", "forward"]), (["data", "forward"], ["data", "forward"])):
        config = SimpleNamespace(getoption=lambda name, chosen=chosen: chosen, hook=hook)
        items = [item(group) for group in ("ops", "data", "forward")]
        conftest.pytest_collection_modifyitems(config, items)
        assert [conftest._group(item) for item in items] == kept
    assert [conftest._group(item) for item in left_out] == ["ops"]

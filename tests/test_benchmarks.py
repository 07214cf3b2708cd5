"""The benchmarks measure what they say: exact answers, errors, memory, and a report that keeps its records' numbers."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lfm_fast
from benchmarks import measure, report
from benchmarks.networks import Forward, GuidedSampling, TrainingStep
from benchmarks.solving import Mixture, Solving
from benchmarks.workloads import OpWorkload, exact_normals, relative_error
from lfm_fast import ops
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
    monkeypatch.setattr("benchmarks.workloads.working_set_bytes", lambda: 5 * 2**20)
    workload = OpWorkload("interpolate", {"shape": (64, 4, 32, 32)})  # 2 MiB and a little of inputs
    seen = {next(workload.sets)[0].data_ptr() for _ in range(10)}
    assert len(seen) == 3
    assert relative_error(workload.result(), workload.truth()) < 1e-6


def test_relative_error_is_that_of_the_worst_tensor():
    got, want = [torch.ones(4), torch.tensor([3.0, 4.5])], [torch.ones(4).double(), torch.tensor([3.0, 4.0]).double()]
    assert relative_error(got, want) == pytest.approx(0.1)


def test_peak_memory_of_a_call():
    x = torch.ones(1024)
    assert 2 * 4096 <= measure.peak_bytes(lambda: (x + 1) * 2) < 2 * 4096 + 64  # the numbers 1 and 2 are held as well


def test_networks_compute_something(monkeypatch):
    """At their sizes a call takes long: a smaller network, the same workloads."""
    small = (DiT, {"hidden_size": 48, "depth": 2, "num_heads": 2, "patch_size": 4})
    monkeypatch.setitem(NETWORKS, "DiT-Small", small)
    monkeypatch.setattr("benchmarks.networks.NETWORK", "DiT-Small")
    workloads = [Forward(1, "float32"), TrainingStep(2, "float32"), GuidedSampling(1, 2, "bfloat16")]
    for workload, most in zip(workloads, (2e-6, 1e-5, 5e-2)):  # roundings of float32, of its gradients, of bfloat16
        workload.call()
        error = relative_error(workload.result(), workload.truth())
        assert 0 < error < most
        for _, result in workload.others().values():
            assert relative_error(result(), workload.truth()) < most
        with measure.forced(measure.PLAIN):
            assert 0 < relative_error(workload.result(), workload.truth()) < most


def test_solvers_are_compared_at_equal_evaluations():
    workload = Solving("mixture", "heun", num_steps=6, batch_size=2, reference_steps=40)
    error = relative_error(workload.result(), workload.truth())
    ((name, (_, result)),) = workload.others().items()
    other = relative_error(result(), workload.truth())
    assert workload.nfe == {"fast path": 12, "reference path": 12, name: 12}
    assert error == pytest.approx(other, rel=0.05)  # the same method
    assert math.isfinite(error)
    assert 1e-6 < error < 0.5


def test_report_shows_the_numbers_of_a_result_file(tmp_path):
    benchmarks = [{"group": "ops", "extra_info": {k: v for k, v in RECORD.items() if k != "group"}}]
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"machine_info": {"lfm_fast": ABOUT}, "benchmarks": benchmarks}))
    command = [sys.executable, "-m", "benchmarks.report", str(file), "--plot", str(tmp_path / "picture.png")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    for text in (
        "interpolate: 7 rounds, noise 1.010",
        "not run: torch.compile: quick mode",
        "8.000",
        "4.00",
        "1.5e-07",
        "NFE 12",
    ):
        assert text in shown.stdout
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert "| reference path | 8.000 |" in report.text(ABOUT, [RECORD], markdown=True)

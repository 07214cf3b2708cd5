"""The benchmarks of solvers: errors by sample, evaluations that were made, and a record that is drawn."""

import pytest
import torch

import lfm_fast
from benchmarks import accuracy, measure, names, plots, report
from benchmarks.solving import SCALE, AtEqualError, Mixture, Overhead, errors, field, solution, start
from benchmarks.workloads import relative_error
from lfm_fast.solvers import METHODS


class Pedantic:
    """What `sweep` needs of pytest-benchmark's fixture."""

    group = "solvers"

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, call, rounds, iterations):
        call()


def test_every_method_that_follows_the_flow_is_measured():
    flows = {name for name, solver in METHODS.items() if not solver.stochastic}
    assert {*names.FIXED, *names.ADAPTIVE} == flows
    assert {point.method for point in accuracy.points()} > flows


def test_as_many_steps_as_the_evaluations_allow():
    found = {p.setting for p in accuracy.points() if p.method == "ab3"}
    assert found == {f"x {n - 2}" for n in accuracy.EVALUATIONS}
    assert {f"x {n // 4}" for n in accuracy.EVALUATIONS} == {p.setting for p in accuracy.points() if p.method == "rk4"}


def test_heun_has_the_evaluations_that_others_are_to_halve():
    found = accuracy.against_heun()
    assert {p.setting for p in found if p.method == "heun"} == {f"x {n // 2}" for n in accuracy.HEUN}
    assert max(accuracy.HEUN) >= 2 * max(accuracy.MULTISTEP)
    (longest, *_) = (p for p in found if p.method == "abm5, logit" and p.setting == "x 60")
    assert longest.arguments == {"method": "abm5", "num_steps": 60, "time_grid": "logit"}


def test_a_record_holds_the_errors_of_each_method(monkeypatch):
    monkeypatch.setattr(measure, "records", [])
    truth, note = solution("mixture", 3, 60)
    reuse = lfm_fast.approximations.Reuse(SCALE, 0.05)
    chosen = [
        accuracy.Point("heun", "x 6", {"method": "heun", "num_steps": 6}),
        accuracy.Point("dopri5", "0.01", {"method": "dopri5", "atol": 1e-2, "rtol": 1e-2}),
        accuracy.Point("reuse", "0.05", {"method": "euler", "num_steps": 40, "guidance": reuse}),
    ]
    benchmark = Pedantic()
    accuracy.sweep(benchmark, "mixture", chosen, "mixture", truth[:2], note)
    (record,) = measure.records
    assert record["points"] == benchmark.extra_info["points"]
    model, null_label, _ = field("mixture", torch.float32)
    z_1, y = start("mixture", 2)
    known = {"y": y, "null_label": null_label, "return_stats": True}
    for point, found in zip(chosen, record["points"]):
        guided = {} if "guidance" in point.arguments else {"guidance_scale": SCALE}
        z_0, stats = lfm_fast.sample(model, z_1, **known, **guided, **point.arguments)
        error = (z_0.double() - truth[:2]).flatten(1).norm(dim=1) / truth[:2].flatten(1).norm(dim=1)
        assert found["error"] == pytest.approx(float(error.median()))
        assert found["error_p90"] == pytest.approx(float(error.quantile(0.9)))
        assert found["nfe"] == pytest.approx(float(stats.forwards.double().mean()) / 2)
    assert record["points"][0]["nfe"] == 12
    assert record["points"][2]["nfe"] < 40


def test_a_method_that_solves_something_else_fails_the_run(monkeypatch):
    monkeypatch.setattr(measure, "records", [])
    truth, _ = solution("mixture", 3, 60)
    chosen = [accuracy.Point("heun", "x 6", {"method": "heun", "num_steps": 6})]
    with pytest.raises(AssertionError, match="heun is off by"):
        accuracy.sweep(Pedantic(), "mixture", chosen, "mixture", -truth, "")
    assert len(measure.records) == 1, "it is recorded, so that the table shows it"


def test_evaluations_at_an_error_are_read_off_a_curve():
    points = [{"method": "a", "nfe": n, "error": n**-2.0} for n in (8, 2, 4)] + [{"method": "b", "nfe": 1, "error": 1}]
    assert accuracy.evaluations_at(points, "a", 1 / 25) == pytest.approx(5)
    assert accuracy.evaluations_at(points, "a", 1e-3) is None
    assert accuracy.evaluations_at(points, "b", 0.5) is None


def curve():
    found = [
        {"method": m, "setting": f"x {n}", "nfe": float(n), "error": 1 / n, "error_p90": 2 / n, "seconds": 0.1}
        for m in ("heun", "dopri5", "torchdiffeq:dopri5")
        for n in (8, 16, 32, 64)
    ]
    return {
        "group": "solvers",
        "title": "mixture, x",
        "images": 4,
        "note": "4 samples",
        "contenders": {},
        "points": found,
    }


def test_a_curve_is_a_table_and_a_picture(tmp_path):
    record = curve()
    about = {
        "mode": "full", "versions": {}, "cpu_capability": "AVX2", "cores": 2, "threads": 2, "load_average": [0.1],
        "ceilings": {"copy_bytes_per_second": 1e10, "gemm_flops_per_second": {}, "cache_bytes": 2**20},
    }  # fmt: skip
    page = report.text(about, [record], markdown=True)
    assert "| heun | x 16 | 16.0 | 6.2e-02 | 1.2e-01 | 0.10 |" in page
    assert "**mixture, x**: 4 samples" in page
    assert [path.name for path in plots.draw([record], tmp_path)] == ["benchmark-solvers.png"]
    few = {**record, "points": record["points"][:4]}
    assert plots.draw([few], tmp_path) == {}


def test_a_race_at_equal_error_tells_each_sides_errors_by_sample():
    ours = {"method": "rk4", "num_steps": 30}
    workload = AtEqualError("mixture", ours, batch_size=3, reference_steps=100, rounds=1)
    contenders = workload.contenders()
    assert list(contenders) == [names.FAST, names.AGAIN, "adams, by sample", "dopri5, by sample", "torchdiffeq dopri5"]
    for name, contender in contenders.items():
        contender.call()
        if contender.result is not None:
            (z_0,) = contender.result()
            facts = workload.facts(name, 1.0)
            assert facts["error_by_sample"] == pytest.approx(float(errors(z_0, workload.truth()[0]).median()))
            assert relative_error([z_0], workload.truth()) < 1e-3
    assert workload.nfe[names.FAST] == 120
    assert workload.nfe["torchdiffeq dopri5"] > 20
    workload.check()
    workload.by_sample[names.FAST]["error_p90"] = 2 * workload.by_sample["torchdiffeq dopri5"]["error_p90"]
    with pytest.raises(AssertionError, match="errors by sample"):
        workload.check()


@pytest.mark.parametrize("method", ["euler", "ab3"])
def test_the_overhead_is_that_of_solves_that_are_right(method):
    workload = Overhead(method, 20)
    for contender in workload.contenders().values():
        if contender.result is not None:
            assert relative_error(contender.result(), workload.truth()) < workload.largest_error([])
    evaluations = {"euler": 20, "ab3": 22}[method]
    assert workload.facts(names.FAST, 1e-3)["microseconds_per_evaluation"] == pytest.approx(1e3 / evaluations)


def test_the_solution_is_of_the_first_samples_whatever_the_batch():
    few, many = solution("mixture", 2, 40)[0], solution("mixture", 3, 40)[0]
    torch.testing.assert_close(few, many[:2], rtol=1e-9, atol=1e-9)
    assert few.shape == (2, *Mixture.shape)

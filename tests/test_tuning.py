"""Fitted times: as good as a search through all of them, on noise of its own, and written with what they came from."""

import json
from itertools import pairwise

import pytest
import torch

import lfm_fast
from lfm_fast.cli import main
from lfm_fast.flow.paths import VarianceExploding, describe
from lfm_fast.solvers.grids import time_grid

SHAPE = (4,)


def late(t, z, y=None):
    """Little happens near noise, much near data; nonlinear, so that samples differ."""
    rate = 3.0 if y is None else 1.0 + y
    return -(rate * (1 - t) ** 2)[:, None] * (2 * z).sin()


def fine(count, seed, labels=(), path=None):
    """(arguments of sample, its solution by 200 steps of RK4), in float64."""
    path = lfm_fast.paths.Linear() if path is None else path
    z_1 = path.prior(lfm_fast.noise(count, SHAPE, seed=seed).double())
    y = torch.tensor(labels)[torch.arange(count) % len(labels)] if labels else None
    known = {"model": late, "z1": z_1, "y": y, "path": path}
    return known, lfm_fast.sample(**known, method="rk4", num_steps=200)


def distances(problem, times, method):
    """Each sample's relative distance from the solution."""
    known, solution = problem
    got = lfm_fast.sample(**known, method=method, time_grid=times)
    return (got - solution).norm(dim=1) / solution.norm(dim=1)


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_one_free_time_is_where_a_search_finds_it(method):
    fit = {"num_samples": 16, "num_held_out": 1, "seed": 3, "rounds": 20, "fine_steps": 100}
    tuned = lfm_fast.tune_grid(late, SHAPE, method=method, num_steps=2, **fit).times
    problem = fine(16, 3)

    def cost(middle):
        return float(distances(problem, [1.0, middle, 0.0], method).log().mean().exp())

    best = min(torch.linspace(0.01, 0.99, 99).tolist(), key=cost)
    assert tuned[1] == pytest.approx(best, abs=0.02)  # the search's own step, and differences over 5 % of a step
    assert cost(tuned[1]) <= 1.01 * cost(best)
    assert cost(tuned[1]) < 0.9 * cost(0.5)
    assert tuned[::2] == [1.0, 0.0]


@pytest.mark.parametrize("path", [lfm_fast.paths.Linear(), VarianceExploding(0.01, 3.0)], ids=["straight", "exploding"])
def test_what_is_reported_is_what_the_times_do_on_other_noise(path):
    labels = [0, 2]
    grid = lfm_fast.tune_grid(
        late, SHAPE, method="heun", num_steps=4, labels=labels, num_samples=6, num_held_out=9, seed=5, path=path,
        fine_steps=200,
    )  # fmt: skip
    assert all(after < before for before, after in pairwise(grid.times))
    assert (grid.times[0], grid.times[-1]) == (path.t_max, path.t_min)
    uniform = torch.linspace(path.t_max, path.t_min, 5, dtype=torch.float64)
    for reported, seed, count in ((grid.fitted, 5, 6), (grid.held_out, 6, 9)):
        assert (reported["seed"], reported["samples"]) == (seed, count)
        problem = fine(count, seed, labels, path)
        for name, times in (("uniform", uniform), ("tuned", grid.times)):
            error = distances(problem, times, "heun")
            expected = {"mean": error.mean(), "median": error.median(), "p90": error.quantile(0.9)}
            assert reported[name] == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-2)  # float32
    assert grid.held_out["tuned"]["mean"] < 0.7 * grid.held_out["uniform"]["mean"]
    assert grid.fine["half_as_many_differ_by"]["p90"] < 1e-5


def test_no_grid_that_was_tried_is_better_on_the_noise_of_the_fit():
    grid = lfm_fast.tune_grid(late, SHAPE, method="euler", num_steps=3, num_samples=5, num_held_out=1, rounds=0)
    problem = fine(5, 0)
    for kind in ("uniform", ("shift", 0.5), ("shift", 4.0)):
        tuned, other = (distances(problem, t, "euler").log().sum() for t in (grid.times, time_grid(kind, 3)))
        assert tuned <= other + 1e-3


def test_a_field_without_curvature_keeps_uniform_times():
    """Every grid is exact there, so there is nothing to gain and nothing to divide by."""
    grid = lfm_fast.tune_grid(lambda t, z: torch.ones_like(z), SHAPE, method="euler", num_steps=3, num_samples=2)
    assert grid.held_out["tuned"]["mean"] < 1e-5  # rounding of float32
    assert all(after < before for before, after in pairwise(grid.times))


def test_the_file_is_a_time_grid_with_its_origin(tmp_path):
    grid = lfm_fast.tune_grid(late, SHAPE, num_steps=3, num_samples=2, num_held_out=2, guidance_scale=1.0)
    grid.save(tmp_path / "times.json", model="late")
    z_1 = lfm_fast.noise(2, SHAPE, seed=9)
    by_file = lfm_fast.sample(late, z_1, method="heun", time_grid=tmp_path / "times.json")
    assert torch.equal(by_file, lfm_fast.sample(late, z_1, method="heun", time_grid=grid.times))
    content = json.loads((tmp_path / "times.json").read_text())
    assert content["model"] == "late"
    assert content["settings"] == {
        "method": "heun", "num_steps": 3, "labels": None, "path": {"name": "linear", "sigma_min": 0.0},
        "guidance_scale": 1.0,
    }  # fmt: skip
    assert (content["fitted"], content["held_out"]) == (grid.fitted, grid.held_out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "dopri5"}, "chooses its own steps"),
        ({"method": "sde_heun"}, "draws noise of its own"),
        ({"method": "torchdiffeq:fixed_adams"}, "needs equidistant times"),
        ({"method": "newton"}, "method is 'newton'"),
        ({"num_steps": 1}, "num_steps is 1, expected a whole number from 2 on"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"rounds": True}, "rounds is True"),
        ({"t_start": 0.5}, "t_start is not for tune_grid"),
        ({"guidance_scale": 2.0}, "no labels y to be guided by"),
    ],
)
def test_mistakes_are_said_before_the_model_is_called(arguments, says):
    def untouched(t, z, y=None):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=says):
        lfm_fast.tune_grid(untouched, SHAPE, **arguments)


def test_the_command_fits_the_embedded_flow_and_sample_takes_its_file(tmp_path, capsys):
    file, fit = tmp_path / "times.json", ["--num-samples", "2", "--num-held-out", "2", "--rounds", "1"]
    arguments = ["tune-grid", "--method", "euler", "--num-steps", "3", "--fine-steps", "4", *fit]
    assert main([*arguments, "--output", str(file)]) == 0
    said = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["model"] == "embedded"
    assert content["settings"]["labels"] == list(range(9))
    assert content["settings"]["guidance_scale"] == 2.0
    assert f"mean {content['held_out']['uniform']['mean']:.2e} -> {content['held_out']['tuned']['mean']:.2e}" in said
    picture = ["--num-images", "1", "--class", "Flags", "--method", "euler", "--output", str(tmp_path / "a.png")]
    assert main(["sample", "--time-grid", str(file), *picture]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--output", "times.txt"], "must end in .json"),
        (["--output", "/dev/null/times.json"], "cannot be written"),
        (["--model", "nowhere.pth"], "there is no file nowhere.pth"),
        (["--class", "Nothing"], "there is no class 'Nothing'"),
        (["--method", "dopri5"], "chooses its own steps"),
    ],
)
def test_mistakes_of_the_command_are_one_sentence(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["tune-grid", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_path_is_the_one_that_the_model_says():
    class Model:
        path = lfm_fast.paths.VariancePreserving()

        def __call__(self, t, z, y=None):
            return z

    settings = {"method": "euler", "num_steps": 2, "num_samples": 2, "num_held_out": 2, "rounds": 0, "fine_steps": 2}
    grid = lfm_fast.tune_grid(Model(), (3,), **settings)
    assert grid.times[-1] == Model.path.t_min
    assert grid.settings["path"] == describe(Model.path)

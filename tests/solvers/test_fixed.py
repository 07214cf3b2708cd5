"""Fixed-step Runge-Kutta: order, evaluations, one fused step per stage, agreement with torchdiffeq."""

import math
from itertools import pairwise

import pytest
import torch
from problems import PROBLEMS, Counting
from torchdiffeq import odeint

from lfm_fast.flow.paths import Linear
from lfm_fast.ops.guided_step import GuidedSteps
from lfm_fast.solvers import METHODS, Settings, fixed, get_solver, tableaus
from lfm_fast.solvers.grids import time_grid

STOCHASTIC = ("euler_maruyama", "sde_heun")
FIXED = [name for name, row in METHODS.items() if row.evaluations and name not in STOCHASTIC]
SETTINGS = Settings(path=Linear())
each_method = pytest.mark.parametrize("method", FIXED)
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
each_direction = pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.9, 0.3)])
PREDICTING = ("dpmpp_2m", "unipc")  # their steps from alpha = 0 and to sigma = 0 are of first order


def solve(method, problem, times, **settings):
    field = Counting(problem.velocity)
    return get_solver(method).integrate(field, problem.start, times, Settings(path=Linear(), **settings)), field


@pytest.mark.parametrize(
    ("method", "start", "end"),
    [
        (method, start, end)
        for method in FIXED
        for start, end in (((0.9, 0.1), (0.1, 0.9)) if method in PREDICTING else ((1.0, 0.0), (0.0, 1.0)))
    ],
)
@each_problem
def test_observed_order(method, problem, start, end):
    exact = problem.exact(problem.start, start, end)
    errors = []
    for num_steps in (80, 160):
        solution, _ = solve(method, problem, time_grid(None, num_steps, start, end))
        errors.append(float((solution.z - exact).abs().max()))
    order = math.log2(errors[0] / errors[1])
    # the next term of the error series is smaller by a few dt: a quarter of an order at dt = 1/40
    assert order == pytest.approx(METHODS[method].order, abs=0.25), errors
    assert errors[1] < 0.1 * float(exact.abs().max())


@each_method
def test_order_holds_on_an_uneven_grid(method):
    problem, (start, end) = PROBLEMS[2], (0.9, 0.1) if method in PREDICTING else (1.0, 0.0)
    exact = problem.exact(problem.start, start, end)
    errors = []
    for num_steps in (80, 160):
        solution, _ = solve(method, problem, time_grid(("shift", 3.0), num_steps, start, end))
        errors.append(float((solution.z - exact).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(METHODS[method].order, abs=0.25), errors


EVALUATIONS = {"euler": 7, "midpoint": 14, "heun": 14, "rk4": 28, "ab2": 8, "ab3": 9, "dpmpp_2m": 7, "unipc": 7}
EVALUATIONS |= {"abm5": 7, "euler_maruyama": 7, "sde_heun": 14}


@pytest.mark.parametrize("method", EVALUATIONS)
def test_evaluations_of_seven_steps_each_with_one_fused_step(method, monkeypatch):
    steps = []

    class Counted(GuidedSteps):
        def __call__(self, *args):
            steps.append(args)
            return super().__call__(*args)

    monkeypatch.setattr(fixed, "GuidedSteps", Counted)
    solution, field = solve(method, PROBLEMS[0], time_grid(None, 7))
    assert field.nfe == len(steps) == METHODS[method].evaluations(7) == EVALUATIONS[method]
    assert solution.nfe.tolist() == [EVALUATIONS[method]] * 3


@pytest.mark.parametrize(("method", "first"), [("ab2", 2), ("ab3", 2)])
def test_one_step_alone_is_one_of_heun(method, first):
    solution, field = solve(method, PROBLEMS[1], [1.0, 0.8])
    assert field.nfe == METHODS[method].evaluations(1) == first
    assert torch.equal(solution.z, solve("heun", PROBLEMS[1], [1.0, 0.8])[0].z)


@pytest.mark.parametrize(
    "tableau", [tableaus.EULER, tableaus.MIDPOINT, tableaus.HEUN, tableaus.RK4], ids=lambda t: f"order {t.order}"
)
def test_tableaus_are_consistent(tableau):
    assert sum(tableau.b) == pytest.approx(1)
    for i, (row, c) in enumerate(zip(tableau.a, tableau.c)):
        assert len(row) == i
        assert sum(row) == pytest.approx(c)


@pytest.mark.parametrize(("method", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2")])
@each_problem
@each_direction
def test_agrees_with_torchdiffeq_to_rounding(method, theirs, problem, start, end):
    times = time_grid(None, 16, start, end)
    solution, _ = solve(method, problem, times, trajectory=True)
    expected = odeint(
        lambda t, z: problem.velocity(t.expand(3), z),
        problem.start,
        torch.tensor(times, dtype=torch.float64),
        method=theirs,
    )
    assert len(solution.states) == 17
    # 16 steps of a few float64 roundings of values up to 8
    torch.testing.assert_close(torch.stack(solution.states), expected, rtol=1e-13, atol=1e-13)


def test_rk4_is_the_classical_one():
    """One step on z' = t z by hand; torchdiffeq's 3/8 rule differs in the sixth digit."""
    z, h = torch.tensor([[1.0, 1.0]], dtype=torch.float64), -1.0
    k1 = 1.0 * 1.0
    k2 = 0.5 * (1 + h / 2 * k1)
    k3 = 0.5 * (1 + h / 2 * k2)
    k4 = 0.0
    expected = 1 + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    field = Counting(lambda t, z: t[:, None] * z)
    solution = get_solver("rk4").integrate(field, z, [1.0, 0.0], SETTINGS)
    assert solution.z[0, 0].item() == pytest.approx(expected, rel=1e-15)
    assert [t.item() for t in field.times] == [1.0, 0.5, 0.5, 0.0]


@each_method
def test_the_last_time_is_hit_exactly_in_float32(method):
    field = Counting(lambda t, z: z * t[:, None])
    get_solver(method).integrate(field, torch.ones(2, 3), time_grid(None, 30), SETTINGS)
    assert min(float(t.min()) for t in field.times) >= 0.0
    if method in ("heun", "rk4"):
        assert field.times[-1].tolist() == [0.0, 0.0]


@each_method
def test_guidance_is_blended_per_sample(method):
    """z' = scale a z + (1 - scale) b z, one scale per sample, against the same field blended beforehand."""
    scale, z, times = torch.tensor([1.0, 2.5, -1.0], dtype=torch.float64), PROBLEMS[0].start, time_grid(None, 9)

    def apart(t, z):
        return torch.sin(z), torch.cos(z), scale

    def together(t, z):
        return scale[:, None] * torch.sin(z) + (1 - scale[:, None]) * torch.cos(z), None, None

    ours, expected = (get_solver(method).integrate(field, z, times, SETTINGS).z for field in (apart, together))
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


@each_method
def test_callback_and_trajectory_see_every_step_and_the_start_is_untouched(method):
    seen, problem = [], PROBLEMS[1]
    start = problem.start.clone()
    solution, _ = solve(method, problem, time_grid(None, 4), trajectory=True, on_step=lambda *step: seen.append(step))
    assert [(step, t) for step, t, _ in seen] == [(1, 0.75), (2, 0.5), (3, 0.25), (4, 0.0)]
    assert torch.equal(problem.start, start)
    assert torch.equal(solution.states[0], start)
    for (_, _, z), state in zip(seen, solution.states[1:]):
        assert torch.equal(z, state)
    assert torch.equal(solution.z, solution.states[-1])
    told = (solution.accepted, solution.rejected, solution.reached, solution.time)
    assert [x.unique().item() for x in told] == [4, 0, True, 0.0]


@each_method
def test_the_host_time_is_offered_to_a_field_that_wants_it(method):
    class Field(Counting):
        def at(self, time):
            self.announced = [*getattr(self, "announced", []), time]
            return self

    field = Field(lambda t, z: z)
    get_solver(method).integrate(field, PROBLEMS[0].start, time_grid(None, 5), SETTINGS)
    assert field.announced == [t[0].item() for t in field.times]


@pytest.mark.parametrize(("method", "distinct"), [("heun", 1), ("rk4", 2), ("ab3", 1), ("sde_heun", 1)])
def test_where_two_steps_meet_their_times_are_one_number(method, distinct):
    """So what a model prepares for a time serves both; t + (t' - t) would not always be t'."""
    field = Counting(lambda t, z: z)
    times = [0.9, 0.7, 0.1, 0.003, 1e-5]
    assert any(before + (after - before) != after for before, after in pairwise(times))
    get_solver(method).integrate(field, PROBLEMS[0].start, times, SETTINGS)
    assert len({t[0].item() for t in field.times}) <= 4 * distinct + 1


def test_an_unknown_method_lists_what_there_is():
    for name in ("unipic", "torchdiffeq:tsit5", "heun2", None):
        with pytest.raises(
            ValueError, match=r"there are euler, midpoint, heun, rk4, ab2.*dopri5.*torchdiffeq:NAME.*heun3"
        ):
            get_solver(name)

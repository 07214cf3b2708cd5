"""Adams, Bashforth and Moulton's pair against the same written out in NumPy, textbooks' weights, and polynomials."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import PROBLEMS, Counting

from lfm_fast.flow.paths import Linear, VariancePreserving
from lfm_fast.solvers import AdamsBashforthMoulton, Settings, get_solver, multistep, schedule
from lfm_fast.solvers.grids import time_grid

ORDERS = (2, 3, 4, 5)
GRIDS = {
    "even": time_grid(None, 11),
    "uneven": [1.0, 0.93, 0.85, 0.76, 0.68, 0.58, 0.48, 0.37, 0.27, 0.18, 0.08, 0.0],
    "upwards": time_grid(("logit", 1.0), 11, 0.0, 1.0),
}
Z = torch.tensor([[1.0, -0.5], [0.2, 2.0], [-1.0, 0.3]], dtype=torch.float64)


def velocity(t, z):
    return torch.sin(2 * z) + z.flip(1) * torch.cos(3 * t)[:, None]


def solve(formula, times, field=velocity, z=Z, **settings):
    field = Counting(field)
    return get_solver(formula).integrate(field, z, times, Settings(path=Linear(), **settings)), field.nfe


def integral(nodes, values, start, end):
    """Of the polynomial through the values; its coefficients, about `end`, from the Vandermonde system."""
    x = np.array(nodes) - end
    coefficients = np.linalg.solve(np.vander(x, increasing=True), np.array([v.flatten() for v in values]))
    powers = np.arange(1, len(x) + 1)
    return (-((start - end) ** powers) / powers @ coefficients).reshape(values[0].shape)


def pair_by_hand(order, times):
    """Predict, evaluate, correct, and evaluate no more."""
    z, found = Z.numpy(), []  # found: (time, velocity) of the predicted states, newest first
    for n, (start, end) in enumerate(pairwise(times)):
        if n == 0:
            predicted = z
        t = torch.full((3,), start, dtype=torch.float64)
        found = [(start, velocity(t, torch.tensor(predicted)).numpy()), *found]
        if n > 0:
            corrected = found[: min(order, n) + 1]
            z = z + integral(*zip(*corrected), times[n - 1], start)
        predicted = z + integral(*zip(*found[:order]), start, end)
    return torch.tensor(predicted)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_steps_are_those_of_the_pair_written_out(order, grid):
    solution, evaluations = solve(AdamsBashforthMoulton(order), GRIDS[grid])
    assert evaluations == 11
    # 11 steps of roundings of 1e-16, times the condition of a 6 x 6 Vandermonde system of steps of 0.05: 1e4
    torch.testing.assert_close(solution.z, pair_by_hand(order, GRIDS[grid]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("order", "predict", "correct", "denominator"),
    [
        (2, (3, -1), (5, 8, -1), (2, 12)),
        (3, (23, -16, 5), (9, 19, -5, 1), (12, 24)),
        (4, (55, -59, 37, -9), (251, 646, -264, 106, -19), (24, 720)),
        (5, (1901, -2774, 2616, -1274, 251), (475, 1427, -798, 482, -173, 27), (720, 1440)),
    ],
)
def test_weights_on_an_even_grid_are_those_of_the_textbooks(order, predict, correct, denominator):
    """Hairer, Norsett, Wanner, III.1: a move adds the new prediction and takes back what the last one had wrong."""
    dt, n = -0.1, 8
    weights = AdamsBashforthMoulton(order).schedule(time_grid(None, 10), Linear())[n].target.weights
    ahead, behind = ([*(dt * w / d for w in row), 0, 0] for row, d in zip((predict, correct), denominator))
    assert weights.pop(("point", n)) == 1.0
    assert set(weights) == {("velocity", n - k) for k in range(order + 1)}
    for k in range(order + 1):
        expected = ahead[k] + behind[k] - (ahead[k - 1] if k else 0)
        assert weights["velocity", n - k] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_polynomials_below_its_order_are_exact_after_the_start(order):
    times, start = GRIDS["uneven"], torch.zeros(1, 1, dtype=torch.float64)
    for m in range(order + 1):
        formula = AdamsBashforthMoulton(order)
        solution, _ = solve(formula, times, lambda t, z, m=m: t[:, None] ** m, start, trajectory=True)
        states = torch.stack(solution.states)[order + 1 :, 0, 0]
        exact = torch.tensor(times, dtype=torch.float64)[order + 1 :] ** (m + 1) / (m + 1)
        close = torch.allclose(states - states[0], exact - exact[0], rtol=0, atol=1e-13)
        assert close == (m < order), m


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_first_step_limits_the_order_to_three(order, problem):
    exact = problem.exact(problem.start, 1.0, 0.0)
    errors = [
        float((solve(AdamsBashforthMoulton(order), time_grid(None, n), problem.velocity, problem.start)[0].z - exact)
              .abs().max()) for n in (80, 160)
    ]  # fmt: skip
    assert np.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.25), errors


def test_more_velocities_leave_less_of_an_error_where_the_start_is_dense():
    """dz/dt = z cos(9 t): what is left at the end of 40 steps, z exp((sin(9 t) - sin 9) / 9) being the solution."""

    def field(t, z):
        return z * torch.cos(9 * t)[:, None]

    exact = Z * np.exp((np.sin(0.0) - np.sin(9.0)) / 9)
    errors = [
        float((solve(formula, time_grid("logit", 40), field)[0].z - exact).abs().max())
        for formula in ("ab3", AdamsBashforthMoulton(3), AdamsBashforthMoulton(5))
    ]
    assert errors[2] < 0.5 * errors[1] < 0.25 * errors[0], errors


def test_a_step_much_longer_than_the_one_before_begins_anew():
    times = [1.0, 0.99, 0.98, 0.97, 0.6, 0.3, 0.0]
    moves = AdamsBashforthMoulton(5).schedule(times, Linear())
    assert set(moves[3].target.weights) == {("point", 3), *(("velocity", j) for j in range(4))}  # the correction's
    assert moves[3].target.weights["velocity", 0] != 0
    # from 0.6 on: the long step corrected by its two ends, and a straight line drawn on
    assert set(moves[4].target.weights) == {("point", 4), ("velocity", 3), ("velocity", 4)}
    assert set(moves[5].target.weights) == {("point", 5), *(("velocity", j) for j in (3, 4, 5))}


def test_a_curve_is_not_drawn_on_over_a_step_that_is_far_too_long_for_it(monkeypatch):
    times = [1.0, 0.99, 0.98, 0.97, 0.96, *time_grid(None, 16, 0.95, 0.0)]  # a jump from 0.01 to 0.06
    fine, errors = solve("rk4", time_grid(None, 200))[0].z, []
    for most in (multistep._MOST_WEIGHT, float("inf")):
        monkeypatch.setattr(multistep, "_MOST_WEIGHT", most)
        schedule._remembered.cache_clear()
        errors.append(float((solve(AdamsBashforthMoulton(), times)[0].z - fine).abs().max()))
    schedule._remembered.cache_clear()
    assert errors[0] < 0.2 * errors[1], errors


def test_the_path_has_no_say():
    formula = AdamsBashforthMoulton()
    first, second = (
        [move.target.weights for move in formula.schedule([0.9, 0.5, 0.4, 0.1], path)]
        for path in (Linear(), VariancePreserving())
    )
    assert first == second


@pytest.mark.parametrize("order", [1, 6, 2.5, 3.0, None])
def test_orders_that_there_are_not(order):
    with pytest.raises(ValueError, match="expected 2, 3, 4 or 5"):
        AdamsBashforthMoulton(order)

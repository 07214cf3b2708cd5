"""The adaptive Adams pair: its weights, its steps written out again by hand, its order, and what it costs."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from problems import PROBLEMS, Counting

from lfm_fast.solvers import Settings, adams, get_solver
from lfm_fast.solvers.adams import integral_weights
from lfm_fast.solvers.grids import time_grid

each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


def solve(name, problem, times, **settings):
    field = Counting(problem.velocity)
    return get_solver(name).integrate(field, problem.start, times, Settings(**settings)), field


def histories(rows, count, seed=0):
    """Steps that vary threefold, as nodes (rows, count) newest first, start and end."""
    times = 1 - np.random.default_rng(seed).uniform(0.02, 0.06, (rows, count + 1)).cumsum(1)
    return times[:, -2::-1].copy(), times[:, -2].copy(), times[:, -1].copy()


@pytest.mark.parametrize("count", range(1, 7))
def test_weights_integrate_every_polynomial_through_so_many_velocities(count):
    nodes, start, end = histories(9, count)
    weights = integral_weights(nodes, start, end)
    for degree in range(count + 1):
        found = (weights * nodes**degree).sum(1)
        exact = (end ** (degree + 1) - start ** (degree + 1)) / (degree + 1)
        # weights of up to 2 in sums of 6; the next degree is missed by the formula's error, of 0.02^7 at least
        assert np.allclose(found, exact, rtol=0, atol=1e-14) == (degree < count), degree


def test_weights_of_a_row_do_not_hang_on_the_others_to_the_last_bit():
    nodes, start, end = histories(37, 6)
    whole = integral_weights(nodes, start, end)
    for rows in (slice(0, 1), slice(5, 8), slice(20, 37, 3)):
        assert np.array_equal(whole[rows], integral_weights(nodes[rows], start[rows], end[rows]))


def by_hand(problem, number, start, steps):
    """z after steps [(end, accepted)] of one sample: polynomials fitted with numpy, and no ring of slots."""

    def velocity(t, z):
        whole = problem.start.clone()
        whole[number] = torch.from_numpy(z)
        return problem.velocity(torch.full((3,), t, dtype=torch.float64), whole)[number].numpy()

    def integral(known, start, end):
        times, values = zip(*known)
        total = [Polynomial.fit(times, column, len(times) - 1).integ() for column in np.array(values).T]
        return np.array([p(end) - p(start) for p in total])

    z, t = problem.start[number].numpy(), start
    known = [(t, velocity(t, z))]  # newest first
    for end, accepted in steps:
        tried = (end, velocity(end, z + integral(known[:5], t, end)))
        if accepted:
            z, t, known = z + integral([tried, *known[:5]], t, end), end, [tried, *known]
    return z


@each_problem
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.1, 0.9)])
def test_its_steps_are_those_of_the_pair_written_out(problem, start, end):
    times = []

    def on_step(step, t, z):
        times.append(t.clone())

    solution, field = solve("adams", problem, [start, end], atol=1e-6, rtol=1e-6, on_step=on_step)
    assert (solution.accepted > 8).all()
    for number in range(3):
        tried = [float(t[number]) for t in field.times[1:]]
        arrived = [start, *(float(t[number]) for t in times)]
        steps = [(t, after == t) for t, after, before in zip(tried, arrived[1:], arrived) if before != end]
        assert sum(accepted for _, accepted in steps) == solution.accepted[number]
        # sums of 20 steps; a fit of degree 5 loses about two digits
        np.testing.assert_allclose(solution.z[number], by_hand(problem, number, start, steps), rtol=1e-11, atol=1e-11)


def test_a_step_that_is_rejected_leaves_nothing_behind():
    """A kink in time: the steps that ran into it are rejected, and what they saw is in no later one."""
    problem = PROBLEMS[0].__class__(
        "kink", lambda t, z: torch.where(t[:, None] > 0.4, z, -20 * z), None, PROBLEMS[0].start
    )
    times = []
    solution, field = solve("adams", problem, [1.0, 0.0], atol=1e-7, rtol=1e-7, on_step=lambda n, t, z: times.append(t))
    assert (solution.rejected > 2).all()
    arrived = [1.0, *(float(t[0]) for t in times)]
    tried = [float(t[0]) for t in field.times[1:]]
    steps = [(t, after == t) for t, after, before in zip(tried, arrived[1:], arrived) if before != 0.0]
    np.testing.assert_allclose(solution.z[0], by_hand(problem, 0, 1.0, steps), rtol=1e-11)
    torch.testing.assert_close(solution.z, problem.start * math.exp(-0.6 + 20 * 0.4), rtol=1e-4, atol=0)


def test_velocities_of_a_low_degree_are_integrated_to_rounding():
    problem = PROBLEMS[0].__class__("t^4", lambda t, z: t[:, None] ** 4 + 0 * z, None, torch.zeros(2, 3).double())
    coarse, _ = solve("adams", problem, [0.0, 1.0], atol=1e-9, rtol=1e-9)
    errors = (coarse.z - 0.2).abs().max()
    assert 0 < errors < 1e-8  # of the first steps, which know less than five velocities
    assert coarse.accepted.max() < 60  # after them nothing is off, and steps grow


def test_it_is_of_the_sixth_order_between_equal_errors():
    """The error of a step is that of the prediction, h^6; so the steps go as tolerance^(-1/6), and the error of z' with
    one order more than they."""
    problem, found = PROBLEMS[0], []
    for tolerance in (1e-7, 1e-11):
        solution, _ = solve("adams", problem, [1.0, 0.0], atol=tolerance, rtol=tolerance)
        error = float((solution.z - problem.exact(problem.start, 1.0, 0.0)).abs().max())
        found.append((int(solution.accepted.max()), error))
    (few, coarse), (many, fine) = found
    assert math.log(coarse / fine) / math.log(many / few) > 5.0, found
    assert math.log(1e4) / math.log(many / few) > 4.5, found


@each_problem
def test_fewer_evaluations_than_of_dopri5_at_equal_error(problem):
    exact = problem.exact(problem.start, 1.0, 0.0)

    def cost(name, tolerance):
        solution, _ = solve(name, problem, [1.0, 0.0], atol=tolerance, rtol=tolerance)
        return float((solution.z - exact).abs().max()), int(solution.nfe.max())

    error, evaluations = cost("dopri5", 1e-7)
    ours = min(nfe for found, nfe in (cost("adams", 10.0**-k) for k in np.arange(5, 10, 0.25)) if found <= error)
    assert ours < 0.75 * evaluations, (ours, evaluations)


def test_a_trajectory_is_of_the_steps_own_polynomial():
    problem, times = PROBLEMS[2], time_grid(("shift", 2.0), 31)
    solution, _ = solve("adams", problem, times, trajectory=True, atol=1e-8, rtol=1e-8)
    plain, _ = solve("adams", problem, [1.0, 0.0], atol=1e-8, rtol=1e-8)
    assert torch.equal(solution.z, plain.z)
    assert torch.equal(solution.nfe, plain.nfe)
    for t, state in zip(times, solution.states, strict=True):
        torch.testing.assert_close(state, problem.exact(problem.start, 1.0, t), rtol=1e-6, atol=1e-6)


def test_a_field_at_rest_is_left_in_a_few_steps():
    still, _ = solve("adams", PROBLEMS[0].__class__("still", lambda t, z: 0 * z, None, torch.ones(2, 2)), [1.0, 0.0])
    assert torch.equal(still.z, torch.ones(2, 2))
    assert still.nfe.max() < 8  # a tenth, and twice as much each time


def test_no_more_evaluations_than_allowed_and_no_fewer():
    """One at the start, and one for each attempt."""
    for most in range(1, 8):
        stopped, field = solve("adams", PROBLEMS[0], [1.0, 0.0], atol=1e-8, rtol=1e-8, max_nfe=most)
        expected = most if most > 1 else 0  # a start without an attempt would be of no use
        assert (field.nfe, stopped.nfe.tolist()) == (expected, [expected] * 3)
        assert not stopped.reached.any()


def test_a_step_is_at_most_twice_the_one_before():
    times = [1.0]
    still = PROBLEMS[0].__class__("still", lambda t, z: 0 * z, None, torch.ones(2, 2))
    solve("adams", still, [1.0, 0.0], on_step=lambda n, t, z: times.append(float(t[0])))
    np.testing.assert_allclose(-np.diff(times), [0.1, 0.2, 0.4, 0.3])  # the last one goes to the end


def test_a_step_size_follows_the_order_of_its_own_prediction(monkeypatch):
    """The error of a prediction from k velocities falls as h^(k+1)."""
    orders = []

    class Control(adams.StepControl):
        def judge(self, error, after):
            orders.append((np.broadcast_to(self.controlled, 3).tolist(), self.accepted.tolist()))
            return super().judge(error, after)

    monkeypatch.setattr(adams, "StepControl", Control)
    solve("adams", PROBLEMS[0], [1.0, 0.0], atol=1e-7, rtol=1e-7)
    assert len(orders) > 8
    for controlled, accepted in orders:
        assert controlled == [min(number, 4) + 2 for number in accepted]

"""Adaptive methods: accuracy, counts, landing, dense output, budgets, and what goes wrong; each sample on its own."""

import math
from itertools import pairwise

import pytest
import torch
from problems import PROBLEMS, Counting
from scipy.integrate import solve_ivp
from torch.utils._python_dispatch import TorchDispatchMode
from torchdiffeq import odeint

from lfm_fast.solvers import Settings, get_solver
from lfm_fast.solvers.embedded import PAIRS
from lfm_fast.solvers.grids import time_grid
from lfm_fast.solvers.per_sample import PerSample

each_method = pytest.mark.parametrize("name", [*PAIRS, "adams"])
BEGINNING = dict.fromkeys(PAIRS, 2) | {"adams": 1}  # evaluations before the first attempt, and of each
ATTEMPT = {"adaptive_heun": 2, "bosh3": 3, "dopri5": 6, "tsit5": 6, "dopri8": 12, "adams": 1}
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
DOWN = [1.0, 0.0]


def near(name, tolerance):
    """A tolerance that the second order reaches in as many steps as the others do theirs."""
    return 1000 * tolerance if name == "adaptive_heun" else tolerance


def solve(name, problem, times, **settings):
    field = Counting(problem.velocity)
    return get_solver(name).integrate(field, problem.start, times, Settings(**settings)), field


@each_method
@each_problem
@pytest.mark.parametrize(("start", "end", "tolerance"), [(1.0, 0.0, 1e-7), (0.0, 1.0, 1e-4), (0.9, 0.3, 1e-6)])
def test_the_error_is_of_the_order_of_the_tolerance(name, problem, start, end, tolerance):
    tolerance = near(name, tolerance)
    solution, _ = solve(name, problem, [start, end], atol=tolerance, rtol=tolerance)
    error = (solution.z - problem.exact(problem.start, start, end)).abs().max(1).values
    # local errors of at most the tolerance, relative to values up to 32, add up over at most 40 steps, the smaller ones
    # of lower orders cancelling most of each other's; the problems stretch them up to eightfold
    assert (error <= 32 * 8 * tolerance * solution.accepted.clamp(max=40)).all(), error
    assert solution.reached.all()
    assert not solution.cancelled


@each_method
def test_a_smaller_tolerance_buys_accuracy_in_proportion(name):
    problem, errors = PROBLEMS[0], []
    for tolerance in (near(name, 1e-4), near(name, 1e-8)):
        solution, _ = solve(name, problem, DOWN, atol=tolerance, rtol=tolerance)
        errors.append(float((solution.z - problem.exact(problem.start, *DOWN)).abs().max()))
    assert errors[0] / errors[1] > 100, errors


@each_method
@each_problem
@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_evaluations_to_begin_with_and_then_those_of_each_attempt(name, problem, tolerance):
    tolerance = near(name, tolerance)
    solution, field = solve(name, problem, DOWN, atol=tolerance, rtol=tolerance)
    attempts = solution.accepted + solution.rejected
    assert torch.equal(solution.nfe, BEGINNING[name] + ATTEMPT[name] * attempts)
    assert field.nfe == solution.nfe.max()


@each_method
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (1e-5, 0.7), (0.3, 0.9)])
def test_each_sample_lands_on_the_end_and_looks_nowhere_beyond(name, start, end):
    solution, field = solve(name, PROBLEMS[2], [start, end], atol=1e-5, rtol=1e-5)
    times = torch.stack(field.times)
    assert times.min() >= min(start, end)
    assert times.max() <= max(start, end)
    assert (times == end).any(0).all()
    assert solution.time.tolist() == [end] * 3
    assert (times[0] == start).all()


def test_a_slow_field_takes_one_step():
    solution, _ = solve("dopri5", PROBLEMS[0].__class__("slow", lambda t, z: 1e-9 * z, None, torch.ones(2, 2)), DOWN)
    assert solution.nfe.tolist() == [8, 8]
    still, _ = solve("dopri5", PROBLEMS[0].__class__("still", lambda t, z: 0 * z, None, torch.ones(2, 2)), DOWN)
    assert torch.equal(still.z, torch.ones(2, 2))
    assert still.accepted.max() < 9  # it begins carefully, where no scale is known, and grows tenfold


@each_problem
def test_agrees_with_torchdiffeq_and_scipy_at_tight_tolerances_on_a_single_sample(problem):
    one = problem.__class__(problem.name, problem.velocity, problem.exact, problem.start[:1])
    exact = problem.exact(one.start, *DOWN)
    settings = {"rtol": 1e-10, "atol": 1e-10}

    def plain(t, z):
        return problem.velocity(torch.tensor([float(t)], dtype=torch.float64), torch.as_tensor(z)[None])[0].numpy()

    theirs = {
        "dopri5": solve_ivp(plain, DOWN, one.start[0].numpy(), method="RK45", **settings),
        "dopri8": solve_ivp(plain, DOWN, one.start[0].numpy(), method="DOP853", **settings),
    }
    for name, result in theirs.items():
        ours, _ = solve(name, one, DOWN, **settings)
        # both within a few hundred local errors of 1e-10 on values up to 8
        torch.testing.assert_close(ours.z[0], torch.from_numpy(result.y[:, -1]), rtol=2e-9, atol=2e-9)
        torch.testing.assert_close(ours.z, exact, rtol=2e-9, atol=2e-9)
        assert 0.6 < int(ours.nfe) / result.nfev < 1.3, (name, int(ours.nfe), result.nfev)
    field = Counting(problem.velocity)
    times = torch.tensor(DOWN, dtype=torch.float64)
    states = odeint(lambda t, z: field(t.expand(1), z)[0], one.start, times, method="dopri5", **settings)
    ours, _ = solve("dopri5", one, DOWN, **settings)
    torch.testing.assert_close(ours.z, states[-1], rtol=2e-9, atol=2e-9)
    assert 0.8 < int(ours.nfe) / field.nfe < 1.2  # the same formulas, and other rules for the next step's size


@pytest.mark.parametrize("name", ["dopri5", "bosh3"])
def test_every_sample_keeps_the_tolerance_where_one_error_for_the_batch_does_not(name):
    """One sample in 400 goes round and round and the others rest: averaged over all, its error is a twentieth."""
    speed = torch.zeros(400, 1, dtype=torch.float64)
    speed[7] = 30.0
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(400, 1)
    exact = start.clone()
    exact[7] = torch.tensor([math.cos(30.0), -math.sin(30.0)])
    field = Counting(lambda t, z: speed * torch.stack([-z[:, 1], z[:, 0]], 1))
    settings = Settings(atol=1e-5, rtol=0.0)
    ours, theirs = (get_solver(x).integrate(field, start, DOWN, settings) for x in (name, f"torchdiffeq:{name}"))
    errors = [float((solution.z - exact).abs().max()) for solution in (ours, theirs)]
    # all local errors together: each at most the tolerance
    assert errors[0] < 1e-5 * int(ours.accepted[7])
    assert errors[1] > 1e-5 * int(theirs.accepted[7])
    assert ours.nfe[7] > 2 * ours.nfe[0]  # and the others do not pay for it


@each_method
@pytest.mark.parametrize(
    ("problem", "start", "end"), [(PROBLEMS[0], 1.0, 0.0), (PROBLEMS[1], 0.1, 0.8)], ids=["linear", "nonlinear"]
)
def test_a_trajectory_is_read_off_inside_the_steps(name, problem, start, end):
    times = time_grid(("shift", 2.0), 23, start, end)
    tolerances, bound = {"atol": near(name, 1e-6), "rtol": near(name, 1e-6)}, 0.03 if name == "adaptive_heun" else 1e-3
    solution, field = solve(name, problem, times, trajectory=True, **tolerances)
    plain, _ = solve(name, problem, [start, end], **tolerances)
    assert torch.equal(solution.z, plain.z)  # it changes no step
    assert torch.equal(solution.states[0], problem.start)
    assert torch.equal(solution.states[-1], solution.z)
    assert len(solution.states) == 24
    for t, state in zip(times, solution.states, strict=True):
        # the same bound as at the end; inside, dopri5 and tsit5 are of the fourth order and dopri8 of the seventh
        torch.testing.assert_close(state, problem.exact(problem.start, start, t), rtol=bound, atol=bound)
    extra = solution.nfe - plain.nfe
    if name == "dopri8":  # three evaluations in each step that goes over a time of the grid
        assert (extra > 0).all()
        assert (extra % 3 == 0).all()
        assert (extra <= 3 * solution.accepted).all()
        assert field.nfe >= solution.nfe.max()
    else:
        assert (extra == 0).all()


def test_only_accepted_steps_are_read_off():
    """dopri8 pays three evaluations for each that goes over a time of the grid, and nothing for one it takes back."""
    times, seen = time_grid(None, 30), [torch.ones(3, dtype=torch.float64)]
    told = Settings(atol=1e-5, rtol=1e-5, trajectory=True, on_step=lambda step, t, z: seen.append(t))
    solution = get_solver("dopri8").integrate(Counting(kinked), PROBLEMS[0].start, times, told)
    assert solution.rejected[1] > 2
    over = [
        sum(any(after[row] <= t < before[row] for t in times[1:-1]) for before, after in pairwise(seen))
        for row in range(3)
    ]
    attempts = solution.accepted + solution.rejected
    assert torch.equal(solution.nfe, 2 + 12 * attempts + 3 * torch.tensor(over))


@each_method
def test_the_solution_inside_a_step_is_as_good_as_its_order(name):
    """Halving all steps (by the tolerance) reduces the error at a time between them."""
    problem, times = PROBLEMS[1], [1.0, 0.61803, 0.0]
    errors = []
    for tolerance in (near(name, 1e-4), near(name, 1e-7)):
        solution, _ = solve(name, problem, times, trajectory=True, atol=tolerance, rtol=tolerance)
        errors.append(float((solution.states[1] - problem.exact(problem.start, 1.0, times[1])).abs().max()))
    assert errors[0] < near(name, 1e-3)
    assert errors[1] < near(name, 1e-6)


@each_method
def test_a_spent_budget_returns_the_last_accepted_state_of_each_sample(name):
    problem, beginning, per_attempt = PROBLEMS[0], BEGINNING[name], ATTEMPT[name]
    tolerances, bound = {"atol": near(name, 1e-6), "rtol": near(name, 1e-6)}, 0.03 if name == "adaptive_heun" else 1e-3
    free, _ = solve(name, problem, DOWN, **tolerances)
    most = int(free.nfe.max())
    for budget in (1, beginning + per_attempt, beginning + 4 * per_attempt, most - 1, most):
        solution, field = solve(name, problem, DOWN, max_nfe=budget, **tolerances)
        assert (solution.nfe <= budget).all()
        assert field.nfe == solution.nfe.max()
        assert torch.equal(solution.reached, free.nfe <= budget)
        assert torch.equal(solution.z[solution.reached], free.z[solution.reached])
        assert (solution.time[solution.reached] == 0.0).all()
        late = ~solution.reached
        assert (solution.time[late] > 0.0).all()
        assert torch.equal(solution.time < 1.0, solution.accepted > 0)
        for z, start, time in zip(solution.z[late], problem.start[late], solution.time[late].tolist()):
            torch.testing.assert_close(z, problem.exact(start, 1.0, time), rtol=bound, atol=bound)
        assert not solution.cancelled


def test_false_from_the_callback_ends_it_with_what_is_there():
    seen = []

    def stop(step, t, z):
        seen.append((step, t, z))
        return False if step == 2 else 0  # 0 is not False

    times = time_grid(None, 50)
    solution, field = solve("dopri5", PROBLEMS[0], times, on_step=stop, trajectory=True, atol=1e-8, rtol=1e-8)
    assert solution.cancelled
    assert not solution.reached.any()
    assert [step for step, _, _ in seen] == [1, 2]
    assert field.nfe == 2 + 6 * 2
    assert torch.equal(solution.z, seen[-1][2])
    assert torch.equal(solution.time, seen[-1][1])
    for number in range(3):
        exact = PROBLEMS[0].exact(PROBLEMS[0].start, 1.0, solution.time[number].item())[number]
        torch.testing.assert_close(solution.z[number], exact, rtol=1e-6, atol=1e-6)
        for t, state in zip(times, solution.states):  # times it did not come to hold no number
            assert state[number].isnan().all() == (t < solution.time[number])


def test_the_callback_is_told_each_round_and_may_write_to_its_state():
    seen = []

    def spoil(step, t, z):
        seen.append((step, t.clone(), z.clone()))
        z.zero_()
        t.zero_()

    solution, _ = solve("dopri5", PROBLEMS[0], DOWN, on_step=spoil, atol=1e-7, rtol=1e-7)
    plain, _ = solve("dopri5", PROBLEMS[0], DOWN, atol=1e-7, rtol=1e-7)
    assert torch.equal(solution.z, plain.z)
    rounds = int((plain.accepted + plain.rejected).max())
    assert [step for step, _, _ in seen] == list(range(1, rounds + 1))
    for _, t, z in seen:
        assert (t.shape, t.dtype) == ((3,), torch.float64)
        for number in range(3):
            exact = PROBLEMS[0].exact(PROBLEMS[0].start, 1.0, t[number].item())[number]
            torch.testing.assert_close(z[number], exact, rtol=1e-5, atol=1e-5)
    times = torch.stack([t for _, t, _ in seen])
    assert (times.diff(dim=0) <= 0).all()
    assert times[-1].tolist() == [0.0] * 3
    assert torch.equal(seen[-1][2], solution.z)


def kinked(t, z):
    """A kink in time that a long step runs into, for the second sample alone."""
    after = torch.where(t[:, None] > 0.4, z, -20 * z)
    return torch.where(torch.tensor([[False], [True], [False]]), after, z)


def test_rejected_steps_are_counted_and_made_again_smaller():
    solution = get_solver("dopri5").integrate(Counting(kinked), PROBLEMS[0].start, DOWN, Settings(atol=1e-8, rtol=1e-8))
    assert solution.rejected[1] > 2
    assert solution.rejected[[0, 2]].tolist() == [0, 0]
    exact = PROBLEMS[0].start * torch.tensor([[-1.0], [-0.6 + 20 * 0.4], [-1.0]], dtype=torch.float64).exp()
    torch.testing.assert_close(solution.z, exact, rtol=1e-6, atol=1e-6)


@each_method
@pytest.mark.parametrize("number", [0, 1, 2, 5, 14, 23])
def test_a_velocity_that_is_not_finite_is_named_by_sample_and_time(name, number):
    field = Counting(PROBLEMS[0].velocity)

    def broken(t, z):
        velocity, *rest = field(t, z)
        if field.nfe == number + 1:
            velocity = velocity.clone()
            velocity[2, 1] = math.nan if number % 2 else math.inf
        return velocity, *rest

    with pytest.raises(RuntimeError, match=r"velocity of sample 2 at t = .* is not finite") as caught:
        get_solver(name).integrate(
            broken, PROBLEMS[0].start, DOWN, Settings(atol=near(name, 1e-6), rtol=near(name, 1e-6))
        )
    time = float(str(caught.value).split("at t = ")[1].split()[0])
    assert time == pytest.approx(float(field.times[number][2]), rel=1e-5)
    assert "\n" not in str(caught.value)


def test_steps_that_get_lost_in_the_rounding_of_time_end_in_a_sentence():
    def velocity(t, z):  # ever steeper before t = 1/3, for the second sample
        return torch.where(torch.tensor([[False], [True], [False]]), (t[:, None] - 1 / 3).abs() ** -1.5, z)

    with pytest.raises(RuntimeError, match=r"^Sample 1 needs steps below 1e-14 at t = 0.333333: .*\.$") as caught:
        get_solver("dopri5").integrate(Counting(velocity), PROBLEMS[0].start, DOWN, Settings())
    assert "\n" not in str(caught.value)


@each_method
def test_guidance_is_blended_per_sample(name):
    scale, z = torch.tensor([1.0, 2.5, -1.0], dtype=torch.float64), PROBLEMS[0].start

    def apart(t, z):
        return torch.sin(z), torch.cos(z), scale

    def together(t, z):
        return scale[:, None] * torch.sin(z) + (1 - scale[:, None]) * torch.cos(z), None, None

    ours, expected = (get_solver(name).integrate(f, z, DOWN, Settings()) for f in (apart, together))
    torch.testing.assert_close(ours.z, expected.z, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.nfe, expected.nfe)


@each_method
def test_a_field_may_return_the_same_memory_every_time_and_keep_what_it_is_given(name):
    problem, buffer, given = PROBLEMS[2], torch.empty_like(PROBLEMS[2].start), []

    def static(t, z):
        given.append((t, t.clone(), z, z.clone()))
        return buffer.copy_(problem.velocity(t, z)), None, None

    start = problem.start.clone()
    fresh, _ = solve(name, problem, DOWN)
    assert torch.equal(get_solver(name).integrate(static, problem.start, DOWN, Settings()).z, fresh.z)
    assert torch.equal(problem.start, start)
    for t, t_then, z, z_then in given:
        assert torch.equal(t, t_then)
        assert torch.equal(z, z_then)


@pytest.mark.parametrize("name", ["dopri5", "dopri8"])
def test_elements_that_are_and_stay_zero_need_no_absolute_tolerance(name):
    start = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    solution = get_solver(name).integrate(Counting(lambda t, z: z), start, DOWN, Settings(atol=0.0, rtol=1e-5))
    torch.testing.assert_close(solution.z, start / math.e, rtol=1e-4, atol=0)


class _NoReadback(TorchDispatchMode):
    """Fails when a value is read back to the host, which on a GPU waits for all work before it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read back inside the loop"
        assert func is not torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


@each_method
def test_an_attempt_reads_back_once_one_number_a_sample(name, monkeypatch):
    read, original = [], PerSample._read
    monkeypatch.setattr(PerSample, "_read", staticmethod(lambda *x: read.append(x) or original(*x)))
    with _NoReadback():
        settings = {"on_step": lambda *step: None, "trajectory": True, "atol": 1e-3, "rtol": 1e-3}
        solution, _ = solve(name, PROBLEMS[0], time_grid(None, 5), **settings)
    assert len(read) == BEGINNING[name] + int((solution.accepted + solution.rejected).max())
    assert all(value.shape == (3,) for values in read for value in values)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_error_that_overflows_with_finite_velocities_rejects_the_step(which, value, monkeypatch):
    reads, original = [], PerSample._read

    def read(*values):
        numbers = original(*values).copy()
        reads.append(numbers)
        if len(reads) == 3:  # of the first attempt, after the two before the first step
            numbers[which, 1] = value
        return numbers

    monkeypatch.setattr(PerSample, "_read", staticmethod(read))
    solution, _ = solve("dopri8", PROBLEMS[0], DOWN)
    assert solution.rejected.tolist() == [0, 1, 0]
    assert solution.reached.all()

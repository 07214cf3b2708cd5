"""torchdiffeq's methods by name: the same numbers, counted, inside the grid, stopped at a budget."""

import pytest
import torch
from problems import PROBLEMS, Counting
from torchdiffeq import odeint

from lfm_fast.solvers import Settings, get_solver
from lfm_fast.solvers.external import EXTERNALS
from lfm_fast.solvers.grids import time_grid

ADAPTIVE = [name for name, row in EXTERNALS.items() if row.kind == "adaptive"]
ON_GRID = [name for name, row in EXTERNALS.items() if row.kind in ("fixed", "adams")]
DOWN = [1.0, 0.0]


def solve(name, problem, times, **settings):
    field = Counting(problem.velocity)
    return get_solver(f"torchdiffeq:{name}").integrate(field, problem.start, times, Settings(**settings)), field


def theirs(name, problem, times, **arguments):
    """torchdiffeq alone, and its number of evaluations."""
    field = Counting(problem.velocity)
    grid = torch.tensor(times, dtype=torch.float64)
    return odeint(lambda t, z: field(t.expand(3), z)[0], problem.start, grid, method=name, **arguments), field.nfe


def test_every_method_of_torchdiffeq_has_a_row():
    from torchdiffeq._impl.odeint import SOLVERS

    assert set(EXTERNALS) == set(SOLVERS)


@pytest.mark.parametrize("name", EXTERNALS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.2, 0.9)])
def test_every_method_finds_the_solution(name, problem, start, end):
    # explicit_adams raises its order with the steps made, to 12, which is stable for the smallest steps only
    num_steps = {"euler": 400, "explicit_adams": 10}.get(name, 100)
    times = time_grid(None, num_steps, start, end)
    solution, field = solve(name, problem, times, atol=1e-6, rtol=1e-6)
    exact = problem.exact(problem.start, start, end)
    # fehlberg2 controls a first-order error only; the others keep well below their tolerance or step
    torch.testing.assert_close(solution.z, exact, rtol=0.03, atol=0.03)
    assert solution.reached.all()
    assert field.nfe > 0
    assert min(float(t.min()) for t in field.times) >= min(start, end)
    assert max(float(t.max()) for t in field.times) <= max(start, end)


@pytest.mark.parametrize("name", ON_GRID)
def test_fixed_methods_step_through_our_grid(name):
    """num_steps means num_steps: torchdiffeq given all N + 1 times makes the same numbers and evaluations."""
    times, seen = time_grid(None, 20), []
    solution, field = solve(name, PROBLEMS[1], times, on_step=lambda *step: seen.append(step))
    states, evaluations = theirs(name, PROBLEMS[1], times, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(solution.z, states[-1], rtol=0, atol=0)
    assert field.nfe == evaluations
    assert (solution.accepted.unique().item(), solution.rejected.unique().item()) == (20, 0)
    assert [(step, t) for step, t, _ in seen] == list(enumerate(times))[1:]
    for (_, _, z), state in zip(seen, states[1:]):
        assert torch.equal(z, state)
    per_step = EXTERNALS[name].evaluations_per_step
    assert per_step is None or field.nfe == 20 * per_step


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_adaptive_methods_left_alone_are_torchdiffeq_to_the_bit(name, problem):
    solution, field = solve(name, problem, DOWN, inside=False)
    states, evaluations = theirs(name, problem, DOWN, rtol=1e-5, atol=1e-5)
    assert torch.equal(solution.z, states[-1])
    assert field.nfe == evaluations


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_methods_stay_inside_the_grid_unless_told_otherwise(name):
    _, free = solve(name, PROBLEMS[2], DOWN, inside=False)
    _, kept = solve(name, PROBLEMS[2], DOWN)
    assert min(float(t.min()) for t in free.times) < 0.0  # torchdiffeq alone steps past the end
    assert 0.0 <= min(float(t.min()) for t in kept.times) < 1e-300  # it asks a last bit before the end


def test_the_last_step_ends_on_the_last_time():
    """Not read off inside a longer step: as torchdiffeq does when it is told to stop there."""
    ours, field = solve("dopri5", PROBLEMS[2], DOWN)
    landing = {"step_t": torch.zeros(1, dtype=torch.float64)}
    states, evaluations = theirs("dopri5", PROBLEMS[2], DOWN, rtol=1e-5, atol=1e-5, options=landing)
    assert torch.equal(ours.z, states[-1])
    assert field.nfe == evaluations


def test_the_first_guess_of_a_step_does_not_look_beyond_the_grid():
    field = Counting(lambda t, z: 1e-3 * z)  # so slow that torchdiffeq's first guess is a step of 10
    get_solver("torchdiffeq:dopri5").integrate(field, PROBLEMS[0].start, DOWN, Settings())
    assert min(float(t.min()) for t in field.times) >= 0.0


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_dopri5_makes_two_evaluations_and_six_per_attempt(problem):
    solution, field = solve("dopri5", problem, DOWN, atol=1e-9, rtol=1e-9)
    assert field.nfe == solution.nfe.unique().item()
    assert field.nfe == (2 + 6 * (solution.accepted + solution.rejected)).unique().item()
    torch.testing.assert_close(solution.z, problem.exact(problem.start, *DOWN), rtol=1e-7, atol=1e-7)


def test_rejected_steps_are_counted_and_tolerance_buys_accuracy():
    def velocity(t, z):  # a kink in time that a long step runs into
        return torch.where(t[:, None] > 0.4, z, -20 * z)

    def solve_at(tolerance):
        return get_solver("torchdiffeq:dopri5").integrate(
            Counting(velocity), PROBLEMS[0].start, DOWN, Settings(atol=tolerance, rtol=tolerance)
        )

    loose, tight = solve_at(1e-3), solve_at(1e-8)
    assert loose.rejected.all()
    assert (tight.accepted > loose.accepted).all()
    exact = PROBLEMS[0].start * torch.exp(torch.tensor(-0.6 + 20 * 0.4, dtype=torch.float64))
    assert (tight.z - exact).abs().max() < (loose.z - exact).abs().max()


def test_trajectory_and_callback_of_an_adaptive_method():
    times, seen = time_grid(None, 5), []
    solution, _ = solve("dopri5", PROBLEMS[0], times, trajectory=True, on_step=lambda *step: seen.append(step))
    assert len(solution.states) == 6
    for t, state in zip(times, solution.states):
        torch.testing.assert_close(state, PROBLEMS[0].exact(PROBLEMS[0].start, 1.0, t), rtol=1e-4, atol=1e-4)
    assert [step for step, _, _ in seen] == list(range(1, int(solution.accepted[0]) + 1))
    for _, t, z in seen:
        torch.testing.assert_close(z, PROBLEMS[0].exact(PROBLEMS[0].start, 1.0, t), rtol=1e-4, atol=1e-4)
    assert seen[-1][1] == 0.0


@pytest.mark.parametrize("name", ["dopri5", "dopri8", "implicit_adams"])
@pytest.mark.parametrize("budget", [1, 2, 17])
def test_a_spent_budget_returns_the_last_accepted_state(name, budget):
    problem = PROBLEMS[0]
    solution, field = solve(name, problem, time_grid(None, 50), max_nfe=budget, atol=1e-7, rtol=1e-7)
    assert not solution.reached.any()
    assert field.nfe == budget
    time = solution.time.unique().item()
    assert 0.0 < time <= 1.0
    assert (time < 1.0) == bool(solution.accepted.any())
    exact = problem.exact(problem.start, 1.0, time)
    torch.testing.assert_close(solution.z, exact, rtol=1e-5, atol=1e-5)


def test_a_budget_that_suffices_changes_nothing():
    free, field = solve("dopri5", PROBLEMS[0], DOWN)
    bound, _ = solve("dopri5", PROBLEMS[0], DOWN, max_nfe=field.nfe)
    assert bound.reached.all()
    assert torch.equal(bound.z, free.z)


def test_guidance_is_blended_per_sample():
    scale = torch.tensor([1.0, 2.5, -1.0])

    def apart(t, z):
        return torch.sin(z).bfloat16(), torch.cos(z).bfloat16(), scale

    def together(t, z):
        s = scale[:, None]
        return s * torch.sin(z).bfloat16().float() + (1 - s) * torch.cos(z).bfloat16().float(), None, None

    z = PROBLEMS[0].start.float()
    ours, expected = (
        get_solver("torchdiffeq:rk4").integrate(f, z, time_grid(None, 5), Settings()).z for f in (apart, together)
    )
    assert torch.equal(ours, expected)


def test_velocities_that_are_not_finite_end_in_a_sentence():
    field = Counting(lambda t, z: z * float("nan"))
    with pytest.raises(RuntimeError, match="dopri5 gave up after t = 1"):
        get_solver("torchdiffeq:dopri5").integrate(field, PROBLEMS[0].start, DOWN, Settings())


@pytest.mark.parametrize("name", ["rk4", "explicit_adams", "dopri5"])
def test_a_field_may_return_the_same_memory_every_time(name):
    problem, times = PROBLEMS[2], time_grid(None, 10, 0.0, 1.0)  # downwards torchdiffeq negates, which copies
    buffer = torch.empty_like(problem.start)

    def static(t, z):
        return buffer.copy_(problem.velocity(t, z)), None, None

    fresh, _ = solve(name, problem, times)
    assert torch.equal(get_solver(f"torchdiffeq:{name}").integrate(static, problem.start, times, Settings()).z, fresh.z)

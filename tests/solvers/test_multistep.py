"""Multistep methods against the papers' formulas step by step, diffusers' schedulers, and exact integrals."""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from problems import Counting
from torchdiffeq import odeint

from lfm_fast.flow.paths import Linear, VarianceExploding, VariancePreserving, VariancePreservingTrig
from lfm_fast.solvers import AdamsBashforth, DPMSolverPP2M, Settings, UniPC, get_solver
from lfm_fast.solvers.grids import time_grid
from lfm_fast.solvers.multistep import _moments, lagrange_weights

PATHS = [Linear(), Linear(1e-5), VariancePreserving(), VariancePreservingTrig(), VarianceExploding(0.05, 10.0)]
each_path = pytest.mark.parametrize("path", PATHS, ids=repr)
INNER = {
    "even": time_grid(None, 9, 0.9, 0.1),
    "uneven": [0.9, 0.86, 0.77, 0.66, 0.58, 0.44, 0.35, 0.25, 0.19, 0.1],
    "upwards": time_grid(("shift", 2.0), 9, 0.1, 0.9),
}
each_grid = pytest.mark.parametrize("grid", INNER)
Z = torch.tensor([[1.0, -0.5], [0.2, 2.0], [-1.0, 0.3]], dtype=torch.float64)


def velocity(t, z):
    """No exact solution, and none needed."""
    return torch.sin(2 * z) + z.flip(1) * torch.cos(3 * t)[:, None]


def solve(formula, times, path):
    field = Counting(velocity)
    return get_solver(formula).integrate(field, Z, times, Settings(path=path)).z, field.nfe


class Path64:
    """alpha, sigma, lambda at a time and the data prediction there, in numpy; from data to noise (upwards), with data
    and noise in each other's place, which makes the methods those of noise prediction."""

    def __init__(self, path, times):
        self.path, self.nfe, self.upwards = path, 0, times[0] < times[-1]

    def at(self, t):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
        if self.upwards:
            alpha, sigma = sigma, alpha
        with np.errstate(divide="ignore"):
            return alpha, sigma, float(np.log(alpha) - np.log(sigma))

    def data(self, x, t):
        self.nfe += 1
        x, t = torch.tensor(x), torch.full((len(x),), t, dtype=torch.float64)
        predict = self.path.noise_from_velocity if self.upwards else self.path.data_from_velocity
        return predict(velocity(t, x), x, t).numpy()


def dpm_solver_pp_2m(path, times):
    """Algorithm 2 of arXiv 2211.01095, as it stands there."""
    p, x, previous = Path64(path, times), Z.numpy(), None
    for i in range(len(times) - 1):
        (_, sigma_s, lambda_s), (alpha_t, sigma_t, lambda_t) = p.at(times[i]), p.at(times[i + 1])
        h, data = lambda_t - lambda_s, p.data(x, times[i])
        mixed = data
        if previous is not None:
            r = previous[1] / h
            mixed = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * previous[0]
        x = sigma_t / sigma_s * x - alpha_t * np.expm1(-h) * mixed
        previous = (data, h)
    return x, p.nfe


def uni_pc(path, times, order):
    """Algorithms 5 to 8 of arXiv 2302.04867 (data prediction), with B(h) = e^h - 1 and its systems R rho B = phi."""
    p, x, known = Path64(path, times), Z.numpy(), []  # known: (lambda, data), newest first
    known = [(p.at(times[0])[2], p.data(x, times[0]))]
    for i in range(len(times) - 1):
        (_, sigma_s, lambda_s), (alpha_t, sigma_t, lambda_t) = p.at(times[i]), p.at(times[i + 1])
        h, this = lambda_t - lambda_s, min(order, i + 1)
        big_b = math.expm1(-h)  # of -h, data being predicted
        base = sigma_t / sigma_s * x - alpha_t * math.expm1(-h) * known[0][1]
        ratios = [(known[k][0] - lambda_s) / h for k in range(1, this)]
        slopes = [(known[k][1] - known[0][1]) / ratios[k - 1] for k in range(1, this)]

        def coefficients(nodes, h=h, big_b=big_b):
            if len(nodes) < 2:
                return [0.5] * len(nodes)  # the value both papers take, whatever h
            phi, right = math.expm1(-h) / -h - 1, []
            for k in range(1, len(nodes) + 1):
                right.append(phi * math.factorial(k) / big_b)
                phi = phi / -h - 1 / math.factorial(k + 1)
            return np.linalg.solve([[node**k for node in nodes] for k in range(len(nodes))], right)

        predicted = base - alpha_t * big_b * sum((c * d for c, d in zip(coefficients(ratios), slopes)), np.zeros(1))
        if i == len(times) - 2:
            return predicted, p.nfe
        data = p.data(predicted, times[i + 1])
        c = coefficients([*ratios, 1.0])
        total = sum((w * d for w, d in zip(c, [*slopes, data - known[0][1]])), np.zeros(1))
        x = base - alpha_t * big_b * total
        known = [(lambda_t, data), *known][:order]
    return None


# one rounding of 1e-16 in each of 9 steps, times lambda's and the data prediction's factors of up to 1 / alpha = 90
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@each_path
@each_grid
def test_dpmpp_2m_is_the_paper_s_algorithm(path, grid):
    found, nfe = solve(DPMSolverPP2M(), INNER[grid], path)
    expected, evaluations = dpm_solver_pp_2m(path, INNER[grid])
    torch.testing.assert_close(found, torch.tensor(expected), **CLOSE)
    assert nfe == evaluations == 9


@each_path
@each_grid
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_the_paper_s_algorithm(path, grid, order):
    found, nfe = solve(UniPC(order), INNER[grid], path)
    expected, evaluations = uni_pc(path, INNER[grid], order)
    torch.testing.assert_close(found, torch.tensor(expected), **CLOSE)
    assert nfe == evaluations == 9


@pytest.mark.parametrize("grid", ["even", "uneven"])
@pytest.mark.parametrize(
    ("formula", "order"), [(DPMSolverPP2M(), 2), (UniPC(1), 1), (UniPC(2), 2), (UniPC(3), 3)], ids=repr
)
def test_diffusers_schedulers_on_flow_sigmas_make_the_same_steps(grid, formula, order):
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": order}
    settings |= {"lower_order_final": False, "final_sigmas_type": "sigma_min"}  # its last step like all others
    made = DPMSolverMultistepScheduler if isinstance(formula, DPMSolverPP2M) else UniPCMultistepScheduler
    scheduler, times = made(**settings), INNER[grid]
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = torch.tensor(times, dtype=torch.float64)  # its own are float32
    x = Z
    for i, name in enumerate(scheduler.timesteps):
        v = velocity(torch.full((3,), times[i], dtype=torch.float64), x)
        x = scheduler.step(v, name, x).prev_sample
    found, _ = solve(formula, times, Linear())
    # theirs steps in float32, or solves its systems for the coefficients in float32
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 9])
def test_the_first_steps_of_adams_and_bashforth_are_heuns(order, num_steps):
    formula, times = AdamsBashforth(order), time_grid(None, num_steps, 0.9, 0.1)
    found, nfe = solve(formula, times, Linear())
    assert nfe == formula.evaluations(num_steps) == num_steps + min(order - 1, num_steps)
    if num_steps < order:
        assert torch.equal(found, solve("heun", times, Linear())[0])


@pytest.mark.parametrize("formula", [DPMSolverPP2M(), UniPC(3)], ids=repr)
def test_what_is_before_an_infinite_step_is_not_drawn_on(formula):
    """At alpha = 0 a velocity says nothing of the data; the step after it is of first order, and the next ones not."""
    moves = [move.target.weights for move in formula.schedule(time_grid(None, 6), Linear())]
    data_at_0 = ("velocity", 0)
    if isinstance(formula, DPMSolverPP2M):
        assert [sorted(k for kind, k in move if kind == "velocity") for move in moves[:4]] == [[0], [1], [1, 2], [2, 3]]
    assert all(data_at_0 not in move for move in moves[2:])


@lru_cache
def fine(start, end):
    """Many small steps of RK4 in float64, by torchdiffeq (its 3/8 rule)."""
    grid = torch.linspace(start, end, 1001, dtype=torch.float64)
    return odeint(lambda t, z: velocity(t.expand(3), z), Z, grid, method="rk4")[-1]


@each_path
@pytest.mark.parametrize(
    "formula", [DPMSolverPP2M(), UniPC(), UniPC(3), AdamsBashforth(2), AdamsBashforth(3)], ids=repr
)
def test_they_come_to_a_fine_solution_made_by_others(path, formula):
    """From 0.9 to 0.1; with four times as many steps, 4^order times nearer."""
    expected = fine(0.9, 0.1)
    errors = [float((solve(formula, time_grid(None, n, 0.9, 0.1), path)[0] - expected).abs().max()) for n in (50, 200)]
    assert math.log(errors[0] / errors[1], 4) > formula.order - 0.25, errors
    assert errors[1] < 2e-3


@each_path
@pytest.mark.parametrize("formula", [DPMSolverPP2M(), UniPC(), UniPC(3)], ids=repr)
@pytest.mark.parametrize("down", [True, False])
def test_the_whole_way_where_alpha_and_sigma_vanish(path, formula, down):
    """The flow of Gaussian data N(m, s^2), which is known: steps from alpha = 0 and to sigma = 0 are infinite in
    lambda, and have to stay finite and of first order."""
    m, s = torch.tensor([0.7, -0.3], dtype=torch.float64), torch.tensor([0.4, 0.1], dtype=torch.float64)

    def moments(t):
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        return alpha * m, (alpha * s).square() + sigma**2

    def flow(t, z):
        (mean, variance), alpha, sigma = moments(t), path.alpha(t)[:, None], path.sigma(t)[:, None]
        half_rate = alpha * path.d_alpha(t)[:, None] * s**2 + sigma * path.d_sigma(t)[:, None]
        return path.d_alpha(t)[:, None] * m + half_rate / variance * (z - mean)

    ends = [torch.full((3,), t, dtype=torch.float64) for t in (path.t_max, path.t_min)]
    (mean_1, variance_1), (mean_0, variance_0) = map(moments, ends if down else ends[::-1])
    start, expected = mean_1 + variance_1.sqrt() * Z, mean_0 + variance_0.sqrt() * Z
    times = [float(t[0]) for t in (ends if down else ends[::-1])]
    errors = []
    for num_steps in (25, 200):
        field = Counting(flow)
        grid = time_grid(None, num_steps, *times)
        result = get_solver(formula).integrate(field, start, grid, Settings(path=path)).z
        errors.append(float(((result - expected) / variance_0.sqrt()).abs().max()))
    assert errors[1] < 0.2 * errors[0], errors  # first order makes it an eighth
    assert errors[1] < 0.1, errors


def test_first_order_steps_are_the_exact_ones_of_constant_data_and_noise():
    """A step over which data and noise do not change is exact on every path, from t_max to t_min in one."""
    data, noise = Z, Z.flip(0)
    for path in PATHS:

        def straight(t, z, path=path):
            return path.d_alpha(t)[:, None] * data + path.d_sigma(t)[:, None] * noise

        ends = [torch.tensor(t, dtype=torch.float64) for t in (path.t_max, path.t_min)]
        first, last = (path.alpha(t) * data + path.sigma(t) * noise for t in ends)
        for formula in (DPMSolverPP2M(), UniPC(), UniPC(3)):
            for count in (1, 2, 7):
                times = time_grid(None, count, path.t_max, path.t_min)
                result = get_solver(formula).integrate(Counting(straight), first, times, Settings(path=path)).z
                # data is what a velocity near alpha = 0 says it is: 1 / alpha = 150 of 1e-16, a few times over
                torch.testing.assert_close(result, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma_min", [0.0, 1e-5, 1e-3])
def test_a_jump_of_lambda_is_not_extrapolated_over(sigma_min):
    """The last step to a small sigma is ten times as long in lambda as the one before: a curve drawn on would miss."""
    path = Linear(sigma_min)
    expected = fine(1.0, 0.0)
    for formula in (DPMSolverPP2M(), UniPC(), UniPC(3)):
        error = float((solve(formula, time_grid(None, 20), path)[0] - expected).abs().max())
        euler = float((solve("euler", time_grid(None, 20), path)[0] - expected).abs().max())
        assert error < 0.5 * euler


@pytest.mark.parametrize("order", [2, 3])
def test_adams_bashforth_integrates_polynomials_of_its_order_exactly_on_uneven_grids(order):
    """v = t^m gives (t_end^(m + 1) - t_start^(m + 1)) / (m + 1) for m below the order; Heun's start allows m = 1."""
    times = [1.0, 0.93, 0.71, 0.66, 0.4, 0.1, 0.0]
    start = torch.zeros(1, 1, dtype=torch.float64)
    for m in range(order + 1):
        solution = get_solver(f"ab{order}").integrate(
            Counting(lambda t, z, m=m: t[:, None] ** m), start, times, Settings(trajectory=True)
        )
        states, grid = torch.stack(solution.states)[order - 1 :, 0, 0], torch.tensor(times, dtype=torch.float64)
        exact = grid ** (m + 1) / (m + 1)
        exact = (exact - exact[order - 1])[order - 1 :]
        close = torch.allclose(states - states[0], exact, rtol=0, atol=1e-14)
        assert close == (m < order), m


def test_ab2_on_an_even_grid_has_the_coefficients_of_the_textbooks():
    assert lagrange_weights([0.0, -1.0], [1, 1 / 2]) == pytest.approx([3 / 2, -1 / 2], rel=1e-15)
    assert lagrange_weights([0.0, -1.0, -2.0], [1, 1 / 2, 1 / 3]) == pytest.approx(
        [23 / 12, -16 / 12, 5 / 12], rel=1e-14
    )


@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.1, 0.99, 1.01, 3.0, 20.0, -1e-3, -0.5, -1.5, -4.0])
def test_moments_are_integrals(h):
    nodes, weights = np.polynomial.legendre.leggauss(40)
    s, weights = (nodes + 1) / 2, weights / 2
    expected = [h * float(np.sum(weights * np.exp(-h * (1 - s)) * s**m)) for m in range(4)]
    assert _moments(h, 4) == pytest.approx(expected, rel=1e-12)

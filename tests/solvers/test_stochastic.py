"""Stochastic solvers: the marginals of the flow for any diffusion, order of their moments, noise by sample number."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import PROBLEMS, Counting

import lfm_fast
from lfm_fast import ops
from lfm_fast.flow.paths import Linear, VarianceExploding, VariancePreserving, VariancePreservingTrig
from lfm_fast.solvers import EulerMaruyama, SDEHeun, Settings, get_solver
from lfm_fast.solvers.grids import time_grid

PATHS = [Linear(), Linear(1e-5), VariancePreserving(), VariancePreservingTrig(), VarianceExploding(0.05, 10.0)]
each_path = pytest.mark.parametrize("path", PATHS, ids=repr)
both = pytest.mark.parametrize("method", [EulerMaruyama, SDEHeun])
STREAM = 5


def wave(t):
    return 0.5 + 0.3 * math.cos(7 * t)


# moments, exactly


class Affine:
    """Values constant + a start + sum_k b_k normal_k as vectors (constant, a, b): moments without drawing."""

    def __init__(self, path, mean, std, times):
        self.path, self.mean, self.std, self.times = path, mean, std, times

    def at(self, t):
        t = torch.tensor(t, dtype=torch.float64)
        path = self.path
        return [float(f(t)) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma)]

    def moments(self, t):
        alpha, sigma, *_ = self.at(t)
        return alpha * self.mean, (alpha * self.std) ** 2 + sigma**2

    def velocity(self, t, value):
        """E[u | z] = m' + (v' / 2 v) (z - m) of Gaussian data, mean m and variance v at t."""
        alpha, sigma, d_alpha, d_sigma = self.at(t)
        mean, variance = self.moments(t)
        rate = (alpha * d_alpha * self.std**2 + sigma * d_sigma) / variance
        result = rate * value
        result[0] += d_alpha * self.mean - rate * mean
        return result

    def __call__(self, formula):
        """(mean, variance) that the moves of a formula come to."""
        points, velocities = [np.eye(1, len(self.times) + 1, k=1)[0]], []
        for move in formula.schedule(self.times, self.path):
            velocities.append(self.velocity(move.time, points[-1]))
            known = {"point": points, "velocity": velocities}
            new = sum(weight * known[kind][j] for (kind, j), weight in move.target.weights.items())
            new[2 + move.draw] += move.noise
            points.append(new)
        (constant, start, *draws), (mean, variance) = points[-1], self.moments(self.times[0])
        return constant + start * mean, start**2 * variance + np.square(draws).sum()


@both
@each_path
@pytest.mark.parametrize("diffusion", ["sigma", "path", wave], ids=["sigma", "path", "function"])
@pytest.mark.parametrize(("start", "end"), [(0.9, 0.2), (0.2, 0.9)])
def test_mean_and_variance_converge_to_the_flow_s_with_the_order(method, path, diffusion, start, end):
    """No sample is drawn: for Gaussian data a schedule makes a weighted sum of independent normals."""
    formula, errors = method(diffusion, last_step="sde"), []
    for num_steps in (200, 400):
        problem = Affine(path, 0.7, 0.6, time_grid(None, num_steps, start, end))
        (mean, variance), (true_mean, true_variance) = problem(formula), problem.moments(end)
        errors.append((abs(mean - true_mean), abs(variance - true_variance) / true_variance))
    for coarse, fine in zip(*errors):
        # the next term of the series: a quarter of an order, as for the other methods; and what is exact has no order
        assert fine < max(coarse * 2 ** (0.25 - formula.order), 1e-10), errors
        assert fine < (0.1 if formula.order == 1 else 0.01), errors


@both
@each_path
@pytest.mark.parametrize("diffusion", ["sigma", "path"])
def test_the_whole_way_down_ends_with_the_data(method, path, diffusion):
    """From alpha = 0 and to sigma = 0, where score or diffusion are infinite, with the last step along the flow."""
    errors = []
    for num_steps in (50, 400):
        problem = Affine(path, 0.7, 0.6, time_grid(None, num_steps, path.t_max, path.t_min))
        (mean, variance), (true_mean, true_variance) = problem(method(diffusion)), problem.moments(path.t_min)
        errors.append(max(abs(mean - true_mean), abs(variance - true_variance)))
    assert errors[1] < 0.05, errors
    assert errors[1] < 0.25 * errors[0], errors  # first order at least: an eighth


@both
def test_noise_in_the_last_step_would_stay_in_the_result(method):
    for last_step in ("ode", "sde"):
        moves = method(last_step=last_step).schedule(time_grid(None, 20, 1.0, 0.05), Linear())
        per_step = method.flow.tableau.num_stages
        assert all(move.noise > 0.0 for move in moves[:-per_step])
        assert all((move.noise > 0.0) == (last_step == "sde") for move in moves[-per_step:])


@both
def test_no_step_overshoots_whatever_the_diffusion(method):
    """A constant g is more than explicit steps bear near sigma = 0, where the score is infinite."""
    errors = []
    for num_steps in (20, 160):
        problem = Affine(Linear(), 0.7, 0.6, time_grid(None, num_steps))
        mean, variance = problem(method(lambda t: 1.5))
        errors.append(max(abs(mean - 0.7), abs(variance - 0.36)))
    assert errors[1] < 0.05, errors
    assert errors[1] < 0.3 * errors[0], errors


# the numbers drawn


def test_an_euler_maruyama_step_by_hand():
    """z' = z + dt v - |dt| (g^2 / 2) noise / sigma + g sqrt(|dt|) normal; straight path, so noise = z + (1 - t) v."""
    index, seed = torch.tensor([5, 2, 9]), 77
    z, times = PROBLEMS[0].start, [0.8, 0.5, 0.3]
    settings = Settings(path=Linear(), seed=seed, index=index, trajectory=True)
    solution = get_solver(EulerMaruyama(wave, last_step="sde")).integrate(
        Counting(lambda t, z: torch.sin(z)), z, times, settings
    )
    for n, (t, after) in enumerate(pairwise(times)):
        dt, g, v = after - t, wave(t), torch.sin(z)
        normal = ops.philox_normal(index, 2, seed, STREAM, n).double()  # 2 numbers: one block of the counter per step
        z = z + dt * v - abs(dt) * g**2 / 2 * (z + (1 - t) * v) / t + g * math.sqrt(abs(dt)) * normal
        torch.testing.assert_close(solution.states[n + 1], z, rtol=1e-13, atol=1e-13)


def test_both_stages_of_a_heun_step_have_one_normal():
    index, seed = torch.tensor([5, 2, 9]), 77
    z, times = PROBLEMS[0].start.repeat(1, 3), [0.8, 0.5, 0.3]  # 6 numbers: two blocks of the counter per step
    settings = Settings(path=Linear(), seed=seed, index=index, trajectory=True)
    solution = get_solver(SDEHeun(last_step="sde")).integrate(Counting(lambda t, z: torch.sin(z)), z, times, settings)
    for n, (t, after) in enumerate(pairwise(times)):
        dt = after - t

        def drift(t, z):
            return dt * torch.sin(z) - abs(dt) * (z + (1 - t) * torch.sin(z))  # noqa: B023

        noise = math.sqrt((t + after) * abs(dt)) * ops.philox_normal(index, 6, seed, STREAM, 2 * n).double()
        first = drift(t, z)
        z = z + (first + drift(after, z + first + noise)) / 2 + noise
        torch.testing.assert_close(solution.states[n + 1], z, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", ["euler_maruyama", "sde_heun"])
def test_a_sample_s_noise_depends_on_seed_and_number_alone(method):
    def run(z1, **settings):
        return lfm_fast.sample(lambda t, z: z.cos(), z1, method=method, num_steps=9, **settings)

    z1 = lfm_fast.noise(7, (3, 5), seed=1)
    whole = run(z1, seed=4)
    numbers = torch.tensor([6, 2, 3])
    assert torch.equal(run(z1[numbers], seed=4, indices=numbers), whole[numbers])
    assert torch.equal(run(z1, seed=4, indices=torch.arange(7)), whole)
    for other in (run(z1, seed=5), run(z1, seed=4, indices=torch.arange(7) + 2**40)):
        assert (other - whole).abs().amin() > 0
    same = run(z1[:1].expand(7, -1, -1), seed=4)
    assert len(same.flatten(1)[:, 0].unique()) == 7


def test_pictures_of_a_pipeline_do_not_depend_on_its_batch_size():
    flow = lfm_fast.LatentFlow.from_pretrained("embedded")
    settings = {"method": "euler_maruyama", "num_steps": 3, "seed": 2}
    whole = flow.sample(4, **settings)
    # matrix products of another batch may be summed in another order
    torch.testing.assert_close(flow.sample(4, batch_size=3, **settings), whole, rtol=0, atol=1e-3)
    torch.testing.assert_close(flow.sample(1, indices=[3], **settings), whole[3:], rtol=0, atol=1e-3)


@both
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_without_diffusion_it_is_the_flow_to_the_bit(method, problem):
    times = time_grid(None, 7)
    results = [
        get_solver(which).integrate(Counting(problem.velocity), problem.start, times, Settings(path=Linear())).z
        for which in (method(scale=0.0), method.flow.name, method(lambda t: 0))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@both
def test_where_the_diffusion_is_infinite_the_flow_is_followed(method):
    moves = method("path", last_step="sde").schedule(time_grid(None, 4), Linear())  # g is infinite at t = 1
    per_step = method.flow.tableau.num_stages
    noisy = [any(move.noise for move in moves[n * per_step : (n + 1) * per_step]) for n in range(4)]
    assert noisy == [False, True, True, method is EulerMaruyama]  # at t = 0 there is no score, which Heun would need
    back = method("path", last_step="sde").schedule(time_grid(None, 4, 0.0, 1.0), Linear())
    noisy = [any(move.noise for move in back[n * per_step : (n + 1) * per_step]) for n in range(4)]
    assert noisy == [False, True, True, method is EulerMaruyama]


@pytest.mark.parametrize("g", [-1.0, float("nan"), float("inf")])
def test_a_diffusion_that_is_none_is_refused_before_the_model_is_called(g):
    def model(t, z):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=r"diffusion gives .* at t = 1, expected a number of 0 or more"):
        lfm_fast.sample(model, torch.ones(2, 3), method=EulerMaruyama(lambda t: g), num_steps=3)


# samples of a mixture

MEANS = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.2]], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STD = 0.3


def mixture(path):
    """The velocity of data SHARES_k N(MEANS_k, STD^2), exact: E[u | z], by the parts' posterior."""

    def velocity(t, z):
        alpha, sigma, d_alpha, d_sigma = path.coefficients(t.double())[..., None, None].unbind(0)  # (B, 1, 1)
        variance = (alpha * STD) ** 2 + sigma**2
        off = z.double()[:, None] - alpha * MEANS  # (B, K, 2)
        share = torch.softmax(SHARES.log() - off.square().sum(2) / (2 * variance[..., 0]), dim=1)
        rate = (alpha * d_alpha * STD**2 + sigma * d_sigma) / variance
        return (share[..., None] * (d_alpha * MEANS + rate * off)).sum(1).to(z.dtype)

    return velocity


def test_its_velocity_is_the_mixture_s():
    """By finite differences of many conditional samples' mean position: the flow carries the mean along alpha(t)."""
    t = torch.full((1,), 0.6, dtype=torch.float64)
    z1 = lfm_fast.noise(200_000, (2,), seed=8, dtype=torch.float64)
    part = torch.multinomial(SHARES, 200_000, replacement=True, generator=torch.Generator().manual_seed(1))
    z0 = MEANS[part] + STD * lfm_fast.noise(200_000, (2,), seed=9, dtype=torch.float64)
    z, u = 0.4 * z0 + 0.6 * z1, z1 - z0
    v = mixture(Linear())(t.expand(200_000), z)
    for test in (torch.ones_like(z), z, z.square(), z.sin()):  # E[(u - v) f(z)] = 0
        product = (u - v) * test
        assert (product.mean(0) / (product.std(0) / math.sqrt(200_000))).abs().max() < 4.5


@pytest.mark.parametrize("diffusion", ["sigma", "path", wave], ids=["sigma", "path", "function"])
@pytest.mark.parametrize(
    "count", [4000, pytest.param(60_000, marks=[pytest.mark.slow, pytest.mark.statistics])], ids=["few", "many"]
)
@pytest.mark.parametrize(("method", "num_steps"), [(EulerMaruyama, 200), (SDEHeun, 60)])
def test_samples_have_the_mean_and_covariance_of_the_data(method, num_steps, diffusion, count):
    """From noise; each of 5 moments within 4.5 of its standard errors (by chance outside: 7e-6 each) and the bias of
    the steps, for which a fiftieth of the largest variance is allowed."""
    z1 = lfm_fast.noise(count, (2,), seed=3)
    grid = time_grid(None, num_steps) if diffusion != wave else time_grid(None, num_steps, 1.0, 0.05)
    z = lfm_fast.sample(
        mixture(Linear()), z1, method=method(diffusion), time_grid=torch.tensor(grid, dtype=torch.float64), seed=6
    ).double()
    left = grid[-1]
    centres = (1 - left) * MEANS
    mean = SHARES @ centres
    within = torch.eye(2, dtype=torch.float64) * (((1 - left) * STD) ** 2 + left**2)
    covariance = (centres.T * SHARES) @ centres - torch.outer(mean, mean) + within
    off = z - mean
    products = off[:, :, None] * off[:, None, :]
    for found, true in ((off, torch.zeros(2, dtype=torch.float64)), (products, covariance)):
        error = found.std(0) / math.sqrt(count)
        assert ((found.mean(0) - true).abs() <= 4.5 * error + 0.02 * covariance.max()).all(), (
            found.mean(0),
            true,
            error,
        )
    # and it is no disguised flow: a sample ends elsewhere than along it
    flow = lfm_fast.sample(mixture(Linear()), z1[:100], method="heun", num_steps=50)
    assert (flow - z[:100]).abs().mean() > 0.3

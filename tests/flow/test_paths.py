"""The probability paths: convention, derivatives, conversions, marginals. All tolerances are float64 rounding unless
said."""

import json
import math

import pytest
import torch

import lfm_fast
from lfm_fast.flow.paths import (
    PATHS,
    Linear,
    Path,
    VarianceExploding,
    VariancePreserving,
    VariancePreservingTrig,
    describe,
    make_path,
)

ALL = [
    Linear(),
    Linear(sigma_min=1e-5),
    VariancePreserving(),
    VariancePreserving(beta_min=0.5, beta_max=3.0),
    VariancePreservingTrig(),
    VarianceExploding(sigma_min=0.01, sigma_max=50.0),
]
each_path = pytest.mark.parametrize("path", ALL, ids=repr)


def times(path, count=9):
    return torch.linspace(path.t_min, path.t_max, count, dtype=torch.float64)


@each_path
def test_derivatives_are_those_of_autograd(path):
    t = times(path, 33).requires_grad_()
    for function, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        value = function(t)
        expected = torch.autograd.grad(value.sum(), t, allow_unused=True)[0] if value.requires_grad else None
        expected = torch.zeros_like(t) if expected is None else expected
        torch.testing.assert_close(derivative(t.detach()), expected, rtol=1e-12, atol=1e-14)


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_four_functions_keep_dtype_and_shape_and_are_finite_on_the_whole_range(path, dtype):
    t = times(path).to(dtype).reshape(3, 3)
    for function in (path.alpha, path.sigma, path.d_alpha, path.d_sigma):
        value = function(t)
        assert value.dtype == dtype
        assert value.shape == t.shape
        assert value.isfinite().all()


@each_path
def test_coefficients_of_float32_times_are_rounded_from_float64(path):
    t = times(path).float()
    wide = path.coefficients(t.double())
    assert path.coefficients(t).dtype == torch.float32
    assert torch.equal(path.coefficients(t), wide.float())
    torch.testing.assert_close(
        wide, torch.stack([f(t.double()) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma)])
    )


@each_path
def test_time_zero_is_data_and_time_one_is_noise(path):
    start, end = path.coefficients(torch.tensor([path.t_min, 1.0], dtype=torch.float64)).unbind(1)
    assert start[0] == pytest.approx(1.0, abs=1e-5)
    assert start[1] < 0.02  # sigma: 0, LFM's 1e-5, VP's sqrt(beta_min 1e-5), VE's sigma_min
    if isinstance(path, VarianceExploding):
        assert end[1] == pytest.approx(50.0)
    else:
        # what data is left at t = 1; exp(-0.5 * 10.05) = 0.0066 for the usual VP, 0.42 for the short one
        assert end[0] == pytest.approx(
            math.exp(-0.25 * (path.beta_min + path.beta_max)) if hasattr(path, "beta_min") else 0
        )
    z_1 = torch.randn(2, 3, 4)
    torch.testing.assert_close(path.prior(z_1), end[1].float() * z_1)


def test_lfm_target():
    path, t = Linear(sigma_min=1e-5), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    z_0, z_1 = torch.randn(2, 3, 5, dtype=torch.float64)
    z_t, target = path.interpolate(z_0, z_1, t)
    s = t[:, None]
    torch.testing.assert_close(z_t, (1 - s) * z_0 + (1e-5 + (1 - 1e-5) * s) * z_1, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(target, (1 - 1e-5) * z_1 - z_0, rtol=1e-14, atol=1e-14)


@each_path
def test_the_target_is_the_time_derivative_of_the_interpolant(path):
    z_0, z_1 = torch.randn(2, 9, 2, 3, dtype=torch.float64)
    t, h = times(path, 11)[1:-1], 1e-6
    forward, backward = (path.interpolate(z_0, z_1, t + step)[0] for step in (h, -h))
    target = path.interpolate(z_0, z_1, t)[1]
    # central differences: truncation h^2 z''' / 6 and rounding 1e-16 |z| / h, both below 1e-6 of the largest value
    torch.testing.assert_close((forward - backward) / (2 * h), target, rtol=1e-6, atol=1e-6 * float(target.abs().max()))


@each_path
def test_conversions_find_what_made_the_velocity_and_go_back(path):
    z_0, z_1 = torch.randn(2, 7, 2, 3, dtype=torch.float64)
    t = times(path, 9)[1:-1]  # score and noise need sigma > 0 and alpha > 0
    z, velocity = path.interpolate(z_0, z_1, t)
    score = -z_1 / path.sigma(t)[:, None, None]
    close = {"rtol": 1e-9, "atol": 1e-9}  # alpha falls to 0.02 and sigma to 0.03 here: 1e-16 / 1e-4 and some steps
    torch.testing.assert_close(path.data_from_velocity(velocity, z, t), z_0, **close)
    torch.testing.assert_close(path.noise_from_velocity(velocity, z, t), z_1, **close)
    torch.testing.assert_close(path.score_from_velocity(velocity, z, t), score, **close)
    torch.testing.assert_close(path.velocity_from_data(z_0, z, t), velocity, **close)
    torch.testing.assert_close(path.velocity_from_noise(z_1, z, t), velocity, **close)
    torch.testing.assert_close(path.velocity_from_score(score, z, t), velocity, **close)


def test_conversions_hold_at_the_ends_of_the_straight_path():
    z_0, z_1 = torch.randn(2, 2, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    z, velocity = Linear().interpolate(z_0, z_1, t)
    torch.testing.assert_close(Linear().data_from_velocity(velocity, z, t), z_0, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(Linear().noise_from_velocity(velocity, z, t), z_1, rtol=1e-14, atol=1e-14)


@each_path
def test_marginal_of_gaussian_data(path):
    """z_0 ~ N(m, s^2) makes z_t ~ N(alpha m, alpha^2 s^2 + sigma^2), whose flow is mean' + (var' / 2 var)(z - mean)."""
    m, s = 0.7, 0.4
    t = times(path, 9)[1:-1].requires_grad_()
    mean, var = path.alpha(t) * m, (path.alpha(t) * s) ** 2 + path.sigma(t) ** 2
    d_var = torch.autograd.grad(var.sum(), t)[0]
    t, mean, var = t.detach(), mean.detach()[:, None], var.detach()[:, None]
    z = mean + var.sqrt() * torch.linspace(-3, 3, 5, dtype=torch.float64)
    velocity = (path.d_alpha(t) * m)[:, None] + d_var[:, None] / (2 * var) * (z - mean)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(path.score_from_velocity(velocity, z, t), -(z - mean) / var, **close)
    data = m + path.alpha(t)[:, None] * s**2 / var * (z - mean)
    torch.testing.assert_close(path.data_from_velocity(velocity, z, t), data, **close)


def test_variance_preserving_keeps_its_digits_near_zero():
    path = VariancePreserving()
    for t in (1e-12, 1e-8, 1e-5):
        integral = 0.1 * t + 0.5 * 19.9 * t * t
        series = math.sqrt(integral - integral**2 / 2 + integral**3 / 6)
        assert float(path.sigma(torch.tensor(t, dtype=torch.float64))) == pytest.approx(series, rel=1e-14)
        # float32 knows 1 - exp(-1e-6) to 6 % only; with expm1 to some ulp
        assert float(path.sigma(torch.tensor(t, dtype=torch.float32))) == pytest.approx(series, rel=1e-6)
    t = times(path)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t), rtol=1e-15, atol=1e-15)


def test_paths_by_name_and_from_the_package():
    assert lfm_fast.paths.Linear is Linear
    assert make_path("linear", sigma_min=1e-5) == Linear(sigma_min=1e-5)
    assert {type(make_path(n, **({"sigma_min": 1, "sigma_max": 2} if n == "ve" else {}))) for n in PATHS} == {
        Linear,
        VariancePreserving,
        VariancePreservingTrig,
        VarianceExploding,
    }


@each_path
def test_a_path_described_is_made_again(path):
    assert make_path(**json.loads(json.dumps(describe(path)))) == path


def test_a_path_of_ones_own_has_no_name_to_be_written_under():
    class Mine(Linear):
        pass

    with pytest.raises(ValueError, match="Mine is no path of the registry"):
        describe(Mine())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(sigma_min=-1e-5), "sigma_min is -1e-05"),
        (lambda: Linear(sigma_min=1.0), "expected a number in"),
        (lambda: VariancePreserving(beta_min=0.0), "0 < beta_min"),
        (lambda: VarianceExploding(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max"),
        (lambda: make_path("cosine"), "Unknown path 'cosine'; there are linear"),
        (lambda: make_path(["linear"]), "Unknown path"),
        (lambda: make_path("linear", beta=1), "does not take these arguments"),
    ],
)
def test_errors_say_what_came(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_path_must_define_all_four_functions():
    class Half(Path):
        def alpha(self, t):
            return 1 - t

    with pytest.raises(TypeError, match="abstract"):
        Half()

"""Sampling around known latents without training, held to a flow whose conditional distribution is known."""

import pytest
import torch

import lfm_fast
from lfm_fast.flow.paths import Linear, VarianceExploding, VariancePreserving
from lfm_fast.guidance import CFGZeroStar
from lfm_fast.tasks.projection import _go_back, project

CORRELATION, VALUE = 0.9, 1.5
COVARIANCE = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64)
SPREADS, AXES = torch.linalg.eigh(COVARIANCE)
KNOWN = torch.tensor([True, False])


def gaussian(t, z):
    """The exact velocity from noise to N(0, COVARIANCE) on the straight path: along its axes (t - (1 - t) L) w / C."""
    t, w = t.double()[:, None], z.double() @ AXES
    spread = (1 - t) ** 2 * SPREADS + t**2
    return (((t - (1 - t) * SPREADS) / spread * w) @ AXES.T).to(z)


def moments(**settings):
    z_0 = torch.tensor([[VALUE, torch.nan]]).expand(4000, 2)  # what is not known is never looked at
    z = project(gaussian, z_0, KNOWN, num_steps=20, **settings)
    assert (z[:, 0] == VALUE).all()
    return float(z[:, 1].mean()), float(z[:, 1].var())


@pytest.mark.parametrize("method", ["heun", "dopri5"])
def test_resampling_leads_to_the_conditional_distribution(method):
    """N(0.9 x, 1 - 0.9^2) given x. Going straight on leaves half of the way to the mean; 4 rounds a fifth, 10 a
    twentieth (measured once on 8,000 samples: 0.67, 1.15, 1.27 of 1.35). The mean of 4,000 has an error of 0.012."""
    mean, variance = CORRELATION * VALUE, 1 - CORRELATION**2
    straight = moments(method=method)
    better = moments(method=method, resamplings=4)
    assert abs(straight[0] - mean) > 0.5
    assert abs(better[0] - mean) < 0.26
    assert abs(better[1] - variance) < 0.1 < abs(straight[1] - variance)
    if method == "heun":
        best = moments(method=method, resamplings=10)
        assert abs(best[0] - mean) < 0.12
        assert abs(best[1] - variance) < 0.05


@pytest.mark.parametrize("path", [Linear(), VariancePreserving(), VarianceExploding(0.01, 5.0)])
def test_going_back_adds_the_noise_of_the_path(path):
    """Data and noise at t become data under as much noise as there is at s; of the known latents, the very noise."""
    t, s = 0.3, 0.7
    z_0, z_1, n = (lfm_fast.noise(20_000, (1,), seed=k, dtype=torch.float64) for k in range(3))

    def at(time, noise):
        return path.interpolate(z_0, noise, torch.full((20_000,), time, dtype=torch.float64))[0]

    z, again = _go_back(path, at(t, z_1), z_1, t, s, n)
    torch.testing.assert_close(z, at(s, again), atol=1e-12, rtol=1e-12)
    assert abs(float(again.mean())) < 4 * 20_000**-0.5
    assert abs(float(again.var()) - 1) < 4 * (2 / 20_000) ** 0.5
    assert not torch.equal(again, z_1)


def test_a_sample_depends_on_its_number_alone():
    z_0 = torch.full((6, 2), VALUE)
    settings = {"method": "heun", "num_steps": 10, "resamplings": 3, "pieces": 4, "seed": 3}
    together = project(gaussian, z_0, KNOWN, **settings)
    alone = project(gaussian, z_0[:2], KNOWN, indices=torch.tensor([4, 1]), **settings)
    torch.testing.assert_close(alone, together[[4, 1]], atol=1e-6, rtol=0)
    assert not torch.allclose(project(gaussian, z_0, KNOWN, **{**settings, "seed": 4}), together)


def test_evaluations_are_multiplied_and_times_kept():
    times = []

    def watched(t, z):
        times.append(float(t[0]))
        return gaussian(t, z)

    z_0 = torch.full((2, 2), VALUE)
    project(watched, z_0, KNOWN, method="euler", time_grid="lfm", num_steps=7, resamplings=2, pieces=3)
    grid = torch.linspace(1, 1e-5, 7, dtype=torch.float64).tolist()
    expected = [*grid[0:2], *grid[0:2], *grid[2:4], *grid[2:4], *grid[4:6], *grid[4:6]]
    assert times == pytest.approx(expected, abs=1e-6)
    times.clear()
    project(watched, z_0, KNOWN, method="euler", num_steps=2, resamplings=3)  # more pieces than steps
    assert times == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"resamplings": 0}, "resamplings is 0"),
        ({"pieces": 2.5}, "pieces is 2.5"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"return_stats": True}, "return_stats is for lfm_fast.sample"),
        ({"t_start": 0.5}, "t_start is for lfm_fast.sample"),
        ({"time_grid": [0.5, 0.2, 0.0]}, "samples begin as noise"),
        ({"resamplings": 2, "method": "euler_maruyama"}, "take heun"),
        ({"resamplings": 2, "callback": print}, "callback is for"),
        ({"resamplings": 2, "guidance": CFGZeroStar(2.0)}, "zero_steps"),
        ({"method": "hein"}, "nearest: heun"),
    ],
)
def test_what_cannot_be_is_said(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        project(gaussian, torch.zeros(2, 2), KNOWN, **settings)

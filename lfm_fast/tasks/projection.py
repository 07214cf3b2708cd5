"""Inpainting without training for it: any flow, sampled around the latents that are known."""

import math
from itertools import pairwise

import torch

from lfm_fast import ops
from lfm_fast.flow.noise import noise
from lfm_fast.guidance import KnownLatents, LinearGuidance
from lfm_fast.ops.streams import STREAM_SDE
from lfm_fast.sampling import choose_path, sample
from lfm_fast.solvers import get_solver
from lfm_fast.solvers.grids import time_grid

_FIRST_BLOCK = 2**31  # of the counter, for noise that is added again: stochastic solvers count from 0


def project(
    model,
    z_0,
    known,
    *,
    seed=0,
    indices=None,
    resamplings=1,
    pieces=10,
    path=None,
    guidance=None,
    guidance_scale=1.0,
    guidance_interval=(0.0, 1.0),
    **sampling,
):
    """Samples that have the known latents of z_0: (B, C, h, w), by a network that knows nothing of inpainting.

    The state follows the path from its sample's noise to the known latents where they are known, and the network
    elsewhere (`lfm_fast.guidance.KnownLatents`). With resampling, as in RePaint, the times are cut into `pieces`; each
    is gone through `resamplings` times, and in between noise is added to go back to its start, so that what was painted
    has another chance to agree with what is known:

        z_s = (alpha_s / alpha_t) z_t + sqrt(sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2) n,    t < s

    Args:
        model: any velocity, as of `lfm_fast.sample`.
        z_0: (B, C, h, w) latents; known: bool, of a shape that broadcasts to it.
        seed, indices: sample i starts from the noise of number indices[i] (None being i), and goes back by it.
        resamplings: how often each piece is gone through; 1 goes straight on. It multiplies the evaluations.
        pieces: how many there are; of a method of fixed steps at most num_steps.
        guidance, guidance_scale, guidance_interval, path, sampling: as of `lfm_fast.sample`.

    Raises ValueError for what `lfm_fast.sample` refuses, and for numbers of pieces and resamplings that are none.

    >>> z_0, known = torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    >>> model = lambda t, z: z
    >>> bool((project(model, z_0, known, method="euler", num_steps=20, resamplings=3)[known] == 1).all())
    True

    Source: Lugmayr et al., "RePaint", arXiv 2201.09865, eq. 8, algorithm 1 and section 4.2.
    """
    counts = {"resamplings": resamplings, "pieces": pieces, "num_steps": sampling.get("num_steps", 50)}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a whole number from 1 on.")
    for name in ("trajectory", "return_stats", "t_start"):
        if sampling.get(name):
            raise ValueError(f"{name} is for lfm_fast.sample; here everything begins with noise and ends with latents.")
    if guidance is None:
        guidance = LinearGuidance(guidance_scale, guidance_interval)
    path = choose_path(model, path)
    times = _times(sampling, path)
    if resamplings > 1:
        _check_goes_back(guidance, sampling)
    index = torch.arange(len(z_0)) if indices is None else indices
    z_1 = noise(len(z_0), z_0.shape[1:], seed=seed, indices=index.to(z_0.device))
    arguments = {**sampling, "path": path, "seed": seed, "indices": index}
    z = path.prior(z_1)
    if resamplings == 1:
        z = sample(model, z, guidance=KnownLatents(z_0, known, z_1, guidance), **arguments)
    else:
        again = _Noise(index.to(z_0.device), z_0.shape[1:], seed)
        z = _resample(model, z, z_0, known, z_1, guidance, arguments, again, resamplings, _cut(times, pieces))
    return torch.where(known, z_0.to(z), z)


def _times(sampling, path):
    """The times of the integration. Raises ValueError for those that do not begin at noise."""
    grid = sampling.get("time_grid")
    grid = "lfm" if grid is None and sampling.get("compat") == "lfm" else grid
    times = time_grid(grid, sampling.get("num_steps", 50), t_end=sampling.get("t_end", 0.0), path=path)
    start, noisiest = path.sigma(torch.tensor([times[0], path.t_max], dtype=torch.float64)).tolist()
    if start < 0.8 * noisiest:
        raise ValueError(
            f"time_grid begins at t = {times[0]:g}, but samples begin as noise; begin near {path.t_max:g}."
        )
    return times


def _check_goes_back(guidance, sampling):
    """Raise ValueError for what cannot be cut into pieces."""
    if getattr(guidance, "zero_steps", 0):
        raise ValueError("guidance leaves out the first steps (zero_steps), which goes with resamplings=1 alone.")
    if sampling.get("callback"):
        raise ValueError("callback is for resamplings=1; with more, an integration goes back and has many parts.")
    solver = get_solver(sampling.get("method", "dopri5"))
    if solver.stochastic:
        raise ValueError(
            f"{solver.name} draws the same noise in each piece; resampling adds noise itself, so take heun."
        )


def _cut(times, count):
    """The times as `count` lists, or as many as there are steps, each beginning where the one before ends."""
    count = min(count, len(times) - 1)
    bounds = [round(k * (len(times) - 1) / count) for k in range(count + 1)]
    return [times[first : last + 1] for first, last in pairwise(bounds)]


def _resample(model, z, z_0, known, z_1, guidance, arguments, again, resamplings, pieces):
    path = arguments["path"]
    for times in pieces:
        for round_ in range(resamplings):
            around = KnownLatents(z_0, known, z_1, guidance)
            grid = {"time_grid": times, "t_start": times[0], "t_end": times[-1]}
            z = sample(model, z, guidance=around, **{**arguments, **grid})
            if round_ + 1 < resamplings:
                z, z_1 = _go_back(path, z, z_1, times[-1], times[0], again())
    return z


def _go_back(path, z, z_1, t, s, n):
    """The state at s after the noise n is added to that at t < s, and the noise of the known latents then.

    What is alpha_t z_0 + sigma_t z_1 at t is alpha_s z_0 + sigma_s z_1' at s, with a standard normal z_1' again.
    """
    (alpha_t, alpha_s), (sigma_t, sigma_s) = path.coefficients(torch.tensor([t, s], dtype=torch.float64))[:2].tolist()
    kept = alpha_s / alpha_t
    added = math.sqrt(max(sigma_s**2 - (kept * sigma_t) ** 2, 0.0))
    return kept * z + added * n, (kept * sigma_t / sigma_s) * z_1 + (added / sigma_s) * n


class _Noise:
    """Each call gives fresh standard normals, by sample number."""

    def __init__(self, index, shape, seed):
        self.index, self.shape, self.seed, self.block = index, shape, seed, _FIRST_BLOCK

    def __call__(self):
        count = math.prod(self.shape)
        normals = ops.philox_normal(self.index, count, self.seed, STREAM_SDE, self.block)
        self.block += (count + 3) // 4
        return normals.view(len(self.index), *self.shape)

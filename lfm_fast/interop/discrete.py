"""The discrete noise schedules of DDPM as a path in continuous time."""

import numpy as np
import torch
from torch import Tensor

from lfm_fast.flow.paths import Path


class DiscretePath(Path):
    """The variance-preserving path through a table of N steps, alpha_bar_i = prod_(j <= i) (1 - beta_j).

        alpha((i + 1) / N) = sqrt(alpha_bar_i),    sigma = sqrt(1 - alpha^2),    i = 0 ... N - 1

    so that step i of the table is at t = (i + 1) / N, a network's timestep is i = N t - 1, and t = 0 is data without
    noise. Between the table's times log alpha_bar is a cubic spline or, where that would rise anywhere, the monotone
    cubic of Fritsch and Carlson (SIAM J. Numer. Anal. 17, 1980). The path begins at t_min = 1 / N: the table has no
    noise less than that of its step 0, so that much is left in what is sampled.

    alphas_cumprod: (N,), falling, in (0, 1); `linear_betas` makes that of DiT. Raises ValueError for another table.

    >>> path = DiscretePath(linear_betas())
    >>> path.timestep(torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64)).tolist()
    [0.0, 499.0, 999.0]
    >>> round(float(path.alpha(torch.tensor(1.0, dtype=torch.float64))), 5)
    0.00635

    Source: Ho et al., arXiv 2006.11239, eq. 4; Song et al., arXiv 2011.13456, appendix B, for the limit of many steps.
    """

    def __init__(self, alphas_cumprod: Tensor):
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod is {tuple(table.shape)}, expected a table of at least two steps.")
        if not bool((table > 0).all() and (table < 1).all() and (table.diff() < 0).all()):
            raise ValueError("alphas_cumprod has to fall from step to step and to stay inside (0, 1).")
        self.alphas_cumprod, self.num_timesteps = table, len(table)
        self.t_min, self.t_max = 1 / len(table), 1.0
        self._pieces = _falling_cubics(torch.cat([torch.zeros(1, dtype=torch.float64), table.log()]))

    def __repr__(self):
        return f"DiscretePath({self.num_timesteps} steps)"

    def timestep(self, t: Tensor) -> Tensor:
        """The network's timestep i = N t - 1 of times t, any shape and floating type; no whole number in between."""
        return self.num_timesteps * t - 1

    def _piece(self, t):
        """The polynomial of each time, four coefficients, and how far t is past its beginning."""
        self._pieces = self._pieces.to(t.device)  # once
        number = (t * self.num_timesteps).floor().clamp(0, self.num_timesteps - 1)
        return self._pieces[:, number.long()].to(t.dtype), t - number / self.num_timesteps

    def _log(self, t):
        """log alpha_bar."""
        (a, b, c, d), x = self._piece(t)
        return ((a * x + b) * x + c) * x + d

    def _slope(self, t):
        (a, b, c, _), x = self._piece(t)
        return (3 * a * x + 2 * b) * x + c

    def alpha(self, t):
        return torch.exp(0.5 * self._log(t))

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(self._log(t)))

    def d_alpha(self, t):
        return 0.5 * self._slope(t) * self.alpha(t)

    def d_sigma(self, t):
        return -0.5 * self._slope(t) * torch.exp(self._log(t)) / self.sigma(t)  # sigma sigma' = -alpha alpha'


def _falling_cubics(values: Tensor) -> Tensor:
    """(4, N): the cubic on each of N equal parts of [0, 1] through `values`, highest power first, in t - start."""
    from scipy.interpolate import CubicSpline, PchipInterpolator

    nodes = torch.linspace(0, 1, len(values), dtype=torch.float64)
    smooth = CubicSpline(nodes.numpy(), values.numpy())
    a, b, c, _ = smooth.c
    step = 1 / (len(values) - 1)
    with_turns = np.divide(-b, 3 * a, out=np.zeros_like(a), where=a != 0).clip(0, step)  # where a slope is extreme
    slopes = np.stack([(3 * a * x + 2 * b) * x + c for x in (0, with_turns, step)])
    chosen = smooth if (slopes < 0).all() else PchipInterpolator(nodes.numpy(), values.numpy())
    return torch.from_numpy(chosen.c.copy())


def linear_betas(num_timesteps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """alphas_cumprod (N,) float64 of betas that rise linearly from `first` to `last` (arXiv 2006.11239, section 4)."""
    betas = torch.linspace(first, last, num_timesteps, dtype=torch.float64)
    return torch.cumprod(1 - betas, 0)

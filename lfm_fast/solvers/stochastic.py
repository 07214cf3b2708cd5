"""Solvers of the stochastic equation that has the marginals of the flow, in either direction of time.

    dz = u dt + (g^2 / 2) s |dt| + g dW,      s = grad log p_t = -noise / sigma

for any diffusion coefficient g(t) >= 0: what g spreads, the score s gathers again. The noise that u predicts is linear
in z and u, so that a step is one move. Noise comes from stream 5 by sample number: it does not depend on the batch.

Source: Song et al., arXiv 2011.13456, section 3.3 and appendix D.1; Ma et al., arXiv 2401.08740, section 2.3 (any g).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from lfm_fast.solvers.marginals import marginals
from lfm_fast.solvers.runge_kutta import RungeKutta
from lfm_fast.solvers.schedule import Move, point, velocity
from lfm_fast.solvers.tableaus import EULER, HEUN


@dataclass(frozen=True)
class Stochastic:
    """What both methods are told.

    diffusion: "sigma", g^2 = 2 sigma(t); "path", g^2 = 2 (sigma sigma' - sigma^2 alpha' / alpha), the diffusion whose
    marginals the path has (of VariancePreserving, beta); or a function g of a float t. scale: a factor of g^2; 0 leaves
    the flow. last_step: "ode" makes the last step without noise, which would stay in the result; "sde" with it.

    A step follows the flow as well where the score's pull would overshoot, g^2 |dt| > 4 sigma^2 (explicit methods are
    unstable from there on): so where g is infinite, and at sigma = 0, where the score is.
    """

    diffusion: str | Callable[[float], float] = "sigma"
    scale: float = 1.0
    last_step: str = "ode"
    name: ClassVar[str]
    order: ClassVar[int]  # of the error of means and covariances
    flow: ClassVar[RungeKutta]  # the same method without noise

    def __post_init__(self):
        if not callable(self.diffusion) and self.diffusion not in ("sigma", "path"):
            raise ValueError(f"diffusion is {self.diffusion!r}, expected 'sigma', 'path' or a function g(t).")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not 0.0 <= self.scale < math.inf:
            raise ValueError(f"scale is {self.scale!r}, expected a number of 0 or more, the factor of g^2.")
        if self.last_step not in ("ode", "sde"):
            raise ValueError(f"last_step is {self.last_step!r}, expected 'ode' (without noise) or 'sde'.")

    def evaluations(self, num_steps):
        return self.flow.evaluations(num_steps)

    def schedule(self, times, path):
        known, moves = marginals(path, times), []
        squares = [self._square(t, at) for t, at in zip(times, known)]
        for n, (before, after) in enumerate(pairwise(times)):
            ends = slice(n, n + self.flow.tableau.num_stages)  # where this method evaluates in a step: start, and end
            stochastic = max(squares[ends]) > 0.0 and (n < len(times) - 2 or self.last_step == "sde")
            for at, square in zip(known[ends], squares[ends]):
                stochastic = stochastic and square * abs(after - before) <= 4.0 * at.sigma**2 > 0.0
            first = len(moves)
            if stochastic:
                moves += self._step(first, n, before, after, known[ends], squares[ends])
            else:
                moves += self.flow.step(first, before, after)
        return moves

    def _square(self, t, at):
        """g^2 at time t."""
        if self.diffusion == "sigma":
            return self.scale * 2.0 * at.sigma
        if self.diffusion == "path":
            growth = at.d_sigma - at.sigma * at.d_alpha / at.alpha if at.alpha > 0.0 else math.inf
            return self.scale * 2.0 * at.sigma * growth
        g = float(self.diffusion(t))
        if not 0.0 <= g < math.inf:
            raise ValueError(f"diffusion gives {g} at t = {t:g}, expected a number of 0 or more.")
        return self.scale * g * g


def _drift(j, at, square, dt):
    """What point j moves by in dt without noise."""
    return dt * velocity(j) - (0.5 * abs(dt) * square / at.sigma) * at.noise(j)


@dataclass(frozen=True)
class EulerMaruyama(Stochastic):
    """z' = z + drift dt + g sqrt(|dt|) normal, with everything taken at the start of the step.

    >>> import torch, lfm_fast
    >>> method = EulerMaruyama(diffusion="sigma", scale=0.5)
    >>> lfm_fast.sample(lambda t, z: z, lfm_fast.noise(4, (2,)), method=method, num_steps=20, seed=3).shape
    torch.Size([4, 2])

    Source: Kloeden and Platen, "Numerical Solution of Stochastic Differential Equations", section 10.2.
    """

    name: ClassVar[str] = "euler_maruyama"
    order: ClassVar[int] = 1
    flow: ClassVar[RungeKutta] = RungeKutta("euler", EULER)

    def _step(self, first, n, before, after, known, squares):
        (at,), (square,), dt = known, squares, after - before
        return [Move(before, point(first) + _drift(first, at, square, dt), noise=math.sqrt(square * abs(dt)), draw=n)]


@dataclass(frozen=True)
class SDEHeun(Stochastic):
    """Heun's method with one normal per step in both stages: second order in means and covariances, as g is of t only.

    The variance of a step is that of g^2 by the trapezoidal rule.

    Source: Kloeden and Platen, "Numerical Solution of Stochastic Differential Equations", section 15.1.
    """

    name: ClassVar[str] = "sde_heun"
    order: ClassVar[int] = 2
    flow: ClassVar[RungeKutta] = RungeKutta("heun", HEUN)

    def _step(self, first, n, before, after, known, squares):
        dt = after - before
        start, end = (_drift(first + k, known[k], squares[k], dt) for k in (0, 1))
        noise = {"noise": math.sqrt(0.5 * (squares[0] + squares[1]) * abs(dt)), "draw": n}
        return [
            Move(before, point(first) + start, arrives=False, **noise),
            Move(after, point(first) + 0.5 * start + 0.5 * end, **noise),
        ]

"""Explicit Runge-Kutta methods of a tableau."""

from dataclasses import dataclass
from itertools import pairwise

from lfm_fast.solvers.schedule import Combination, Move, point
from lfm_fast.solvers.tableaus import EULER, HEUN, Tableau


@dataclass(frozen=True)
class RungeKutta:
    """The formula (see lfm_fast.solvers.schedule) of a tableau.

        k_i = u(t + c_i dt, z + dt sum_j a_ij k_j),    z' = z + dt sum_i b_i k_i

    >>> import torch, lfm_fast
    >>> from lfm_fast.solvers.tableaus import Tableau
    >>> ralston = RungeKutta("ralston", Tableau(order=2, a=((), (2 / 3,)), b=(1 / 4, 3 / 4), c=(0, 2 / 3)))
    >>> z0 = lfm_fast.sample(lambda t, z: z, torch.ones(1, 1), method=ralston, num_steps=100)  # 1 / e
    >>> round(z0.item(), 4)
    0.3679

    Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section II.1.
    """

    name: str
    tableau: Tableau

    @property
    def order(self):
        return self.tableau.order

    def evaluations(self, num_steps):
        return self.tableau.num_stages * num_steps

    def schedule(self, times, path):
        return [
            move
            for step, span in enumerate(pairwise(times))
            for move in self.step(step * self.tableau.num_stages, *span)
        ]

    def step(self, first, before, after):
        """The moves of one step, the first of them being move number `first`."""
        dt, rows = after - before, [*self.tableau.a[1:], self.tableau.b]
        moves = []
        for c, row in zip(self.tableau.c, rows):
            weights = {("velocity", first + j): dt * weight for j, weight in enumerate(row)}
            # where two steps meet, their times are one number
            time = after if c == 1 else before + c * dt
            moves.append(Move(time, point(first) + Combination(weights), arrives=row is rows[-1]))
        return moves


@dataclass(frozen=True)
class HeunThenEuler:
    """Heun for the first steps and Euler for all that follow: LFM's Heun, written for 40 points, whatever their number.

    >>> HeunThenEuler().evaluations(39), HeunThenEuler().evaluations(49)
    (78, 88)
    """

    heun_steps: int = 39
    name: str = "lfm:heun40"
    order: int = 1

    def evaluations(self, num_steps):
        return num_steps + min(num_steps, self.heun_steps)

    def schedule(self, times, path):
        moves = []
        for step, span in enumerate(pairwise(times)):
            method = RungeKutta(self.name, HEUN if step < self.heun_steps else EULER)
            moves += method.step(len(moves), *span)
        return moves

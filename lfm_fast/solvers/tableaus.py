"""Runge-Kutta methods as data: k_i = u(t + c_i dt, z + dt sum_j a_ij k_j),  z' = z + dt sum_i b_i k_i.

Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section II.1.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """An explicit method: a is strictly lower triangular, row i holding its i entries; c_i = sum_j a_ij."""

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    @property
    def num_stages(self):
        return len(self.b)


EULER = Tableau(order=1, a=((),), b=(1,), c=(0,))

MIDPOINT = Tableau(order=2, a=((), (1 / 2,)), b=(0, 1), c=(0, 1 / 2))

HEUN = Tableau(order=2, a=((), (1,)), b=(1 / 2, 1 / 2), c=(0, 1))

# The classical one (Kutta 1901); torchdiffeq's "rk4" is the 3/8 rule.
RK4 = Tableau(
    order=4,
    a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0, 1 / 2, 1 / 2, 1),
)

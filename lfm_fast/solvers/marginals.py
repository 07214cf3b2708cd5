"""A path at the times of a grid, as methods use it that predict data or noise: floats in float64, on the host."""

from typing import NamedTuple

import torch

from lfm_fast.solvers.schedule import point, velocity


class Marginal(NamedTuple):
    """x = alpha data + sigma noise at one time, and the derivatives: what a velocity says of data and noise there."""

    alpha: float
    sigma: float
    d_alpha: float
    d_sigma: float

    @property
    def _determinant(self):
        return self.alpha * self.d_sigma - self.sigma * self.d_alpha

    def data(self, j):
        """(sigma' x - sigma v) / (alpha sigma' - sigma alpha') of point and velocity j, which stand at this time."""
        return (self.d_sigma / self._determinant) * point(j) - (self.sigma / self._determinant) * velocity(j)

    def noise(self, j):
        """(alpha v - alpha' x) / (alpha sigma' - sigma alpha') of point and velocity j."""
        return (self.alpha / self._determinant) * velocity(j) - (self.d_alpha / self._determinant) * point(j)


def marginals(path, times):
    """The Marginal at each of the times (floats)."""
    columns = path.coefficients(torch.tensor(times, dtype=torch.float64)).T
    return [Marginal(*column) for column in columns.tolist()]

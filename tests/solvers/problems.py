"""Differential equations with exact solutions, each sample with its own start, in float64; and a field that counts."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

_MATRIX = torch.tensor([[-0.6, 2.0], [-1.5, 0.2]], dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """velocity(t (B,), z (B, 2)) and exact(z_start, t_start, t_end)."""

    name: str
    velocity: Callable
    exact: Callable
    start: torch.Tensor  # (B, 2)


def _start(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def _logistic(z, s, e):
    return 1 / (1 + (1 / z - 1) * math.exp(-2 * (e - s)))


PROBLEMS = [
    Problem(
        "linear",
        lambda t, z: z @ _MATRIX.T,
        lambda z, s, e: z @ torch.linalg.matrix_exp((e - s) * _MATRIX).T,
        _start([1.0, -0.5], [0.2, 2.0], [-1.0, 0.3]),
    ),
    Problem("nonlinear", lambda t, z: 2 * z * (1 - z), _logistic, _start([0.2, 0.6], [0.9, 0.4], [0.5, 0.3])),
    Problem(
        "time-dependent",
        lambda t, z: z * (3 / (1 + t))[:, None],
        lambda z, s, e: z * ((1 + e) / (1 + s)) ** 3,
        _start([1.0, 2.0], [-0.5, 0.3], [0.1, 4.0]),
    ),
]


class Counting:
    """A field without guidance that counts its evaluations and keeps their times."""

    def __init__(self, velocity):
        self.velocity, self.nfe, self.times = velocity, 0, []

    def __call__(self, t, z):
        assert t.shape == (z.shape[0],)
        self.nfe += 1
        self.times.append(t.clone())
        return self.velocity(t, z), None, None

"""What a solver is told and what it hands back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every solver may be told; fixed-step ones have no use for tolerances."""

    atol: float = 1e-5
    rtol: float = 1e-5
    max_nfe: int | None = None  # evaluations after which the integration stops where it is
    trajectory: bool = False  # keep the state at every time of the grid
    on_step: Callable[[int, float, torch.Tensor], None] | None = None  # (steps done, t, z) after each accepted step
    inside: bool = True  # never evaluate outside the grid's times; False leaves torchdiffeq to step past the end


@dataclass(kw_only=True)
class Solution:
    """z (B, ...): the last state, at `time`; states: those at the times of the grid when a trajectory was asked for.

    `reached` is False where the budget of evaluations ended the integration before its last time.
    """

    z: torch.Tensor
    time: float
    accepted: int
    rejected: int = 0
    reached: bool = True
    states: list[torch.Tensor] | None = None

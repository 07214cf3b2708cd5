"""What a solver is told and what it hands back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every solver may be told; fixed-step ones have no use for tolerances."""

    atol: float = 1e-5
    rtol: float = 1e-5
    max_nfe: int | None = None  # evaluations after which the integration stops where it is
    trajectory: bool = False  # keep the state at every time of the grid
    # (steps done, t, z) after each accepted step, or, where samples step on their own, after each round of attempts,
    # with t (B,) float64; exactly False ends the integration there
    on_step: Callable[[int, float | torch.Tensor, torch.Tensor], bool | None] | None = None
    inside: bool = True  # never evaluate outside the grid's times; False leaves torchdiffeq to step past the end
    path: Any = None  # alpha, sigma and their derivatives, for methods that predict data or need the score
    seed: int = 0  # of the noise of stochastic methods,
    index: torch.Tensor | None = None  # by sample number, (B,) int64


@dataclass(kw_only=True)
class Solution:
    """z (B, ...): the last state; states: those at the times of the grid when a trajectory was asked for.

    The rest is sample by sample, (B,) on the CPU. time float64: where z is; nfe, accepted, rejected int64: evaluations
    and steps; reached bool: False where the budget of evaluations, or on_step, ended the integration before its last
    time. cancelled: it was on_step.
    """

    z: torch.Tensor
    time: torch.Tensor
    nfe: torch.Tensor
    accepted: torch.Tensor
    rejected: torch.Tensor
    reached: torch.Tensor
    cancelled: bool = False
    states: list[torch.Tensor] | None = None

    @classmethod
    def shared(cls, z, *, time, nfe, accepted, rejected=0, reached=True, cancelled=False, states=None):
        """The solution of a method that treats all samples alike: one number of each kind serves them all."""

        def per_sample(value, dtype):
            return torch.full(z.shape[:1], value, dtype=dtype)

        return cls(
            z=z,
            time=per_sample(time, torch.float64),
            nfe=per_sample(nfe, torch.int64),
            accepted=per_sample(accepted, torch.int64),
            rejected=per_sample(rejected, torch.int64),
            reached=per_sample(reached, torch.bool),
            cancelled=cancelled,
            states=states,
        )

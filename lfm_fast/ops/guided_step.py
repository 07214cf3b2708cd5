"""guided_step: guidance blend and any linear stage combination of a solver, in one pass over the state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lfm_fast.ops.interpolate import rows
from lfm_fast.ops.philox_normal import philox_normal

_SDE_STREAM = 5


def _reference(
    z, velocity, unconditional, scale, stored, weights, error_weights=None, atol=0.0, rtol=0.0,
    noise_scale=None, index=None, seed=0, offset=0, keep=False,
):  # fmt: skip
    state = rows(z)
    v = rows(velocity).to(z.dtype)
    if unconditional is not None:
        v = scale[:, None] * v + (1.0 - scale[:, None]) * rows(unconditional).to(z.dtype)
    stages = [v, *(rows(k) for k in stored)]
    z_next = weights[:, 0, None] * state
    for k, stage in enumerate(stages):
        z_next = z_next + weights[:, k + 1, None] * stage
    if noise_scale is not None:
        z_next = z_next + noise_scale[:, None] * philox_normal(index, state.shape[1], seed, _SDE_STREAM, offset)
    error = z.new_empty(0)
    if error_weights is not None:
        e = sum(error_weights[:, k, None] * stage for k, stage in enumerate(stages))
        ratio = e / (atol + rtol * torch.maximum(state.abs(), z_next.abs()))
        error = (ratio.square().sum(1) / max(ratio.shape[1], 1)).sqrt()
    blended = v.reshape(z.shape).clone() if keep else z.new_empty(0)
    return z_next.view(z.shape), blended, error


def guided_step(
    z: Tensor,
    velocity: Tensor,
    unconditional: Tensor | None,
    scale: Tensor | None,
    stored: Sequence[Tensor],
    weights: Tensor,
    error_weights: Tensor | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
    noise_scale: Tensor | None = None,
    index: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """z_next = w0 z + w1 v + sum_k w_(2+k) stored_k, v = scale velocity + (1 - scale) unconditional."""
    return _reference(
        z, velocity, unconditional, scale, stored, weights, error_weights, atol, rtol, noise_scale, index, seed,
        offset, keep,
    )  # fmt: skip

"""velocity_loss: per-sample weighted mean squared error of a velocity and its gradient, in one pass."""

import torch
from torch import Tensor

from lfm_fast.ops.interpolate import noise_like, rows


def _reference(velocity, target=None, weight=None, z_0=None, coefficients=None, index=None, seed=0, stream=0):
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    if target is None:
        d_alpha, d_sigma = coefficients[2][:, None], coefficients[3][:, None]
        target = d_alpha * rows(z_0) + d_sigma * noise_like(z_0, index, seed, stream)
    difference = rows(velocity).to(dtype) - rows(target).to(dtype)
    scale = 1.0 / max(difference.shape[1], 1)
    weight = torch.ones_like(difference[:, 0]) if weight is None else weight.to(dtype)
    loss = weight * (difference.square().sum(1) * scale)
    gradient = ((weight * (2.0 * scale))[:, None] * difference).to(velocity.dtype)
    return loss, gradient.view(velocity.shape)


def velocity_loss(
    velocity: Tensor,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    z_0: Tensor | None = None,
    coefficients: Tensor | None = None,
    index: Tensor | None = None,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """loss (B,) = weight * mean over elements of (velocity - target)^2."""
    return _reference(velocity, target, weight, z_0, coefficients, index, seed, stream)[0]

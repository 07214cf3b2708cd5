"""interpolate: the interpolant z_t and its velocity target in one pass over the latents."""

from torch import Tensor

from lfm_fast.ops.philox_normal import philox_normal


def rows(x: Tensor) -> Tensor:
    """(B, ...) -> (B, N), also where B or N is 0."""
    numel = 1
    for size in x.shape[1:]:
        numel = numel * size
    return x.reshape(x.shape[0], numel)


def noise_like(z: Tensor, index: Tensor, seed: int, stream: int) -> Tensor:
    return philox_normal(index, rows(z).shape[1], seed, stream).to(z.dtype)


def _reference(z_0, coefficients, z_1=None, index=None, seed=0, stream=0):
    data = rows(z_0)
    noise = noise_like(z_0, index, seed, stream) if z_1 is None else rows(z_1)
    alpha, sigma, d_alpha, d_sigma = coefficients[:, :, None].unbind(0)
    z_t, target = alpha * data + sigma * noise, d_alpha * data + d_sigma * noise
    return z_t.view(z_0.shape), target.view(z_0.shape)


def interpolate(
    z_0: Tensor,
    coefficients: Tensor,
    z_1: Tensor | None = None,
    index: Tensor | None = None,
    seed: int = 0,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """z_t = alpha z_0 + sigma z_1 and target = d_alpha z_0 + d_sigma z_1; coefficients (4, B)."""
    return _reference(z_0, coefficients, z_1, index, seed, stream)

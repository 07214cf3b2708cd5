"""A mixture of Gaussians per label, whose flow is known in closed form whatever the path and the convention.

Elements of a sample are independent, and each follows z = alpha z_0 + sigma z_1 with z_0 from the mixture of its label:
a mixture again, whose posterior means are written down and whose flow, in one dimension, keeps the cumulative
distribution. No time enters but through alpha and sigma, so every convention of time is tested by the same formulas.
"""

import torch

MEANS = torch.tensor([[-1.0, 0.5, 2.0], [0.3, -0.4, 1.1], [0.0, 0.0, 0.0]], dtype=torch.float64)
STDS = torch.tensor([[0.6, 0.5, 0.8], [0.9, 0.5, 0.7], [0.8, 1.2, 0.6]], dtype=torch.float64)
SHARES = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.4, 0.3, 0.3]], dtype=torch.float64)


def _component(table, y, z):
    """(B, 1, ..., 3): the parameters of each sample's components."""
    return table[y].reshape(-1, *[1] * (z.ndim - 1), 3)


def _like(value, z):
    value = torch.as_tensor(value, dtype=torch.float64)
    return value.reshape(-1, *[1] * z.ndim) if value.ndim else value


def posterior(z, alpha, sigma, y):
    """E[z_0 | z] and E[z_1 | z], each of the shape of z; alpha, sigma numbers or (B,)."""
    alpha, sigma = _like(alpha, z), _like(sigma, z)
    mean, std, share = (_component(table, y, z) for table in (MEANS, STDS, SHARES))
    variance = alpha**2 * std**2 + sigma**2
    offset = z[..., None] - alpha * mean
    weight = torch.softmax(share.log() - 0.5 * variance.log() - 0.5 * offset**2 / variance, dim=-1)
    data = (weight * (mean + alpha * std**2 / variance * offset)).sum(-1)
    noise = (weight * sigma / variance * offset).sum(-1)
    return data, noise


def cumulative(z, alpha, sigma, y):
    mean, std, share = (_component(table, y, z) for table in (MEANS, STDS, SHARES))
    scale = (alpha**2 * std**2 + sigma**2).sqrt()
    return (share * torch.special.ndtr((z[..., None] - alpha * mean) / scale)).sum(-1)


def flowed(z, y, start, end):
    """Where the exact flow takes z from (alpha, sigma) = start to those of `end`: by bisection, to 1e-13."""
    level = cumulative(z, *start, y)
    low, high = torch.full_like(z, -60.0), torch.full_like(z, 60.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = cumulative(middle, *end, y) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def start(*shape, seed=0):
    """Noise, float64, inside three standard deviations, where bisecting a cumulative distribution loses no digits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).clamp(-3, 3)

"""The flow matching objective: regress the network onto the conditional velocity."""

import torch

from lfm_fast import ops
from lfm_fast.flow.checks import FLOATS, check_labels, check_model, check_times, check_velocity, describe
from lfm_fast.flow.noise import check_indices, check_seed
from lfm_fast.flow.paths import Linear, Path
from lfm_fast.flow.time_samplers import draw
from lfm_fast.ops.streams import STREAM_NOISE


def _data_weight(path, t):
    """An error du of the velocity is dz_0 = sigma du / (alpha sigma' - sigma alpha') of the data; t^2 on Linear()."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(t)
    return (sigma / (alpha * d_sigma - sigma * d_alpha)).square()


def _noise_weight(path, t):
    """An error du of the velocity is dz_1 = alpha du / (same) of the noise; on Linear() (1 - t)^2."""
    alpha, sigma, d_alpha, d_sigma = path.coefficients(t)
    return (alpha / (alpha * d_sigma - sigma * d_alpha)).square()


# name -> (path, t (B,)) -> weights (B,): "data" and "noise" make the loss that of a network predicting z_0 or z_1
WEIGHTINGS = {"data": _data_weight, "noise": _noise_weight}


def flow_matching_loss(
    model,
    z_0,
    y=None,
    *,
    path=None,
    z_1=None,
    t=None,
    seed=None,
    indices=None,
    time_sampler="uniform",
    weighting=None,
    model_kwargs=None,
):
    """The conditional flow matching loss, differentiable in the model's parameters.

        E || model(t, z_t, y) - (alpha'(t) z_0 + sigma'(t) z_1) ||^2,   z_t = alpha(t) z_0 + sigma(t) z_1

    as the mean over all elements. Every sample has its own t.

    Args:
        model: called as model(t, z_t, y=y, **model_kwargs), y left out when it is None; returns the velocity,
            shape of z_t.
        z_0: (B, ...) latents (t = 0).
        y: (B,) integer labels or None.
        path: a lfm_fast.paths object; None is Linear().
        z_1: (B, ...) noise; None draws it from (seed, indices), without writing it to memory.
        t: (B,) times in [path.t_min, path.t_max]; None draws them by `time_sampler` from (seed, indices).
        seed: integer; None draws a fresh one from torch's default generator.
        indices: (B,) int64, the global number of each sample drawn; None is 0 .. B - 1.
        time_sampler: "uniform", "logit_normal", or a callable (index, seed) -> (B,).
        weighting: None, a callable t (B,) -> weights (B,), or "data" / "noise" (the loss of predicting z_0 / z_1).
        model_kwargs: further keyword arguments of the model.

    Returns: scalar float32 (float64 for float64 latents).

    Raises:
        ValueError: an argument of the wrong shape, type or value, before the model is called; afterwards one
            for a result that is no velocity of the shape of z_0. Values of tensors are checked on the CPU only.

    >>> import torch, lfm_fast
    >>> z_0, z_1 = torch.zeros(2, 4), torch.ones(2, 4)  # the target is z_1 - z_0 = 1
    >>> lfm_fast.flow_matching_loss(lambda t, z: torch.zeros_like(z), z_0, z_1=z_1).item()
    1.0

    Source: Lipman et al., arXiv 2210.02747, eq. 9; in latent space Dao et al., arXiv 2307.08698, eq. 6.
    """
    path = Linear() if path is None else path
    check_model(model, model_kwargs)
    _check(z_0, y, path, z_1, t, indices, weighting)
    seed = int(torch.randint(2**63 - 1, ())) if seed is None else check_seed(seed)
    batch_size = z_0.shape[0]
    index = torch.arange(batch_size, device=z_0.device) if indices is None else indices.to(z_0.device)
    if t is None:
        t = draw(time_sampler, index, seed, path.t_min, path.t_max)
    wide = torch.float64 if z_0.dtype == torch.float64 else torch.float32
    t = t.to(device=z_0.device, dtype=wide)
    weight = _weights(weighting, path, t)  # before the model, which may write to its arguments

    coefficients = path.coefficients(t)  # (4, B)
    if z_1 is None:
        z_t, target = ops.interpolate(z_0, coefficients, index=index, seed=seed, stream=STREAM_NOISE)
    else:
        z_t, target = ops.interpolate(z_0, coefficients, z_1=z_1.to(z_0))
    velocity = model(t.clone(), z_t, **({} if y is None else {"y": y.clone()}), **(model_kwargs or {}))
    check_velocity(velocity, z_0)
    return ops.velocity_loss(velocity, target, weight=weight).mean()


def _weights(weighting, path, t):
    if weighting is None:
        return None
    if not callable(weighting):
        return WEIGHTINGS[weighting](path, t)
    weight = weighting(t.clone())
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.shape != t.shape:
        raise ValueError(
            f"weighting returned {describe(weight)}, expected one weight per sample, {tuple(t.shape)} floating."
        )
    if weight.device.type == "cpu" and not bool((weight >= 0).all()):
        raise ValueError("weighting returned a weight below 0 or NaN, expected weights from 0 on.")
    return weight


def _check(z_0, y, path, z_1, t, indices, weighting):
    if not isinstance(z_0, torch.Tensor) or not z_0.is_floating_point() or z_0.ndim < 2:
        raise ValueError("z_0 has to be a floating (B, ...) tensor of latents with at least two dimensions.")
    if z_0.dtype not in FLOATS or z_0.numel() == 0:
        raise ValueError(
            f"z_0 is {describe(z_0)}, expected at least one sample in float32, float64, float16 or bfloat16."
        )
    batch_size = z_0.shape[0]
    if not isinstance(path, Path):
        raise ValueError(f"path is {path!r}, expected an object of lfm_fast.paths such as Linear().")
    if z_1 is not None and (not isinstance(z_1, torch.Tensor) or z_1.dtype not in FLOATS or z_1.shape != z_0.shape):
        raise ValueError(f"z_1 is {describe(z_1)}, expected floating noise of the shape of z_0 {tuple(z_0.shape)}.")
    if t is not None:
        check_times(t, batch_size, path.t_min, path.t_max)
    if y is not None:
        check_labels(y, batch_size)
    if indices is not None:
        check_indices(indices, batch_size)
    if not (weighting is None or callable(weighting) or (isinstance(weighting, str) and weighting in WEIGHTINGS)):
        raise ValueError(
            f"Unknown weighting {weighting!r}; there are {', '.join(WEIGHTINGS)}, None, or give a callable."
        )

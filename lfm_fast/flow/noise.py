"""Randomness by sample number: sample i of seed s draws the same for any batch size, rank and order.

Everything here is Philox4x32-10 with key = seed and counter = (block, stream, sample number), so a draw is a function
of (seed, stream, sample number, element) and of nothing else.
"""

import operator

import torch

from lfm_fast import ops
from lfm_fast.ops.streams import STREAM_LABEL_DROPOUT, STREAM_NOISE


def noise(num_samples, shape, seed=0, first_index=0, indices=None, device=None, dtype=None):
    """Standard normal noise z_1 (num_samples, *shape), row i belonging to sample number first_index + i (or
    indices[i]).

    Args:
        num_samples: rows.
        shape: of one sample, such as (4, 32, 32).
        seed: integer in [0, 2^63).
        first_index: number of the first sample.
        indices: (num_samples,) int64, the numbers of the samples in any order; instead of first_index.
        device: where the noise is made; default: that of `indices`, else the default device.
        dtype: default float32; other types are rounded from float32 (float64 holds float32 values).

    Raises:
        ValueError: a negative count, a seed out of range, indices of the wrong type or length.

    >>> import torch, lfm_fast
    >>> z_1 = lfm_fast.noise(4, (2, 3), seed=7)
    >>> bool((lfm_fast.noise(2, (2, 3), seed=7, first_index=2) == z_1[2:]).all())
    True

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    num_samples, first_index = whole("num_samples", num_samples), whole("first_index", first_index)
    try:
        shape = tuple(shape)
    except TypeError:
        raise ValueError(f"noise: shape is {shape!r}, expected that of one sample, such as (4, 32, 32).") from None
    shape = tuple(whole("shape", side) for side in shape)
    seed = check_seed(seed)
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"noise: dtype is {dtype!r}, expected a floating type such as torch.float32.")
    if device is not None:
        _check_device(device)
    if indices is None:
        if first_index + num_samples > 2**63:
            raise ValueError(
                f"noise: first_index {first_index} + {num_samples} samples passes the last number, 2^63 - 1."
            )
        indices = torch.arange(num_samples, dtype=torch.int64, device=device) + first_index
    else:
        if first_index != 0:
            raise ValueError("noise: both first_index and indices were given; give one of them.")
        check_indices(indices, num_samples)
        indices = indices if device is None else indices.to(device)
    numel = 1
    for side in shape:
        numel *= side
    return ops.philox_normal(indices, numel, seed, stream=STREAM_NOISE).reshape(num_samples, *shape).to(dtype)


def _check_device(device):
    try:
        torch.empty(0, device=device)
    except (TypeError, RuntimeError, AssertionError) as error:  # unknown, or not in this machine or build of torch
        reason = str(error).partition("\n")[0].partition(". ")[0][:120]
        raise ValueError(f"noise: device is {device!r}, which cannot be used ({reason}).") from error


def label_dropout_mask(index, seed, probability):
    """True where the label of a sample is dropped (classifier-free guidance, arXiv 2207.12598): (B,) bool, stream 3.

    index (B,) int64 = numbers of the samples drawn; each is dropped with `probability`, independently of batch and
    rank.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"label_dropout is {probability}, expected a probability in [0, 1].")
    uniform = ops.philox_uniform(index, 1, check_seed(seed), STREAM_LABEL_DROPOUT)  # (B, 1) in [0, 1)
    return uniform[:, 0] < probability


def whole(name, value):
    """`value` as a non-negative Python int, or a ValueError that names it."""
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected whole numbers.") from None
    if value < 0:
        raise ValueError(f"{name} is {value}, expected no negative number.")
    return value


def check_seed(seed):
    """`seed` as an int in [0, 2^63), the range an operator's integer argument holds."""
    seed = whole("seed", seed)
    if seed >= 2**63:
        raise ValueError(f"seed is {seed}, expected an integer below 2^63.")
    return seed


def check_indices(indices, num_samples):
    """Raise ValueError unless `indices` is (num_samples,) int64 from 0 on; values are read on the CPU only."""
    if not isinstance(indices, torch.Tensor) or indices.dtype != torch.int64 or indices.shape != (num_samples,):
        came = (
            f"{tuple(indices.shape)} {indices.dtype}"
            if isinstance(indices, torch.Tensor)
            else repr(type(indices).__name__)
        )
        raise ValueError(f"indices is {came}, expected a ({num_samples},) int64 tensor: one sample number per row.")
    if indices.device.type == "cpu" and num_samples and int(indices.min()) < 0:
        raise ValueError(f"indices holds {int(indices.min())}, expected sample numbers from 0 on.")

"""Inputs for a row's cases: the same numbers on every machine and device, in the layouts that break kernels."""

import math

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "channels_last", "sliced", "expanded")

# Batch or elements 0 and 1, primes, one element more than a power of two, one sample that several threads share
SHAPES = ((0, 4, 2, 2), (3, 0), (1,), (1, 1), (5,), (1, 129), (3, 4, 5, 7), (7, 1), (2, 3, 129), (2, 4, 96, 96))

_MOST_ON_CPU = 1 << 24


def numbers(shape, seed: int, *, device="cpu", dtype=torch.float32, layout: str = "contiguous") -> Tensor:
    """Standard normals drawn on the CPU, then given the dtype, device and memory layout asked for."""
    # more than any test has, which only a benchmark wants, are drawn where they are wanted: a CPU would take minutes
    where = device if torch.device(device).type == "cuda" and math.prod(shape) > _MOST_ON_CPU else "cpu"
    drawn = torch.randn(shape, generator=torch.Generator(where).manual_seed(seed), device=where)
    values = drawn.to(device=device, dtype=dtype)
    if layout == "transposed" and len(shape) > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and len(shape) == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((*shape[:-1], 2 * shape[-1] + 1), math.nan, device=values.device, dtype=dtype)
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if layout == "expanded":
        return values[:1].expand(shape)
    return values


def per_sample(shape, seed: int, *, device="cpu", dtype=torch.float32) -> Tensor:
    """Conditioning values that differ between the samples."""
    return numbers(shape, seed, device=device, dtype=dtype)


def indices(batch: int, device="cpu") -> Tensor:
    """Sample numbers that are neither small nor in order, one of them beyond 32 bits."""
    return (torch.arange(batch, device=device) * 5_000_000_029 + 3) % ((1 << 40) + 7)

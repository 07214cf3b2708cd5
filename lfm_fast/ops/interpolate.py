"""interpolate: the interpolant z_t and its velocity target in one pass over the latents."""

import torch
from torch import Tensor

from lfm_fast.ops._cases import SHAPES, indices, numbers, per_sample
from lfm_fast.ops._checks import (
    INTEGER,
    check_counter,
    check_exactly_one,
    check_like,
    check_per_sample,
    check_state,
    flat,
    numel_per_sample,
    refuse_float64,
)
from lfm_fast.ops._registry import Backend, Op, Tolerance, cuda_backend, register
from lfm_fast.ops._triton import triton_backend
from lfm_fast.ops.philox_normal import philox_normal
from lfm_fast.ops.philox_normal import reference as normal_reference


def reference(z_0, coefficients, z_1=None, index=None, seed=0, stream=0):
    data = flat(z_0)
    noise = normal_reference(index, data.shape[1], seed, stream).to(z_0.dtype) if z_1 is None else flat(z_1)
    alpha, sigma, d_alpha, d_sigma = coefficients[:, :, None].unbind(0)
    z_t, target = alpha * data + sigma * noise, d_alpha * data + d_sigma * noise
    return z_t.contiguous().view(z_0.shape), target.contiguous().view(z_0.shape)


def _check(z_0, coefficients, z_1=None, index=None, seed=0, stream=0) -> None:
    check_state("z_0", z_0)
    batch = z_0.shape[0]
    check_per_sample("coefficients", coefficients, (4, batch), "z_0", z_0)
    check_exactly_one(z_1=z_1, index=index)
    if z_1 is not None:
        check_like("z_1", z_1, "z_0", z_0, (z_0.dtype,))
    else:
        check_per_sample("index", index, (batch,), "z_0", z_0, INTEGER)
    check_counter(0 if index is None else numel_per_sample(z_0), seed, stream)


def _setup_context(ctx, inputs, output) -> None:
    z_0, coefficients, z_1, index, seed, stream = inputs
    ctx.seed, ctx.stream = seed, stream
    again = (z_0, z_1, index) if "coefficients" in ctx.needed else (None, None, None)
    ctx.save_for_backward(coefficients, *again)


def _backward(ctx, grad_z_t, grad_target) -> dict:
    coefficients, z_0, z_1, index = ctx.saved_tensors
    if grad_z_t is None and grad_target is None:
        return {}
    grad_z_t = torch.zeros_like(grad_target) if grad_z_t is None else grad_z_t
    grad_target = torch.zeros_like(grad_z_t) if grad_target is None else grad_target
    gradient = {}
    if ctx.needed & {"z_0", "z_1"}:
        # (z_t, target) = M (z_0, z_1) with a 2 x 2 matrix per sample; the gradient is M transposed: the same op
        alpha, sigma, d_alpha, d_sigma = coefficients.unbind(0)
        transposed = torch.stack((alpha, d_alpha, sigma, d_sigma))
        gradient["z_0"], gradient["z_1"] = _row(grad_z_t, transposed, grad_target, None, 0, 0)
    if "coefficients" in ctx.needed:
        data = flat(z_0)
        noise = philox_normal(index, data.shape[1], ctx.seed, ctx.stream) if z_1 is None else flat(z_1)
        pairs = [(g, part) for g in (flat(grad_z_t), flat(grad_target)) for part in (data, noise)]
        gradient["coefficients"] = torch.stack([(g * part).sum(1) for g, part in pairs]).to(coefficients.dtype)
    return {name: gradient[name] for name in gradient if name in ctx.needed}


def _arguments(*, shape, noise=False, device="cpu", dtype=torch.float32, layout="contiguous") -> dict:
    like = {"device": device, "dtype": dtype}
    return {
        "z_0": numbers(shape, 1, layout=layout, **like),
        "coefficients": per_sample((4, shape[0]), 2, **like),
        "z_1": None if noise else numbers(shape, 3, layout=layout, **like),
        "index": indices(shape[0], device) if noise else None,
        "seed": 1234567890123,
        "stream": 0,
    }


def _cost(z_0, coefficients, z_1=None, index=None, seed=0, stream=0) -> tuple[int, int]:
    size = z_0.numel()
    return size * z_0.element_size() * (3 if z_1 is None else 4), size * (45 if z_1 is None else 6)


def _why_not(z_0, coefficients, z_1=None, index=None, seed=0, stream=0) -> str | None:
    return refuse_float64(z_0)


_row = register(
    Op(
        name="interpolate",
        schema=(
            "(Tensor z_0, Tensor coefficients, Tensor? z_1=None, Tensor? index=None, int seed=0, int stream=0)"
            " -> (Tensor z_t, Tensor target)"
        ),
        reference=reference,
        check=_check,
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            Backend(name="cpp", devices=("cpu",), why_not=_why_not),
            cuda_backend(_why_not),
            triton_backend("interpolate", _why_not),
        ),
        arguments=_arguments,
        cases=(
            {"shape": (3, 4, 5, 7)},
            *({"shape": shape, "noise": noise} for shape in SHAPES for noise in (False, True)),
            {"shape": (3, 4, 5, 7), "dtype": torch.float64},
            *({"shape": (3, 4, 5, 6), "layout": layout} for layout in ("transposed", "channels_last", "sliced")),
            {"shape": (3, 4, 5, 6), "layout": "expanded", "noise": True},
        ),
        sizes=tuple({"shape": (b, 4, 32, 32), "noise": noise} for b in (64, 1024) for noise in (False, True)),
        cost=_cost,
        tolerance=Tolerance(
            absolute=2e-6, relative=0.0, origin="3 roundings of 2^-24 each, of terms below 5 * 4 in the cases"
        ),
    )
)


def interpolate(
    z_0: Tensor,
    coefficients: Tensor,
    z_1: Tensor | None = None,
    index: Tensor | None = None,
    seed: int = 0,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """The point z_t on the path from data to noise, and the velocity there that a model is to learn.

        z_t = alpha z_0 + sigma z_1,    target = d_alpha z_0 + d_sigma z_1

    Args:
        z_0: (B, ...) data, float32 or float64.
        coefficients: (4, B), the rows alpha, sigma and their time derivatives d_alpha, d_sigma at each sample's t.
        z_1: (B, ...) noise, dtype of z_0; or None, and it is `philox_normal(index, numel, seed, stream)`, made in
            registers and never written.
        index: (B,) int64, the samples' numbers; exactly one of z_1 and index is given.
        seed, stream: as in `philox_normal`.

    Returns:
        z_t and target, each (B, ...) contiguous, dtype of z_0. Differentiable in z_0, z_1 and coefficients.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or both or neither of z_1 and index came.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> t = torch.tensor([0.25])
        >>> straight = torch.stack((1 - t, t, -torch.ones(1), torch.ones(1)))
        >>> ops.interpolate(torch.tensor([[4.0]]), straight, torch.tensor([[8.0]]))
        (tensor([[5.]]), tensor([[4.]]))

    Source: Lipman et al. 2023, "Flow Matching for Generative Modeling" (arXiv 2210.02747), equations 10 to 15.
    """
    return _row(z_0, coefficients, z_1, index, seed, stream)

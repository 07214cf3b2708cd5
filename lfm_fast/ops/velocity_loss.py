"""velocity_loss: per-sample weighted mean squared error of a velocity and its gradient, in one pass."""

import torch
from torch import Tensor

from lfm_fast.ops._cases import SHAPES, indices, numbers, per_sample
from lfm_fast.ops._checks import (
    INTEGER,
    STATE,
    VELOCITY,
    check_counter,
    check_exactly_one,
    check_like,
    check_per_sample,
    check_state,
    check_together,
    flat,
    numel_per_sample,
    refuse_float64,
)
from lfm_fast.ops._registry import Backend, Op, Tolerance, cuda_backend, register
from lfm_fast.ops._triton import triton_backend
from lfm_fast.ops.philox_normal import reference as normal_reference


def _difference(velocity, target, z_0, coefficients, index, seed, stream) -> Tensor:
    """velocity - target, (B, N) in float32, or in float64 for a float64 velocity."""
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    if target is None:
        noise = normal_reference(index, numel_per_sample(velocity), seed, stream).to(dtype)
        target = coefficients[2, :, None] * flat(z_0) + coefficients[3, :, None] * noise
    return flat(velocity).to(dtype) - flat(target).to(dtype)


def _mean_factor(difference: Tensor) -> float:
    return 1.0 / max(difference.shape[1], 1)  # a sample without elements has loss 0, not 0 / 0


def reference(velocity, target=None, weight=None, z_0=None, coefficients=None, index=None, seed=0, stream=0):
    difference = _difference(velocity, target, z_0, coefficients, index, seed, stream)
    factor = _mean_factor(difference)
    loss = difference.square().sum(1) * factor
    gradient = difference * (2.0 * factor)
    if weight is not None:
        loss, gradient = loss * weight, gradient * weight[:, None]
    return loss, gradient.to(velocity.dtype).contiguous().view(velocity.shape)


def _check(velocity, target=None, weight=None, z_0=None, coefficients=None, index=None, seed=0, stream=0) -> None:
    check_state("velocity", velocity, VELOCITY)
    batch = velocity.shape[0]
    check_exactly_one(target=target, z_0=z_0)
    if target is not None:
        check_like("target", target, "velocity", velocity, VELOCITY)
        if coefficients is not None or index is not None:
            raise ValueError("coefficients and index rebuild the target, which came as well: pass one or the other.")
    else:
        check_together(z_0=z_0, coefficients=coefficients, index=index)
        check_like("z_0", z_0, "velocity", velocity, STATE)
        check_per_sample("coefficients", coefficients, (4, batch), "velocity", velocity)
        check_per_sample("index", index, (batch,), "velocity", velocity, INTEGER)
    check_counter(0 if index is None else numel_per_sample(velocity), seed, stream)
    if weight is not None:
        check_per_sample("weight", weight, (batch,), "velocity", velocity)


def _setup_context(ctx, inputs, output) -> None:
    velocity, target, weight, z_0, coefficients, index, ctx.seed, ctx.stream = inputs
    ctx.target_dtype = None if target is None else target.dtype
    ctx.factor = 1.0 / max(numel_per_sample(velocity), 1)
    # a weight's gradient needs the squared error itself: dividing the loss by the weight fails where that is 0
    again = (velocity, target, z_0, coefficients, index) if "weight" in ctx.needed else (None,) * 5
    ctx.save_for_backward(output[1], weight, *again)


def _backward(ctx, grad_loss, grad_gradient) -> dict:
    """grad_gradient comes in a double backward only: the op's second output is differentiated like its first."""
    gradient, weight, *again = ctx.saved_tensors
    column = (-1,) + (1,) * (gradient.dim() - 1)
    grad_velocity, grad_weight = [], []  # the terms of each
    if grad_loss is not None:
        grad_velocity.append(gradient * grad_loss.reshape(column))
    if grad_gradient is not None:
        curvature = grad_gradient * (2.0 * ctx.factor)
        grad_velocity.append(curvature if weight is None else curvature * weight.reshape(column))
    if not grad_velocity:
        return {}
    total = sum(grad_velocity)
    result = {"velocity": total.to(gradient.dtype)}
    if "target" in ctx.needed:
        result["target"] = -total.to(ctx.target_dtype)
    if "weight" in ctx.needed:
        difference = _difference(*again, ctx.seed, ctx.stream)
        if grad_loss is not None:
            grad_weight.append(grad_loss * difference.square().sum(1) * ctx.factor)
        if grad_gradient is not None:
            grad_weight.append((flat(grad_gradient) * difference).sum(1) * (2.0 * ctx.factor))
        result["weight"] = sum(grad_weight).to(weight.dtype)
    return {name: result[name] for name in result if name in ctx.needed}


def _arguments(
    *, shape, noise=False, weighted=True, device="cpu", dtype=torch.float32, target_dtype=None, layout="contiguous"
) -> dict:
    state = torch.float64 if dtype is torch.float64 else torch.float32
    known = {"device": device, "dtype": state}
    target = None if noise else numbers(shape, 2, device=device, dtype=target_dtype or state, layout=layout)
    return {
        "velocity": numbers(shape, 1, device=device, dtype=dtype, layout=layout),
        "target": target,
        "weight": per_sample(shape[:1], 3, **known).abs() if weighted else None,
        "z_0": numbers(shape, 4, layout=layout, **known) if noise else None,
        "coefficients": per_sample((4, shape[0]), 5, **known) if noise else None,
        "index": indices(shape[0], device) if noise else None,
        "seed": -5,
        "stream": 0,
    }


def _cost(velocity, target=None, weight=None, z_0=None, coefficients=None, index=None, seed=0, stream=0):
    other = z_0 if target is None else target
    size = velocity.numel()
    moved = 2 * size * velocity.element_size() + size * other.element_size()
    return moved, size * (47 if target is None else 4)


def _why_not(velocity, *args) -> str | None:
    return refuse_float64(velocity)  # float64 elsewhere needs a float64 velocity


_row = register(
    Op(
        name="velocity_loss",
        schema=(
            "(Tensor velocity, Tensor? target=None, Tensor? weight=None, Tensor? z_0=None, Tensor? coefficients=None,"
            " Tensor? index=None, int seed=0, int stream=0) -> (Tensor loss, Tensor gradient)"
        ),
        reference=reference,
        check=_check,
        setup_context=_setup_context,
        backward=_backward,
        not_differentiable=("z_0", "coefficients"),
        backends=(
            Backend(name="cpp", devices=("cpu",), why_not=_why_not),
            cuda_backend(_why_not),
            triton_backend("velocity_loss", _why_not),
        ),
        arguments=_arguments,
        cases=(
            {"shape": (3, 4, 5, 7)},
            *({"shape": shape, "noise": noise} for shape in SHAPES for noise in (False, True)),
            {"shape": (3, 129), "weighted": False},
            *({"shape": (3, 4, 5, 7), "dtype": d} for d in (torch.bfloat16, torch.float16, torch.float64)),
            {"shape": (3, 4, 5, 7), "dtype": torch.bfloat16, "noise": True},
            {"shape": (2, 129), "dtype": torch.bfloat16, "target_dtype": torch.bfloat16},
            {"shape": (2, 129), "dtype": torch.float16, "target_dtype": torch.float16},
            *({"shape": (3, 4, 5, 6), "layout": x} for x in ("transposed", "channels_last", "sliced", "expanded")),
            {"shape": (3, 4, 5, 6), "layout": "channels_last", "noise": True, "dtype": torch.bfloat16},
        ),
        sizes=tuple({"shape": (b, 4, 32, 32), "dtype": d} for b in (64, 1024) for d in (torch.float32, torch.bfloat16)),
        cost=_cost,
        tolerance=Tolerance(
            absolute=2e-6,
            relative=4e-6,
            origin="gradient: 4 roundings of 2^-24 of terms below 8; loss: a sum of positive terms in float32, partial"
            " sums of up to 64 terms: 64 * 2^-24 relative",
        ),
    )
)


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
    """The flow-matching loss of each sample; its gradient is computed in the same pass and kept for backward.

        loss_b = weight_b * mean over elements of (velocity_b - target_b)^2

    Args:
        velocity: (B, ...) the model's output, float32, bfloat16, float16 or float64; arithmetic is in float32, or in
            float64 for float64.
        target: (B, ...) the velocity to learn; or None, and it is rebuilt as d_alpha z_0 + d_sigma noise.
        weight: (B,) or None for ones.
        z_0, coefficients, index, seed, stream: what `interpolate` was given, where target is None.

    Returns:
        (B,) float32 (float64 for float64). Differentiable twice in velocity, target and weight; the gradient in
        velocity has been rounded to velocity's dtype. A sample without elements has loss 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, both or neither of target and z_0 came, or z_0 or
            coefficients requires a gradient (take the target from `interpolate` then).

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> ops.velocity_loss(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.zeros(2, 2), torch.tensor([1.0, 2.0]))
        tensor([5., 0.])

    Source: Lipman et al. 2023, "Flow Matching for Generative Modeling" (arXiv 2210.02747), equation 9.
    """
    return _row(velocity, target, weight, z_0, coefficients, index, seed, stream)[0]

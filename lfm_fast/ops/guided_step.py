"""guided_step: guidance blend and any linear stage combination of a solver, in one pass over the state."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lfm_fast.ops._cases import SHAPES, indices, numbers, per_sample
from lfm_fast.ops._checks import (
    INTEGER,
    VELOCITY,
    check_counter,
    check_flag,
    check_like,
    check_per_sample,
    check_state,
    check_together,
    check_tolerance,
    flat,
    numel_per_sample,
    refuse_float64,
    unwatched,
)
from lfm_fast.ops._registry import Backend, Op, Tolerance, cuda_backend, inside_transform, register
from lfm_fast.ops._triton import triton_backend
from lfm_fast.ops.philox_normal import reference as normal_reference
from lfm_fast.ops.streams import STREAM_SDE

_MOST_STORED = 16


def reference(
    z, velocity, unconditional, scale, stored, weights, error_weights=None, atol=0.0, rtol=0.0,
    noise_scale=None, index=None, seed=0, offset=0, keep=False,
):  # fmt: skip
    state, v = flat(z), flat(velocity).to(z.dtype)
    if unconditional is not None:
        v = scale[:, None] * v + (1.0 - scale[:, None]) * flat(unconditional).to(z.dtype)
    stages = [v, *(flat(k).to(z.dtype) for k in stored)]
    z_next = _combine(weights, [state, *stages])
    if noise_scale is not None:
        noise = normal_reference(index, state.shape[1], seed, STREAM_SDE, offset)
        z_next = z_next + noise_scale[:, None] * noise.to(z.dtype)
    error = z.new_empty(0)
    if error_weights is not None:
        tolerance = atol + rtol * torch.maximum(state.abs(), z_next.abs())
        ratio = _combine(error_weights, stages) / tolerance
        error = (ratio.square().sum(1) * (1.0 / max(state.shape[1], 1))).sqrt()
    blended = v.clone(memory_format=torch.contiguous_format).view(z.shape) if keep else z.new_empty(0)
    return z_next.contiguous().view(z.shape), blended, error


def _combine(weights: Tensor, terms: list[Tensor]) -> Tensor:
    total = weights[:, 0, None] * terms[0]
    for k, term in enumerate(terms[1:], start=1):
        total = total + weights[:, k, None] * term
    return total


def _check(
    z, velocity, unconditional, scale, stored, weights, error_weights=None, atol=0.0, rtol=0.0,
    noise_scale=None, index=None, seed=0, offset=0, keep=False,
) -> None:  # fmt: skip
    check_state("z", z)
    batch = z.shape[0]
    check_like("velocity", velocity, "z", z, VELOCITY)
    if unconditional is not None or scale is not None:
        check_together(unconditional=unconditional, scale=scale)
        check_like("unconditional", unconditional, "z", z, VELOCITY)
        check_per_sample("scale", scale, (batch,), "z", z)
    if not isinstance(stored, list) or len(stored) > _MOST_STORED:
        came = type(stored).__name__ + (f" of {len(stored)}" if isinstance(stored, list) else "")
        raise ValueError(f"stored is a {came}, expected a list of at most {_MOST_STORED} tensors.")
    for stage in stored:
        check_like("a stored velocity", stage, "z", z, VELOCITY)
    check_per_sample("weights", weights, (batch, 2 + len(stored)), "z", z)
    if error_weights is not None:
        check_per_sample("error_weights", error_weights, (batch, 1 + len(stored)), "z", z)
    check_tolerance(atol=atol, rtol=rtol)
    check_flag("keep", keep)
    if noise_scale is not None or index is not None:
        check_together(noise_scale=noise_scale, index=index)
        check_per_sample("noise_scale", noise_scale, (batch,), "z", z)
        check_per_sample("index", index, (batch,), "z", z, INTEGER)
    check_counter(0 if index is None else numel_per_sample(z), seed, STREAM_SDE, offset)


def _setup_context(ctx, inputs, output) -> None:
    _, velocity, unconditional, scale, stored, weights, *_, ctx.keep = inputs
    ctx.dtypes = (velocity.dtype, None if unconditional is None else unconditional.dtype, [k.dtype for k in stored])
    ctx.save_for_backward(weights, scale if unconditional is not None else None)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, grad_next, grad_blended, grad_error) -> dict:
    """z_next and blended are linear in the states, so the gradient does not depend on them."""
    weights, scale = ctx.saved_tensors
    velocity_dtype, unconditional_dtype, stored_dtypes = ctx.dtypes
    result = {"stored": [None] * len(stored_dtypes)}
    grad_v = []  # the terms of v's gradient
    if grad_next is not None:
        column = (-1,) + (1,) * (grad_next.dim() - 1)
        grad_z, grad_next_v, *grad_stored = (grad_next * w.reshape(column) for w in weights.unbind(1))
        result["z"] = grad_z
        result["stored"] = [g.to(dtype) for g, dtype in zip(grad_stored, stored_dtypes)]
        grad_v.append(grad_next_v)
    if grad_blended is not None and ctx.keep:
        grad_v.append(grad_blended)
    if grad_v:
        total = sum(grad_v)
        if scale is not None:
            scale = scale.reshape((-1,) + (1,) * (total.dim() - 1))
            result["unconditional"] = (total * (1.0 - scale)).to(unconditional_dtype)
            total = total * scale
        result["velocity"] = total.to(velocity_dtype)
    return result


def _arguments(
    *, shape, num_stored=0, guided=True, error=False, noise=False, keep=False, dtype=torch.float32, state=torch.float32,
    device="cpu", layout="contiguous",
) -> dict:  # fmt: skip
    batch = shape[0]
    known = {"device": device, "dtype": state}

    def field(seed):
        return numbers(shape, seed, device=device, dtype=dtype, layout=layout)

    return {
        "z": numbers(shape, 1, layout=layout, **known),
        "velocity": field(2),
        "unconditional": field(3) if guided else None,
        "scale": per_sample((batch,), 4, **known) if guided else None,
        "stored": [numbers(shape, 5 + k, layout=layout, **known) for k in range(num_stored)],
        "weights": per_sample((batch, 2 + num_stored), 30, **known),
        "error_weights": per_sample((batch, 1 + num_stored), 31, **known) if error else None,
        "atol": 0.5 if error else 0.0,
        "rtol": 0.25 if error else 0.0,
        "noise_scale": per_sample((batch,), 32, **known) if noise else None,
        "index": indices(batch, device) if noise else None,
        "seed": 77,
        "offset": 3 if noise else 0,
        "keep": keep,
    }


def _cost(
    z, velocity, unconditional, scale, stored, weights, error_weights=None, atol=0.0, rtol=0.0,
    noise_scale=None, index=None, seed=0, offset=0, keep=False,
) -> tuple[int, int]:  # fmt: skip
    read = [z, velocity, *stored] + ([] if unconditional is None else [unconditional])
    moved = sum(x.numel() * x.element_size() for x in read) + z.numel() * z.element_size() * (2 if keep else 1)
    flops = 3 + 2 * len(stored) + (0 if unconditional is None else 3) + (0 if noise_scale is None else 41)
    return moved, z.numel() * (flops + (0 if error_weights is None else 7 + 2 * len(stored)))


def _why_not(z, *args) -> str | None:
    return refuse_float64(z)  # float64 elsewhere needs a float64 z


_WITH = {"keep": True, "error": True, "num_stored": 3}
_row = register(
    Op(
        name="guided_step",
        schema=(
            "(Tensor z, Tensor velocity, Tensor? unconditional, Tensor? scale, Tensor[] stored, Tensor weights,"
            " Tensor? error_weights=None, float atol=0.0, float rtol=0.0, Tensor? noise_scale=None, Tensor? index=None,"
            " int seed=0, int offset=0, bool keep=False) -> (Tensor z_next, Tensor blended, Tensor error)"
        ),
        reference=reference,
        check=_check,
        setup_context=_setup_context,
        backward=_backward,
        not_differentiable=("scale", "weights", "error_weights", "noise_scale"),
        backends=(
            Backend(name="cpp", devices=("cpu",), why_not=_why_not),
            cuda_backend(_why_not),
            triton_backend("guided_step", _why_not),
        ),
        arguments=_arguments,
        cases=(
            {"shape": (3, 4, 5, 7), **_WITH},
            *({"shape": shape} for shape in SHAPES),
            *({"shape": shape, "noise": True, "guided": False, **_WITH} for shape in SHAPES),
            *({"shape": (3, 4, 5, 7), "dtype": d, **_WITH} for d in (torch.bfloat16, torch.float16)),
            {"shape": (3, 4, 5, 7), "dtype": torch.bfloat16, "guided": False, "keep": True},
            {"shape": (3, 4, 5, 7), "dtype": torch.float64, "state": torch.float64, "noise": True, **_WITH},
            {"shape": (2, 3, 129), "num_stored": _MOST_STORED, "error": True},
            {"shape": (3, 129), "guided": False, "noise": True, "num_stored": 1},
            *({"shape": (3, 4, 5, 6), "layout": x, **_WITH} for x in ("transposed", "channels_last", "sliced")),
            {"shape": (3, 4, 5, 6), "layout": "expanded", "noise": True, "dtype": torch.float16, **_WITH},
        ),
        sizes=tuple({"shape": (b, 4, 32, 32), "num_stored": k} for b in (1, 64, 1024) for k in (0, 3)),
        cost=_cost,
        tolerance=Tolerance(
            absolute=1e-5,
            relative=1e-5,
            origin="up to 19 terms below 20 in the cases, one rounding of 2^-24 each and as many of their running sum",
        ),
    )
)


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
    """One stage of any linear solver: blend the velocities, combine them with the state, estimate the error.

        v      = scale velocity + (1 - scale) unconditional        (v = velocity without unconditional)
        z_next = w_0 z + w_1 v + sum_k w_(2+k) stored_k + noise_scale normal(seed, stream 5, index, block offset)
        error  = sqrt(mean((e / (atol + rtol max(|z|, |z_next|)))^2)),    e = ew_0 v + sum_k ew_(1+k) stored_k

    Args:
        z: (B, ...) state, float32; float64 runs on the reference.
        velocity, unconditional: (B, ...) outputs of the model, any float dtype; arithmetic is in z's dtype.
        scale: (B,) guidance scale, needed beside unconditional, without effect otherwise.
        stored: up to 16 velocities of earlier stages, (B, ...) each.
        weights: (B, 2 + K) for K stored velocities, any strides (an expanded row is fine); the step size is inside.
        error_weights: (B, 1 + K), or None for no error estimate.
        atol, rtol: tolerances of the error estimate.
        noise_scale, index, seed, offset: per-sample factor (B,) and counter of a noise term; both of the first two or
            neither.
        keep: return v as well, for later stages.

    Returns:
        z_next (B, ...) in z's dtype, contiguous; blended, v in z's dtype, empty unless keep; error (B,), empty without
        error_weights. z_next and blended are differentiable in z, velocity, unconditional and stored; error is not.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or scale, weights, error_weights or noise_scale requires a
            gradient.

    Example (an Euler step of -0.5):
        >>> import torch
        >>> from lfm_fast import ops
        >>> z, v = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 4.0]])
        >>> ops.guided_step(z, v, None, None, [], torch.tensor([[1.0, -0.5]]))[0]
        tensor([[0., 0.]])

    Source: Ho and Salimans 2022, "Classifier-free diffusion guidance"; Hairer, Norsett and Wanner, "Solving Ordinary
    Differential Equations I", II.4 (error norm).
    """
    # a field that leaves the unconditional forward out (outside the guidance interval) may still name its scale
    scale = None if unconditional is None else scale
    stored = list(stored) if isinstance(stored, tuple) else stored
    return _row(
        z, velocity, unconditional, scale, stored, weights, error_weights, atol, rtol, noise_scale, index, seed, offset,
        keep,
    )  # fmt: skip


class GuidedSteps:
    """guided_step for a loop: called with all its arguments, by position. What was checked and chosen for velocities of
    one kind holds for the next ones of that kind; everything else is the loop's own."""

    def __init__(self):
        self._kind = self._kernel = None

    def __call__(self, z, velocity, unconditional, scale, *others):
        if unconditional is None:
            scale, tensors = None, (velocity,)
        else:
            tensors = (velocity, unconditional, scale)
        kind = [(type(x), x.dtype, x.shape) for x in tensors if isinstance(x, Tensor)]
        if kind == self._kind:
            return self._kernel(z, velocity, unconditional, scale, *others)
        result = guided_step(z, velocity, unconditional, scale, *others)
        self._kind, self._kernel = kind, _settled((z, velocity, unconditional, scale, *others))
        return result


def _settled(args: tuple) -> Callable:
    """The kernel that a call with such arguments comes to where nobody but it would see the call, else guided_step."""
    seen = torch.is_grad_enabled() or inside_transform() or torch.compiler.is_compiling() or not unwatched(args)
    name = None if seen else _row.choose(args)
    if name in _row.compiled_names:
        return _row.kernels[name]
    return reference if name == "reference" and not torch._C._is_any_autocast_enabled() else guided_step

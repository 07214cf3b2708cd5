"""adamw_ema: AdamW, the moving average of the weights and their low-precision copy, many tensors in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lfm_fast.ops._cases import numbers
from lfm_fast.ops._checks import (
    check_apart,
    check_like,
    check_number,
    check_tensor,
    check_tolerance,
    check_writable,
    refuse_float64,
)
from lfm_fast.ops._registry import Backend, Op, Tolerance, cuda_backend, register

_GRADIENT = (torch.float32, torch.bfloat16, torch.float64)
_LOW = (torch.bfloat16, torch.float16)


def reference(
    schedule, parameters, gradients, exp_avg, exp_avg_sq, averaged, low, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0.0, gradient_scale=None,
) -> None:  # fmt: skip
    learning_rate, step, ema_decay = schedule.unbind()
    keep = 1.0 - learning_rate * weight_decay
    step_size = learning_rate / (1.0 - beta1**step)
    correction = 1.0 / (1.0 - beta2**step).sqrt()
    for i, p in enumerate(parameters):
        g = gradients[i].to(p.dtype)
        if gradient_scale is not None:
            g = g * gradient_scale.to(p.dtype)
        exp_avg[i].lerp_(g, 1.0 - beta1)
        exp_avg_sq[i].mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        denominator = exp_avg_sq[i].sqrt() * correction.to(p.dtype) + eps
        p.mul_(keep.to(p.dtype)).sub_(exp_avg[i] / denominator * step_size.to(p.dtype))
        if averaged:
            averaged[i].add_((p - averaged[i]) * (1.0 - ema_decay).to(p.dtype))
        if low:
            low[i].copy_(p)


def _check(
    schedule, parameters, gradients, exp_avg, exp_avg_sq, averaged, low, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0.0, gradient_scale=None,
) -> None:  # fmt: skip
    check_tensor("schedule", schedule, (torch.float64,))
    if schedule.dim() != 1 or schedule.shape[0] != 3:
        raise ValueError(f"schedule is {tuple(schedule.shape)}, expected (3,): learning_rate, step and ema_decay.")
    _check_lists(parameters, gradients, exp_avg, exp_avg_sq, averaged, low)
    if gradient_scale is not None:
        check_tensor("gradient_scale", gradient_scale, (torch.float32,))
        if gradient_scale.dim():
            raise ValueError(f"gradient_scale is {tuple(gradient_scale.shape)}, expected a scalar tensor ().")
        _check_device("gradient_scale", gradient_scale, schedule)
    for p in parameters:
        _check_device("a tensor of parameters", p, schedule)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        check_number(name, value)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} is {value}, expected a number in [0, 1).")
    check_tolerance(eps=eps, weight_decay=weight_decay)


def _check_lists(parameters, gradients, exp_avg, exp_avg_sq, averaged, low) -> None:
    lists = {
        "parameters": parameters,
        "gradients": gradients,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "averaged": averaged,
        "low": low,
    }
    for name, tensors in lists.items():
        if not isinstance(tensors, list):
            raise ValueError(f"{name} is a {type(tensors).__name__}: pass a list of tensors.")
        if len(tensors) != len(parameters) and not (name in ("averaged", "low") and not tensors):
            raise ValueError(
                f"{name} holds {len(tensors)} tensors and parameters {len(parameters)}: give one for each."
            )
    for i, p in enumerate(parameters):
        check_tensor("a tensor of parameters", p, (torch.float32, torch.float64))
        for name, tensors in lists.items():
            if tensors:
                dtypes = {"gradients": _GRADIENT, "low": _LOW}.get(name, (p.dtype,))
                check_like(f"a tensor of {name}", tensors[i], "its parameter", p, dtypes)
                if name != "gradients":
                    check_writable(f"a tensor of {name}", tensors[i])
    check_apart(lists, read="gradients")


def _check_device(name: str, value: Tensor, schedule: Tensor) -> None:
    if value.device != schedule.device:
        raise ValueError(f"{name} is on {value.device} but schedule is on {schedule.device}: move one of them.")


def _dit_shapes(depth: int, width: int, patch: int = 2, channels: int = 4, classes: int = 1000) -> list[tuple]:
    """The parameters that a DiT trains, in its order."""
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (6 * width, width)]
    patches = [(width, channels, patch, patch), (width,)]
    embedders = [(width, 256), (width,), (width, width), (width,), (classes, width)]
    last = [(channels * patch**2, width), (channels * patch**2,), (2 * width, width), (2 * width,)]
    return patches + embedders + [shape for w in block for shape in (w, w[:1])] * depth + last


_NETWORKS = {"DiT-S/2": (12, 384), "DiT-B/2": (12, 768), "DiT-L/2": (24, 1024)}
_FEW = ((5,), (3, 7), (129,))


def _arguments(
    *, shapes=_FEW, network=None, step=3, gradient=torch.float32, dtype=torch.float32, low=torch.bfloat16,
    average=True, scaled=True, device="cpu", layout="contiguous",
) -> dict:  # fmt: skip
    """`network` names a list of shapes. The numbers look like those of a run: moments small, second ones positive."""
    shapes = _dit_shapes(*_NETWORKS[network]) if network else shapes
    known = {"device": device, "dtype": dtype, "layout": layout}

    def tensors(first, **how):
        return [numbers(shape, first + 10 * i, **{**known, **how}) for i, shape in enumerate(shapes)]

    gradients = tensors(2, dtype=gradient)
    return {
        "schedule": torch.tensor([1e-2, step, 0.9], dtype=torch.float64, device=device),
        "parameters": tensors(1),
        "gradients": gradients,
        "exp_avg": [0.3 * m for m in tensors(3)],
        "exp_avg_sq": [0.1 * v * v for v in tensors(4)],
        "averaged": tensors(5) if average else [],
        "low": [torch.zeros_like(g, dtype=low) for g in gradients] if low else [],
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "gradient_scale": torch.tensor(0.5, device=device) if scaled else None,
    }


def _cost(
    schedule, parameters, gradients, exp_avg, exp_avg_sq, averaged, low, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0.0, gradient_scale=None,
) -> tuple[int, int]:  # fmt: skip
    changed = [*parameters, *exp_avg, *exp_avg_sq, *averaged]
    once = [*gradients, *low]
    moved = 2 * sum(x.numel() * x.element_size() for x in changed) + sum(x.numel() * x.element_size() for x in once)
    return moved, sum(p.numel() for p in parameters) * (17 if averaged else 14)


def _why_not_compiled(
    schedule, parameters, gradients, exp_avg, exp_avg_sq, averaged, low, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0.0, gradient_scale=None,
) -> str | None:  # fmt: skip
    return refuse_float64(*parameters, gradient_scale)  # the others are float64 beside these alone


def _why_not_cpp(schedule, parameters, gradients, exp_avg, exp_avg_sq, averaged, low, *rest) -> str | None:
    reason = _why_not_compiled(schedule, parameters, gradients, exp_avg, exp_avg_sq, averaged, low, *rest)
    if reason:
        return reason
    tensors = (parameters, gradients, exp_avg, exp_avg_sq, *(x for x in (averaged, low) if x))
    if all(x.is_contiguous() for same in tensors for x in same):
        return None
    if all(x.is_contiguous() or _alike_in_channels_last(others) for others in zip(*tensors) for x in others):
        return None
    return "the tensors of a parameter lie in memory in different orders, or with gaps"


def _alike_in_channels_last(tensors) -> bool:
    return all(x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in tensors)


_SEVERAL = ((64, 65), (7,), (0,), (1,), (), (3, 4, 2, 2), (4097,), (1, 513))
_row = register(
    Op(
        name="adamw_ema",
        schema=(
            "(Tensor schedule, Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avg,"
            " Tensor(c!)[] exp_avg_sq, Tensor(d!)[] averaged, Tensor(e!)[] low, float beta1=0.9, float beta2=0.999,"
            " float eps=1e-8, float weight_decay=0.0, Tensor? gradient_scale=None) -> ()"
        ),
        reference=reference,
        check=_check,
        mutates=("parameters", "exp_avg", "exp_avg_sq", "averaged", "low"),
        backends=(
            Backend(name="cpp", devices=("cpu",), why_not=_why_not_cpp),
            cuda_backend(_why_not_compiled),
        ),
        arguments=_arguments,
        cases=(
            {},
            {"shapes": ()},
            {"shapes": _SEVERAL},
            {"shapes": _SEVERAL, "gradient": torch.bfloat16, "low": torch.float16, "step": 1000},
            {"shapes": _SEVERAL, "average": False, "low": None, "scaled": False, "step": 1},
            {"shapes": _SEVERAL, "low": None},
            {"shapes": ((3, 4, 5, 6), (2, 3)), "layout": "channels_last"},
            {"shapes": ((3, 4, 5, 6), (2, 3)), "layout": "transposed"},
            {"shapes": ((3, 4, 5, 6), (2, 3)), "layout": "sliced"},
            {"dtype": torch.float64, "gradient": torch.float64},
        ),
        sizes=(
            {"network": "DiT-S/2"},
            {"network": "DiT-S/2", "low": None},
            {"network": "DiT-S/2", "gradient": torch.bfloat16},
        ),
        cost=_cost,
        tolerance=Tolerance(
            absolute=2e-6,
            relative=2e-6,
            origin="about 15 roundings of 2^-24 of terms below 8; the update itself is below 0.3 in the cases",
        ),
    )
)


def adamw_ema(
    schedule: Tensor,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    averaged: Sequence[Tensor],
    low: Sequence[Tensor],
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    gradient_scale: Tensor | None = None,
) -> None:
    """One step of AdamW, then of the moving average of the weights, then their low-precision copy; all in place.

        g  = gradient_scale gradient
        m  = beta1 m + (1 - beta1) g,      v = beta2 v + (1 - beta2) g^2
        p  = (1 - learning_rate weight_decay) p - learning_rate m' / (sqrt(v') + eps),
             m' = m / (1 - beta1^step),    v' = v / (1 - beta2^step)
        averaged = averaged + (1 - ema_decay) (p - averaged),      low = p in its dtype

    Args:
        schedule: (3,) float64: learning_rate, step (1 for the first) and ema_decay; on the tensors' device, so that a
            captured graph can be replayed with other values.
        parameters, exp_avg, exp_avg_sq: tensors of the same shapes, float32 (float64 runs on the reference); m and v
            begin at 0. They are what `torch.optim.AdamW` keeps under the same names.
        gradients: like parameters, float32 or bfloat16.
        averaged: like parameters, or an empty list for no average.
        low: like parameters in bfloat16 or float16, or an empty list for no copy.
        beta1, beta2, eps, weight_decay: as in `torch.optim.AdamW`.
        gradient_scale: () float32, what every gradient is multiplied by (clipping without waiting for the device).

    Raises:
        ValueError: lists, shapes, dtypes or devices do not fit, or a gradient would be recorded: call it under
            torch.no_grad().

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> p, m, v = torch.ones(2), torch.zeros(2), torch.zeros(2)
        >>> schedule = torch.tensor([0.1, 1, 0.5], dtype=torch.float64)
        >>> ops.adamw_ema(schedule, [p], [torch.tensor([2.0, -3.0])], [m], [v], [], [])
        >>> p
        tensor([0.9000, 1.1000])

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization" (arXiv 1711.05101), algorithm 2.
    """
    lists = (
        list(x) if isinstance(x, tuple) else x for x in (parameters, gradients, exp_avg, exp_avg_sq, averaged, low)
    )
    _row(schedule, *lists, beta1, beta2, eps, weight_decay, gradient_scale)

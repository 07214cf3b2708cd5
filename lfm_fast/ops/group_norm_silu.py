"""group_norm_silu: group normalisation, its affine map and SiLU in one op, and the gradient of all three."""

import torch
from torch import Tensor

from lfm_fast.ops._cases import numbers
from lfm_fast.ops._checks import (
    VELOCITY,
    check_flag,
    check_like,
    check_per_channel,
    check_per_sample,
    check_state,
    check_tolerance,
    refuse_float64,
)
from lfm_fast.ops._registry import Backend, Op, Tolerance, register
from lfm_fast.ops._triton import triton_backend


def reference(x, num_groups, weight=None, bias=None, eps=1e-5, silu=True):
    grouped = _grouped(x, num_groups)
    mean, rstd = statistics(grouped, eps)
    h = _affine(((grouped - mean[..., None]) * rstd[..., None]).view(x.shape), weight, bias)
    y = h * torch.sigmoid(h) if silu else h
    return _like(x, y), mean, rstd


def backward_reference(grad_y, x, mean, rstd, weight, bias, num_groups, silu):
    grouped = _grouped(x, num_groups)
    count = max(grouped.shape[-1], 1)
    normal = (grouped - mean[..., None]) * rstd[..., None]  # (B, G, N)
    grad_h = grad_y.to(normal.dtype).contiguous()
    if silu:
        h = _affine(normal.view(x.shape), weight, bias)
        s = torch.sigmoid(h)
        grad_h = grad_h * (s + h * s * (1.0 - s))
    over = [0, *range(2, x.dim())]
    grad_weight, grad_bias = (grad_h * normal.view(x.shape)).sum(over), grad_h.sum(over)
    g = _affine(grad_h, weight, None).view(normal.shape)
    g = g - g.sum(-1, keepdim=True) / count - normal * ((g * normal).sum(-1, keepdim=True) / count)
    grad_x = _like(x, (g * rstd[..., None]).view(x.shape))
    return grad_x, grad_weight.to(_dtype_of(weight, normal)), grad_bias.to(_dtype_of(bias, normal))


def statistics(grouped: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each group, (B, G); 0 and 1 / sqrt(eps) for groups without elements."""
    count = max(grouped.shape[-1], 1)
    mean = grouped.sum(-1) / count
    variance = (grouped - mean[..., None]).square().sum(-1) / count
    return mean, (variance + eps).rsqrt()


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """(B, C, ...) -> (B, G, N) in float32, or in float64 for float64; also where a size is 0."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    count = x.shape[1] // num_groups
    for size in x.shape[2:]:
        count = count * size
    return x.view(x.shape[0], num_groups, count)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    column = (-1,) + (1,) * (x.dim() - 2)
    if weight is not None:
        x = x * weight.to(x.dtype).view(column)
    return x if bias is None else x + bias.to(x.dtype).view(column)


def _like(x: Tensor, y: Tensor) -> Tensor:
    """y in x's dtype, and in channels_last where x is; else contiguous."""
    if keeps_channels_last(x):
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return y.to(x.dtype).contiguous()


def keeps_channels_last(x: Tensor) -> bool:
    """Whether results take x's channels_last strides: four dimensions, channels innermost, and not also contiguous."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _dtype_of(parameter: Tensor | None, computed: Tensor) -> torch.dtype:
    return computed.dtype if parameter is None else parameter.dtype


def _check(x, num_groups, weight=None, bias=None, eps=1e-5, silu=True) -> None:
    _check_input(x, num_groups, weight, bias)
    check_tolerance(eps=eps)
    check_flag("silu", silu)


def _check_backward(grad_y, x, mean, rstd, weight, bias, num_groups, silu) -> None:
    _check_input(x, num_groups, weight, bias)
    check_like("grad_y", grad_y, "x", x, (x.dtype,))
    statistics = (torch.promote_types(x.dtype, torch.float32),)
    check_per_sample("mean", mean, (x.shape[0], num_groups), "x", x, statistics)
    check_per_sample("rstd", rstd, (x.shape[0], num_groups), "x", x, statistics)
    check_flag("silu", silu)


def _check_input(x, num_groups, weight, bias) -> None:
    check_state("x", x, VELOCITY)
    if x.dim() < 2:
        raise ValueError(f"x is {tuple(x.shape)}, expected (B, C, ...): channels come second.")
    if not isinstance(num_groups, int) or isinstance(num_groups, bool):
        raise ValueError(f"num_groups is a {type(num_groups).__name__}: pass an int.")
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"num_groups is {num_groups}, expected a positive divisor of the {x.shape[1]} channels of x.")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_per_channel(name, value, x.shape[1], "x", x, VELOCITY)


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _backward(ctx, grad_y, grad_mean, grad_rstd) -> dict:
    x, mean, rstd, weight, bias = ctx.saved_tensors
    if grad_y is None:
        return {}
    arguments = grad_y.to(x.dtype), x, mean, rstd, weight, bias, ctx.num_groups, ctx.silu
    if torch.is_grad_enabled():  # a second derivative is wanted: PyTorch's own operations, mean and rstd as x's
        again = statistics(_grouped(x, ctx.num_groups), ctx.eps)
        gradients = backward_reference(*arguments[:2], *again, *arguments[4:])
    else:
        gradients = _backward_row(*arguments)
    return {name: g for name, g in zip(("x", "weight", "bias"), gradients) if name in ctx.needed}


def _arguments(
    *, shape, num_groups=2, affine=True, silu=True, device="cpu", dtype=torch.float32, parameters=None,
    layout="contiguous",
) -> dict:  # fmt: skip
    known = {"device": device, "dtype": parameters or dtype}
    return {
        "x": numbers(shape, 1, device=device, dtype=dtype, layout=layout) * 1.5 + 0.5,
        "num_groups": num_groups,
        "weight": numbers(shape[1:2], 2, **known) if affine else None,
        "bias": numbers(shape[1:2], 3, **known) if affine else None,
        "eps": 1e-5,
        "silu": silu,
    }


def _backward_arguments(**case) -> dict:
    forward = _arguments(**case)
    _, mean, rstd = reference(**forward)
    x, place = forward["x"], {key: case[key] for key in ("shape", "device", "dtype", "layout") if key in case}
    names = ("weight", "bias", "num_groups", "silu")
    return {"grad_y": numbers(seed=4, **place), "x": x, "mean": mean, "rstd": rstd} | {n: forward[n] for n in names}


def _cost(x, num_groups, weight=None, bias=None, eps=1e-5, silu=True) -> tuple[int, int]:
    return 2 * x.numel() * x.element_size(), x.numel() * (7 + (20 if silu else 0))


def _backward_cost(grad_y, x, mean, rstd, weight, bias, num_groups, silu) -> tuple[int, int]:
    return 3 * x.numel() * x.element_size(), x.numel() * (16 + (24 if silu else 0))


def _why_not_compiled(first, *args) -> str | None:
    return refuse_float64(first)  # x or grad_y; the others are float64 beside these alone


_SMALL = ((0, 4, 2, 2), (2, 4, 0), (3, 0, 2), (1, 2), (3, 6), (1, 2, 1), (2, 6, 7), (3, 4, 5, 7), (2, 4, 3, 129))
_LOW = (torch.bfloat16, torch.float16)
_CASES = (
    {"shape": (3, 4, 5, 7)},
    *({"shape": shape} for shape in _SMALL),
    {"shape": (2, 6, 33, 65), "num_groups": 3},
    {"shape": (2, 6, 33, 65), "num_groups": 3, "layout": "channels_last"},
    {"shape": (3, 6, 5, 7), "num_groups": 1},
    {"shape": (3, 6, 5, 7), "num_groups": 6, "silu": False},
    {"shape": (2, 96, 5, 7), "num_groups": 32, "layout": "channels_last"},
    {"shape": (2, 96, 9, 7), "num_groups": 4, "layout": "channels_last", "dtype": torch.bfloat16},
    # positions that do not fill a vector, alone and beside some that do
    {"shape": (2, 6, 9, 7), "num_groups": 3, "layout": "channels_last", "dtype": torch.bfloat16},
    {"shape": (2, 33, 8, 9), "num_groups": 3, "layout": "channels_last", "dtype": torch.bfloat16, "silu": False},
    {"shape": (3, 4, 5, 7), "affine": False},
    {"shape": (3, 4, 5, 7), "affine": False, "layout": "channels_last", "silu": False},
    *({"shape": (3, 4, 5, 7), "dtype": d} for d in (*_LOW, torch.float64)),
    *({"shape": (3, 4, 5, 7), "dtype": d, "parameters": torch.float32} for d in _LOW),
    *({"shape": (3, 4, 5, 6), "layout": x} for x in ("transposed", "channels_last", "sliced", "expanded")),
    {"shape": (3, 4, 5, 6), "layout": "sliced", "dtype": torch.bfloat16},
)
_SIZES = tuple(
    {"shape": shape, "num_groups": 32, "dtype": d, "parameters": torch.float32, "layout": layout}
    for shape in ((4, 128, 64, 64), (4, 256, 32, 32))
    for d in (torch.float32, torch.bfloat16)
    for layout in ("contiguous", "channels_last")
)

_row = register(
    Op(
        name="group_norm_silu",
        schema=(
            "(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-5, bool silu=True)"
            " -> (Tensor y, Tensor mean, Tensor rstd)"
        ),
        reference=reference,
        check=_check,
        setup_context=_setup_context,
        backward=_backward,
        shared=("weight", "bias"),
        backends=(
            Backend(name="cpp", devices=("cpu",), why_not=_why_not_compiled),
            triton_backend("group_norm_silu", _why_not_compiled),
        ),
        arguments=_arguments,
        cases=_CASES,
        sizes=_SIZES,
        cost=_cost,
        tolerance=Tolerance(
            absolute=8e-6,
            relative=4e-6,
            origin="a mean of terms below 8 in float32 pairwise sums, hence 16 2^-24 * 8 in (x - mean) rstd weight,"
            " where rstd and weight are below 4",
        ),
    )
)

_backward_row = register(
    Op(
        name="group_norm_silu_backward",
        schema=(
            "(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int num_groups,"
            " bool silu) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
        ),
        reference=backward_reference,
        check=_check_backward,
        # the forward's gradient is differentiated again by PyTorch itself, see _backward
        not_differentiable=("grad_y", "x", "mean", "rstd", "weight", "bias"),
        shared=("weight", "bias", "grad_weight", "grad_bias"),
        backends=(
            Backend(name="cpp", devices=("cpu",), why_not=_why_not_compiled),
            triton_backend("group_norm_silu_backward", _why_not_compiled),
        ),
        arguments=_backward_arguments,
        cases=_CASES,
        sizes=_SIZES,
        cost=_backward_cost,
        tolerance=Tolerance(
            absolute=1e-4,
            relative=1e-5,
            origin="grad_weight and grad_bias sum up to 4290 terms below 16 in float32, in partial sums, their"
            " magnitudes adding up to 10^4: 16 2^-24 * 10^2",
        ),
    )
)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """Group normalisation, its affine map and SiLU.

        h = weight_c (x - mean_bg) / sqrt(var_bg + eps) + bias_c,      y = h sigmoid(h)      (y = h without silu)

    Args:
        x: (B, C, ...) float32, bfloat16, float16 or float64; statistics and arithmetic are in float32, or in float64
            for float64. Mean and biased variance are over the C / num_groups channels of a group and all positions.
        num_groups: a divisor of C.
        weight, bias: (C,) of any float dtype, or None for 1 and 0.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        y of x's shape and dtype; in channels_last memory format if x is (B, C, H, W) in it, else contiguous.
        Differentiable in x, weight and bias, also twice (the second time by PyTorch's own operations).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or num_groups does not divide C.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> ops.group_norm_silu(torch.tensor([[1.0, 3.0, -5.0, 5.0]]), 2)
        tensor([[-0.2689,  0.7311, -0.2689,  0.7311]])

    Source: Wu and He 2018, "Group normalization" (arXiv 1803.08494), equations 1 to 3; Elfwing et al. 2017,
    "Sigmoid-weighted linear units" (arXiv 1702.03118), equation 5.
    """
    return _row(x, num_groups, weight, bias, eps, silu)[0]

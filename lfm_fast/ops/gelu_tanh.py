"""gelu_tanh: the GELU of transformers in its tanh form, and its derivative."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lfm_fast.ops._cases import SHAPES, numbers
from lfm_fast.ops._checks import VELOCITY, check_like, check_tensor, refuse_float64
from lfm_fast.ops._registry import Backend, Op, Tolerance, register
from lfm_fast.ops._triton import triton_backend

_SLOPE = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def reference(x):
    return F.gelu(x.reshape(-1), approximate="tanh").view(x.shape)


def backward_reference(grad, x):
    return torch.ops.aten.gelu_backward(grad.reshape(-1), x.reshape(-1), approximate="tanh").view(x.shape)


def _second_derivative(x: Tensor) -> Tensor:
    """In float32, or in float64 for float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    t = torch.tanh(_SLOPE * (x + _CUBIC * x**3))
    slope = _SLOPE * (1.0 + 3.0 * _CUBIC * x**2)
    curvature = 6.0 * _SLOPE * _CUBIC * x
    return (1.0 - t * t) * (slope + 0.5 * x * (curvature - 2.0 * t * slope**2))


def _check(x) -> None:
    check_tensor("x", x, VELOCITY)


def _check_backward(grad, x) -> None:
    check_tensor("x", x, VELOCITY)
    check_like("grad", grad, "x", x, (x.dtype,))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad) -> dict:
    (x,) = ctx.saved_tensors
    return {} if grad is None else {"x": _backward_row(grad.to(x.dtype), x)}


def _backward_of_backward(ctx, grad_grad_x) -> dict:
    if grad_grad_x is None:
        return {}
    grad, x = ctx.saved_tensors
    result = {}
    if "grad" in ctx.needed:
        result["grad"] = _backward_row(grad_grad_x.to(x.dtype), x)
    if "x" in ctx.needed:
        result["x"] = (grad_grad_x * grad * _second_derivative(x)).to(x.dtype)
    return result


def _arguments(*, shape, device="cpu", dtype=torch.float32, layout="contiguous") -> dict:
    return {"x": 2.0 * numbers(shape, 1, device=device, dtype=dtype, layout=layout)}


def _backward_arguments(*, shape, device="cpu", dtype=torch.float32, layout="contiguous") -> dict:
    known = {"shape": shape, "device": device, "dtype": dtype, "layout": layout}
    return {"grad": numbers(seed=2, **known), **_arguments(**known)}


_LOW = (torch.bfloat16, torch.float16)
_CASES = (
    {"shape": (3, 4, 5, 7)},
    {"shape": ()},
    *({"shape": shape} for shape in SHAPES),
    *({"shape": (2, 3, 129), "dtype": d} for d in (*_LOW, torch.float64)),
    *({"shape": (3, 4, 5, 6), "layout": x} for x in ("transposed", "channels_last", "sliced", "expanded")),
    {"shape": (3, 4, 5, 6), "layout": "transposed", "dtype": torch.bfloat16},
)
_SIZES = tuple(
    {"shape": shape, "dtype": d}
    for shape in ((4, 256, 1536), (4, 256, 4096), (32, 256, 1536))
    for d in (torch.float32, torch.bfloat16)
)
_ORIGIN = (
    "1 + tanh in float32, which PyTorch's own kernel computes, is off by up to 2^-24 near -1: times |x| / 2 below 5"
    " where it is not 0, and the derivative's second term has a factor of up to 5 more; the compiled kernels are within"
    " a few units in the last place"
)

_row = register(
    Op(
        name="gelu_tanh",
        schema="(Tensor x) -> Tensor",
        reference=reference,
        check=_check,
        setup_context=_setup_context,
        backward=_backward,
        backends=(
            Backend(name="cpp", devices=("cpu",), why_not=refuse_float64),
            triton_backend("gelu_tanh", refuse_float64),
        ),
        arguments=_arguments,
        cases=_CASES,
        sizes=_SIZES,
        cost=lambda x: (2 * x.numel() * x.element_size(), 26 * x.numel()),
        tolerance=Tolerance(absolute=6e-7, relative=1e-6, origin=_ORIGIN),
    )
)

_backward_row = register(
    Op(
        name="gelu_tanh_backward",
        schema="(Tensor grad, Tensor x) -> Tensor",
        reference=backward_reference,
        check=_check_backward,
        setup_context=_setup_context,
        backward=_backward_of_backward,
        backends=(
            Backend(name="cpp", devices=("cpu",), why_not=refuse_float64),
            triton_backend("gelu_tanh_backward", refuse_float64),
        ),
        arguments=_backward_arguments,
        cases=_CASES,
        sizes=_SIZES,
        cost=lambda grad, x: (3 * x.numel() * x.element_size(), 36 * x.numel()),
        tolerance=Tolerance(absolute=4e-6, relative=2e-6, origin=_ORIGIN),
    )
)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form.

        y = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

    Args:
        x: any shape and strides, float32, bfloat16, float16 or float64; arithmetic is in float32, or in float64 for
            float64.

    Returns:
        y of x's shape and dtype, contiguous. Differentiable twice.

    Raises:
        ValueError: x is no dense tensor of one of these dtypes.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> ops.gelu_tanh(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1588,  0.0000,  0.8412])

    Source: Hendrycks and Gimpel 2016, "Gaussian error linear units" (arXiv 1606.08415), section 2.
    """
    return _row(x)

"""linear: a linear layer that is trained, in bfloat16 on the processor's matrix tiles where it has some."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lfm_fast import _library
from lfm_fast.ops._cases import numbers
from lfm_fast.ops._checks import VELOCITY, check_tensor
from lfm_fast.ops._registry import Backend, Op, Tolerance, register

F32, BF16 = torch.float32, torch.bfloat16


def wide(x: Tensor) -> torch.dtype:
    """What sums are taken in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, F32)


def as_rows(x: Tensor) -> Tensor:
    """(..., K) -> (rows, K), also where a size is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def tile_reference(x, weight, bias=None):
    dtype = wide(x)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def tile_backward_reference(grad, x, weight, gradient_of_x):
    dtype = wide(x)
    grad = grad.to(dtype)
    grad_x = (grad @ weight.to(dtype)).to(x.dtype) if gradient_of_x else x.new_empty(0)
    rows = as_rows(grad)
    return grad_x, rows.t() @ as_rows(x.to(dtype)), rows.sum(0)


def check_layer(x, width, weight, bias, names=("weight", "bias")) -> None:
    """weight (N, K) and bias (N,) of a layer with K = width inputs, in dtypes and on the device that suit x."""
    check_tensor(names[0], weight, VELOCITY)
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{names[0]} is {tuple(weight.shape)}, expected (out_features, {width}).")
    if bias is not None:
        check_tensor(names[1], bias, VELOCITY)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{names[1]} is {tuple(bias.shape)}, expected ({weight.shape[0]},), one for each output.")
    for name, other in zip(names, (weight, bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but x is on {x.device}: move one of them.")


def check_rows(name, x) -> None:
    check_tensor(name, x, VELOCITY)
    if x.dim() < 1:
        raise ValueError(f"{name} is a scalar, expected (..., features).")


def _check(x, weight, bias=None) -> None:
    check_rows("x", x)
    check_layer(x, x.shape[-1], weight, bias)


def check_gradient(name, grad, x, width) -> None:
    """grad (..., width) beside x (..., K)."""
    check_tensor(name, grad, (x.dtype,))
    if grad.shape != (*x.shape[:-1], width):
        raise ValueError(f"{name} is {tuple(grad.shape)}, expected {(*x.shape[:-1], width)} beside x {tuple(x.shape)}.")
    if grad.device != x.device:
        raise ValueError(f"{name} is on {grad.device} but x is on {x.device}: move one of them.")


def _check_backward(grad, x, weight, gradient_of_x) -> None:
    _check(x, weight)
    check_gradient("grad", grad, x, weight.shape[0])


_BF16_ALONE = "it computes in bfloat16 alone, where the processor's tiles do"


def why_not_tiles(x, *others) -> str | None:
    if x.dtype is not BF16:
        return _BF16_ALONE
    if any(isinstance(other, Tensor) and other.dtype not in (F32, BF16) for other in others):
        return "its weights are float32 or bfloat16"
    return None


def tile_backend(why_not=why_not_tiles, kernel=None) -> Backend:
    return Backend(name="cpp", devices=("cpu",), why_not=why_not, available=_library.why_no_tiles, kernel=kernel)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad) -> dict:
    x, weight = ctx.saved_tensors
    if grad is None:
        return {}
    arguments = grad.to(x.dtype), x, weight, "x" in ctx.needed
    # a second derivative is wanted: PyTorch's own operations
    gradients = (tile_backward_reference if torch.is_grad_enabled() else _tile_backward_row)(*arguments)
    found = dict(zip(("x", "weight", "bias"), gradients))
    return {name: g if name == "x" else g.to(weight.dtype) for name, g in found.items() if name in ctx.needed}


def representable(shape, seed, dtype, device) -> Tensor:
    """Weights that bfloat16 holds exactly, of the size that keeps a layer's output near its input's."""
    w = numbers(shape, seed, device=device, dtype=BF16) / max(shape[-1], 1) ** 0.5
    return w.to(BF16).to(dtype)


def _arguments(
    *, shape, outputs, bias=True, device="cpu", dtype=BF16, parameters=F32, layout="contiguous"
) -> dict:  # fmt: skip
    """shape: of x, the inputs last; parameters: dtype of weight and bias."""
    return {
        "x": numbers(shape, 1, device=device, dtype=dtype, layout=layout),
        "weight": representable((outputs, shape[-1]), 2, parameters, device),
        "bias": numbers((outputs,), 3, device=device, dtype=parameters) if bias else None,
    }


def _backward_arguments(*, gradient_of_x=True, **case) -> dict:
    forward = _arguments(**case)
    place = {key: case[key] for key in ("device", "layout") if key in case}
    grad = numbers((*case["shape"][:-1], case["outputs"]), 4, dtype=case.get("dtype", BF16), **place)
    return {"grad": grad, "x": forward["x"], "weight": forward["weight"], "gradient_of_x": gradient_of_x}


def product_cost(x, outputs, weight) -> tuple[int, int]:
    """Bytes and FLOPs of one product of x (..., K) to (..., N)."""
    rows = x.numel() // max(x.shape[-1], 1)
    return x.element_size() * (
        x.numel() + rows * outputs
    ) + weight.numel() * weight.element_size(), 2 * x.numel() * outputs


def _cost(x, weight, bias=None) -> tuple[int, int]:
    return product_cost(x, weight.shape[0], weight)


def _backward_cost(grad, x, weight, gradient_of_x) -> tuple[int, int]:
    moved, flops = product_cost(x, weight.shape[0], weight)
    return 2 * moved, flops * (1 + gradient_of_x)


_CASES = (
    {"shape": (3, 4, 24), "outputs": 16, "dtype": F32},
    {"shape": (3, 5, 40), "outputs": 50},
    {"shape": (33, 33), "outputs": 33, "bias": False},
    *({"shape": s, "outputs": 8} for s in ((0, 3, 8), (2, 0, 8), (2, 3, 0), (1, 1))),
    {"shape": (2, 3), "outputs": 0},
    {"shape": (2, 1), "outputs": 1, "parameters": BF16},
    {"shape": (3, 70, 64), "outputs": 100},
    {"shape": (3, 4, 5, 48), "outputs": 20, "layout": "transposed"},
    {"shape": (3, 4, 64), "outputs": 96, "layout": "sliced", "parameters": BF16},
    *({"shape": (3, 4, 24), "outputs": 16, "dtype": d, "parameters": d} for d in (torch.float16, torch.float64)),
)
_SIZES = tuple(
    {"shape": (16, 256, inner), "outputs": outer}
    for inner, outer in ((384, 1152), (384, 384), (384, 1536), (1536, 384))
)
# up to 210 rows of order 1, so sums of order 15, in float32 and in another order
TOLERANCE = Tolerance(absolute=4e-5, relative=1e-5, origin="sums of up to 210 products in float32, in another order")

_tile_row = register(
    Op(
        name="tile_linear",
        schema="(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        reference=tile_reference,
        check=_check,
        setup_context=_setup_context,
        backward=_backward,
        backends=(tile_backend(),),
        arguments=_arguments,
        cases=_CASES,
        sizes=_SIZES[:1],
        cost=_cost,
        tolerance=TOLERANCE,
        shared=("weight", "bias"),
    )
)

_tile_backward_row = register(
    Op(
        name="tile_linear_backward",
        schema=(
            "(Tensor grad, Tensor x, Tensor weight, bool gradient_of_x)"
            " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
        ),
        reference=tile_backward_reference,
        check=_check_backward,
        backends=(tile_backend(),),
        arguments=_backward_arguments,
        cases=(*_CASES, {"shape": (3, 6, 40), "outputs": 20, "gradient_of_x": False}),
        sizes=_SIZES[:1],
        cost=_backward_cost,
        tolerance=TOLERANCE,
        shared=("weight", "grad_weight", "grad_bias"),
        not_differentiable=("grad", "x", "weight"),
    )
)


def why_not_in_bfloat16(*tensors) -> str | None:
    """None where a matrix product of these on the CPU is one in bfloat16: so they are, or autocast makes them so."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    taken = (BF16,) if not autocast else (F32, BF16) if autocast is BF16 else ()
    return None if all(x is None or x.dtype in taken for x in tensors) else _BF16_ALONE


def _linear_on_tiles(x, weight, bias=None):
    return _tile_row(x.to(BF16), weight, bias)


def _check_linear(x, weight, bias=None) -> None:
    _check(x, weight, bias)
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type):
            came, wanted = (str(t.dtype).removeprefix("torch.") for t in (other, x))
            raise ValueError(f"{name} is {came} but x is {wanted}: convert one of them, or call this under autocast.")


_row = register(
    Op(
        name="linear",
        schema="(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        reference=lambda x, weight, bias=None: F.linear(x, weight, bias),
        check=_check_linear,
        composite=True,
        backends=(tile_backend(why_not_in_bfloat16, _linear_on_tiles),),
        arguments=lambda **case: _arguments(**{"parameters": case.get("dtype", BF16), **case}),
        cases=tuple({k: v for k, v in case.items() if k != "parameters"} for case in _CASES),
        sizes=_SIZES,
        cost=_cost,
        # of numbers below 8, rounded after the product and again after the bias where PyTorch does not do both at once
        tolerance=Tolerance(absolute=4e-5, relative=1e-5, low=0.03, origin="a second rounding to 8 bits"),
        shared=("weight", "bias"),
    )
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, y = x W^T + b.

    On a CPU with matrix tiles (AMX), in bfloat16 (all of it, or by autocast): products of bfloat16 summed in float32,
    weights packed from what the optimizer keeps without a copy in between, and the gradients of W and b in float32.
    Elsewhere PyTorch's `linear`, as autocast has it.

    Args:
        x: (..., K), any strides.
        weight: W (N, K).
        bias: b (N,), or None.

    Returns:
        y (..., N), differentiable.

    Raises:
        ValueError: shapes that do not fit, or dtypes that differ outside of autocast.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> ops.linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[3., 7.]])

    Source: the layer's gradients are G W, G^T x and the column sums of G, with G that of y.
    """
    return _row(x, weight, bias)

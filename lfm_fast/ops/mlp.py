"""mlp: the two linear layers of a transformer with the GELU between them, trained in bfloat16 on matrix tiles."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lfm_fast.ops._cases import numbers
from lfm_fast.ops._registry import Op, Tolerance, register
from lfm_fast.ops.gelu_tanh import gelu_tanh
from lfm_fast.ops.linear import (
    BF16,
    F32,
    as_rows,
    check_gradient,
    check_layer,
    check_rows,
    linear,
    product_cost,
    representable,
    tile_backend,
    why_not_in_bfloat16,
    wide,
)


def tile_reference(x, weight_1, bias_1, weight_2, bias_2):
    dtype = wide(x)
    before = F.linear(x.to(dtype), weight_1.to(dtype), bias_1.to(dtype))
    hidden = F.gelu(before, approximate="tanh").to(x.dtype)
    y = F.linear(hidden.to(dtype), weight_2.to(dtype), bias_2.to(dtype))
    return y.to(x.dtype), before.to(x.dtype)


def tile_backward_reference(grad, x, before, weight_1, weight_2):
    dtype = wide(x)
    rows, grad, before = (as_rows(v.to(dtype)) for v in (x, grad, before))
    hidden = F.gelu(before, approximate="tanh").to(x.dtype).to(dtype)
    slope = torch.ops.aten.gelu_backward(grad @ weight_2.to(dtype), before, approximate="tanh").to(x.dtype).to(dtype)
    grad_x = (slope @ weight_1.to(dtype)).to(x.dtype).reshape(x.shape)
    return grad_x, slope.t() @ rows, slope.sum(0), grad.t() @ hidden, grad.sum(0)


def _check(x, weight_1, bias_1, weight_2, bias_2) -> None:
    check_rows("x", x)
    check_layer(x, x.shape[-1], weight_1, bias_1, ("weight_1", "bias_1"))
    check_layer(x, weight_1.shape[0], weight_2, bias_2, ("weight_2", "bias_2"))


def _check_backward(grad, x, before, weight_1, weight_2) -> None:
    check_rows("x", x)
    check_layer(x, x.shape[-1], weight_1, None, ("weight_1", ""))
    check_layer(x, weight_1.shape[0], weight_2, None, ("weight_2", ""))
    check_gradient("grad", grad, x, weight_2.shape[0])
    check_gradient("before", before, x, weight_1.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    _, before = output
    ctx.mark_non_differentiable(before)
    ctx.save_for_backward(*inputs, before)


def _backward(ctx, grad, grad_before) -> dict:
    if grad is None:
        return {}
    *inputs, before = ctx.saved_tensors
    x, weight_1, _, weight_2, _ = inputs
    names = ("x", "weight_1", "bias_1", "weight_2", "bias_2")
    if torch.is_grad_enabled():  # a second derivative is wanted: PyTorch's own operations, from the start
        wanted = {name: value for name, value in zip(names, inputs) if name in ctx.needed}
        y = tile_reference(*inputs)[0]
        return dict(zip(wanted, torch.autograd.grad(y, wanted.values(), grad.to(y.dtype), create_graph=True)))
    found = zip(names, _tile_backward_row(grad.to(x.dtype), x, before, weight_1, weight_2))
    return {n: g if n == "x" else g.to(weight_1.dtype) for n, g in found if n in ctx.needed}


def _arguments(
    *, shape, hidden, outputs, device="cpu", dtype=BF16, parameters=F32, layout="contiguous"
) -> dict:  # fmt: skip
    """shape: of x, the inputs last; parameters: dtype of weights and biases."""
    known = {"device": device, "dtype": parameters}
    return {
        "x": numbers(shape, 1, device=device, dtype=dtype, layout=layout),
        "weight_1": representable((hidden, shape[-1]), 2, parameters, device),
        "bias_1": numbers((hidden,), 3, **known),
        "weight_2": representable((outputs, hidden), 4, parameters, device),
        "bias_2": numbers((outputs,), 5, **known),
    }


def _backward_arguments(**case) -> dict:
    forward = _arguments(**case)
    _, before = tile_reference(**forward)
    place = {key: case[key] for key in ("device", "layout") if key in case}
    grad = numbers((*case["shape"][:-1], case["outputs"]), 6, dtype=case.get("dtype", BF16), **place)
    return {
        "grad": grad,
        "x": forward["x"],
        "before": before,
        "weight_1": forward["weight_1"],
        "weight_2": forward["weight_2"],
    }


def _cost(x, weight_1, bias_1, weight_2, bias_2) -> tuple[int, int]:
    return _both(x, weight_1, weight_2)


def _backward_cost(grad, x, before, weight_1, weight_2) -> tuple[int, int]:
    moved, flops = _both(x, weight_1, weight_2)
    return 2 * moved, 2 * flops


def _both(x, weight_1, weight_2) -> tuple[int, int]:
    """Bytes and FLOPs of both products; what lies between them is written and read."""
    rows = x.numel() // max(x.shape[-1], 1)
    first, second = product_cost(x, weight_1.shape[0], weight_1), 2 * rows * weight_2.numel()
    moved = first[0] + x.element_size() * rows * sum(weight_2.shape) + weight_2.numel() * weight_2.element_size()
    return moved, first[1] + second


_CASES = (
    {"shape": (3, 4, 24), "hidden": 40, "outputs": 16, "dtype": F32},
    {"shape": (3, 5, 40), "hidden": 70, "outputs": 50},
    {"shape": (33, 33), "hidden": 33, "outputs": 33},
    *({"shape": s, "hidden": 12, "outputs": 8} for s in ((0, 3, 8), (2, 0, 8), (2, 3, 0), (1, 1))),
    {"shape": (2, 3), "hidden": 0, "outputs": 4},
    {"shape": (2, 3), "hidden": 4, "outputs": 0},
    {"shape": (3, 70, 64), "hidden": 128, "outputs": 100},
    {"shape": (3, 4, 5, 48), "hidden": 40, "outputs": 20, "layout": "transposed"},
    {"shape": (3, 4, 64), "hidden": 64, "outputs": 96, "layout": "sliced", "parameters": BF16},
    *(
        {"shape": (3, 4, 24), "hidden": 40, "outputs": 16, "dtype": d, "parameters": d}
        for d in (torch.float16, torch.float64)
    ),
)
_SIZES = tuple({"shape": (16, 256, d), "hidden": 4 * d, "outputs": d} for d in (384, 1024))
# `low`: an intermediate result in bfloat16 may be rounded the other way, which moves one term of a sum by 2^-8 of it
_TOLERANCE = Tolerance(
    absolute=4e-3,
    relative=1e-2,
    low=4e-3,
    origin="what lies between the layers is rounded to 8 bits, now and then the other way",
)

_tile_row = register(
    Op(
        name="tile_mlp",
        schema=(
            "(Tensor x, Tensor weight_1, Tensor bias_1, Tensor weight_2, Tensor bias_2) -> (Tensor y, Tensor before)"
        ),
        reference=tile_reference,
        check=_check,
        setup_context=_setup_context,
        backward=_backward,
        backends=(tile_backend(),),
        arguments=_arguments,
        cases=_CASES,
        sizes=_SIZES[:1],
        cost=_cost,
        tolerance=_TOLERANCE,
        shared=("weight_1", "bias_1", "weight_2", "bias_2"),
    )
)

_tile_backward_row = register(
    Op(
        name="tile_mlp_backward",
        schema=(
            "(Tensor grad, Tensor x, Tensor before, Tensor weight_1, Tensor weight_2)"
            " -> (Tensor grad_x, Tensor grad_weight_1, Tensor grad_bias_1, Tensor grad_weight_2, Tensor grad_bias_2)"
        ),
        reference=tile_backward_reference,
        check=_check_backward,
        backends=(tile_backend(),),
        arguments=_backward_arguments,
        cases=_CASES,
        sizes=_SIZES[:1],
        cost=_backward_cost,
        tolerance=Tolerance(
            absolute=0.2, relative=1e-2, origin="up to 210 terms of a weight's gradient are rounded to 8 bits"
        ),
        shared=("weight_1", "weight_2", "grad_weight_1", "grad_bias_1", "grad_weight_2", "grad_bias_2"),
        not_differentiable=("grad", "x", "before", "weight_1", "weight_2"),
    )
)


def reference(x, weight_1, bias_1, weight_2, bias_2):
    return linear(gelu_tanh(linear(x, weight_1, bias_1)), weight_2, bias_2)


def _mlp_on_tiles(x, *weights):
    return _tile_row(x.to(BF16), *weights)[0]


_row = register(
    Op(
        name="mlp",
        schema="(Tensor x, Tensor weight_1, Tensor bias_1, Tensor weight_2, Tensor bias_2) -> Tensor",
        reference=reference,
        check=_check,
        composite=True,
        backends=(tile_backend(why_not_in_bfloat16, _mlp_on_tiles),),
        arguments=lambda **case: _arguments(**{"parameters": case.get("dtype", BF16), **case}),
        cases=tuple({k: v for k, v in case.items() if k != "parameters"} for case in _CASES),
        sizes=_SIZES,
        cost=_cost,
        tolerance=Tolerance(absolute=4e-3, relative=1e-2, low=0.03, origin="as `linear`, twice"),
        shared=("weight_1", "bias_1", "weight_2", "bias_2"),
    )
)


def mlp(x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor) -> Tensor:
    """Two linear layers with a GELU in its tanh form between them, y = gelu(x W_1^T + b_1) W_2^T + b_2.

    On a CPU with matrix tiles (AMX), in bfloat16 (all of it, or by autocast): the GELU and its derivative are part of
    the products beside them. Elsewhere `linear`, `gelu_tanh` and `linear`.

    Args:
        x: (..., K), any strides.
        weight_1, bias_1: W_1 (H, K), b_1 (H,).
        weight_2, bias_2: W_2 (N, H), b_2 (N,).

    Returns:
        y (..., N), differentiable.

    Raises:
        ValueError: shapes that do not fit, or dtypes that differ outside of autocast.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> eye, zero = torch.eye(2), torch.zeros(2)
        >>> ops.mlp(torch.tensor([[-1.0, 1.0]]), eye, zero, eye, zero)
        tensor([[-0.1588,  0.8412]])

    Source: Vaswani et al. 2017, "Attention is all you need" (arXiv 1706.03762), equation 2, with the GELU of Hendrycks
    and Gimpel 2016 (arXiv 1606.08415).
    """
    return _row(x, weight_1, bias_1, weight_2, bias_2)

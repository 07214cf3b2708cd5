"""modulated_layer_norm: layer norm without affine parameters, then each sample's own scale and shift, in one pass."""

import torch
from torch import Tensor

from lfm_fast.ops._checks import check_tolerance
from lfm_fast.ops._norms import (
    CPP,
    SIZES,
    TOKENS,
    check_modulation,
    check_statistics,
    check_tokens,
    check_tokens_like,
    modulated_norm,
    modulated_norm_gradients,
    size_of,
    statistics,
    tokens,
    vectors,
    why_not_triton,
)
from lfm_fast.ops._registry import Op, Tolerance, register
from lfm_fast.ops._triton import triton_backend

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def reference(x, shift, scale, eps=1e-6):
    y, mean, rstd = modulated_norm(x, shift, scale, eps)
    return y.to(shift.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def backward_reference(grad_y, x, scale, mean, rstd):
    grad_x, grad_shift, grad_scale = modulated_norm_gradients(grad_y, x, scale, mean, rstd)
    return grad_x.to(x.dtype).contiguous(), grad_shift.to(scale.dtype), grad_scale.to(scale.dtype)


def _check(x, shift, scale, eps=1e-6) -> None:
    check_tokens("x", x)
    check_modulation("x", x, shift=shift, scale=scale)
    check_tolerance(eps=eps)


def _check_backward(grad_y, x, scale, mean, rstd) -> None:
    check_tokens("x", x)
    check_modulation("x", x, scale=scale)
    check_tokens_like("grad_y", grad_y, "x", x, "scale", scale)
    check_statistics("x", x, mean=mean, rstd=rstd)


def _setup_context(ctx, inputs, output) -> None:
    # PyTorch leaves trailing defaults out
    x, _, scale, ctx.eps = inputs if len(inputs) == 4 else (*inputs, 1e-6)
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, grad_y, grad_mean, grad_rstd) -> dict:
    if grad_y is None:
        return {}
    x, scale, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted: PyTorch's own operations, mean and rstd as x's again
        gradients = backward_reference(grad_y, x, scale, *statistics(x, ctx.eps))
    else:
        gradients = _backward_row(grad_y, x, scale, mean, rstd)
    return dict(zip(("x", "shift", "scale"), gradients))


def _arguments(*, shape, device="cpu", dtype=F32, state=F32, layout="contiguous", chunked=False, eps=1e-6) -> dict:
    shift, scale = vectors(shape, 2, 20, chunked=chunked, device=device, dtype=dtype)
    x = tokens(shape, 1, layout=layout, device=device, dtype=state)
    return {"x": x, "shift": shift, "scale": scale, "eps": eps}


def _backward_arguments(*, shape, device="cpu", dtype=F32, state=F32, layout="contiguous", chunked=False) -> dict:
    x = tokens(shape, 1, layout=layout, device=device, dtype=state)
    grad_y = tokens(shape, 2, layout=layout, device=device, dtype=dtype)
    (scale,) = vectors(shape, 1, 21, chunked=chunked, device=device, dtype=dtype)
    mean, rstd = statistics(x, 1e-6)
    return {"grad_y": grad_y, "x": x, "scale": scale, "mean": mean, "rstd": rstd}


def _cost(x, shift, scale, eps=1e-6) -> tuple[int, int]:
    statistics_bytes = 2 * 4 * x.shape[0] * x.shape[1]
    return size_of(x, shift, scale) + x.numel() * shift.element_size() + statistics_bytes, 8 * x.numel()


def _backward_cost(grad_y, x, scale, mean, rstd) -> tuple[int, int]:
    return size_of(grad_y, x, scale, mean, rstd) + size_of(x, scale, scale), 14 * x.numel()


CASES = (
    {"shape": (3, 5, 37)},
    *({"shape": shape} for shape in TOKENS),
    *(
        {"shape": (3, 5, 37), "dtype": d, "state": s}
        for d in (F32, BF16, F16)
        for s in (F32, BF16, F16)
        if (d, s) != (F32, F32)
    ),
    {"shape": (2, 70, 65), "dtype": BF16, "state": BF16, "chunked": True},
    {"shape": (3, 5, 37), "dtype": F64, "state": F64},
    *({"shape": (3, 5, 36), "layout": x, "chunked": True} for x in ("transposed", "sliced", "expanded", "rows")),
    {"shape": (3, 5, 36), "layout": "rows", "chunked": True, "dtype": BF16},
)
_TOLERANCE = Tolerance(
    absolute=2e-5,
    relative=1e-5,
    origin="forward: 6 roundings of 2^-24 of terms below 20; backward: sums of up to 384 terms below 20 in float32, in"
    " partial sums of up to 32",
)

_backward_row = register(
    Op(
        name="modulated_layer_norm_backward",
        schema=(
            "(Tensor grad_y, Tensor x, Tensor scale, Tensor mean, Tensor rstd)"
            " -> (Tensor grad_x, Tensor grad_shift, Tensor grad_scale)"
        ),
        reference=backward_reference,
        check=_check_backward,
        # the forward's gradient is differentiated again by PyTorch itself, see _backward
        not_differentiable=("grad_y", "x", "scale", "mean", "rstd"),
        backends=(CPP, triton_backend("modulated_layer_norm_backward", why_not_triton)),
        arguments=_backward_arguments,
        cases=CASES,
        sizes=SIZES,
        cost=_backward_cost,
        tolerance=_TOLERANCE,
    )
)

_row = register(
    Op(
        name="modulated_layer_norm",
        schema="(Tensor x, Tensor shift, Tensor scale, float eps=1e-6) -> (Tensor y, Tensor mean, Tensor rstd)",
        reference=reference,
        check=_check,
        setup_context=_setup_context,
        backward=_backward,
        backends=(CPP, triton_backend("modulated_layer_norm", why_not_triton)),
        arguments=_arguments,
        cases=(*CASES, {"shape": (3, 5, 37), "eps": 0.5}),
        sizes=SIZES,
        cost=_cost,
        tolerance=_TOLERANCE,
    )
)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm over the channels without affine parameters, then each sample's own scale and shift.

        y = (x - mean) / sqrt(variance + eps) * (1 + scale) + shift

    Args:
        x: (B, T, D) float32, bfloat16, float16 or float64; arithmetic is in float32, or in float64 for float64.
        shift, scale: (B, D), one dtype. Chunks of a wider tensor, such as of a (B, 6 D), are read where they lie.
        eps: added to the variance.

    Returns:
        (B, T, D) in shift's dtype, contiguous. Differentiable in x, shift and scale, also twice (the second time by
        PyTorch's own operations); the gradients of shift and scale are summed over the tokens in float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or eps is negative.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> x = torch.tensor([[[-1.0, 1.0], [4.0, 6.0]]])
        >>> ops.modulated_layer_norm(x, torch.ones(1, 2), torch.full((1, 2), 2.0), eps=0.0)
        tensor([[[-2.,  4.],
                 [-2.,  4.]]])

    Source: Ba et al. 2016, "Layer Normalization" (arXiv 1607.06450), equation 3; Peebles and Xie 2023, "Scalable
    Diffusion Models with Transformers" (arXiv 2212.09748), section 3.2 (adaLN).
    """
    return _row(x, shift, scale, eps)[0]

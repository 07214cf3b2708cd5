"""gated_residual_norm: a block's gated residual sum and the next modulated layer norm, in one pass over the tokens."""

import torch
from torch import Tensor

from lfm_fast.ops._checks import check_tolerance
from lfm_fast.ops._norms import (
    CPP,
    LOW,
    SIZES,
    check_modulation,
    check_statistics,
    check_tokens,
    check_tokens_like,
    modulated_norm,
    modulated_norm_gradients,
    on_grid,
    size_of,
    statistics,
    tokens,
    vectors,
    why_not_triton,
    wide,
)
from lfm_fast.ops._registry import Op, Tolerance, register
from lfm_fast.ops._triton import triton_backend
from lfm_fast.ops.modulated_layer_norm import CASES

F32, BF16 = torch.float32, torch.bfloat16


def reference(x, branch, gate, shift, scale, eps=1e-6):
    state = wide(x)
    x_new = (state + gate.to(state.dtype)[:, None] * branch.to(state.dtype)).to(x.dtype).contiguous()
    y, mean, rstd = modulated_norm(x_new, shift, scale, eps)
    return x_new, y.to(shift.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def backward_reference(x_new, branch, gate, scale, mean, rstd, grad_x_new=None, grad_y=None):
    if grad_y is None:
        grad_x = grad_x_new.to(mean.dtype, copy=True)  # no output may share an input's memory
        grad_shift, grad_scale = torch.zeros_like(scale), torch.zeros_like(scale)
    else:
        grad_x, grad_shift, grad_scale = modulated_norm_gradients(grad_y, x_new, scale, mean, rstd)
        if grad_x_new is not None:
            grad_x = grad_x_new.to(mean.dtype) + grad_x
    grad_branch = gate.to(mean.dtype)[:, None] * grad_x
    grad_gate = (grad_x * branch.to(mean.dtype)).sum(1)
    per_sample = (g.to(scale.dtype).contiguous() for g in (grad_gate, grad_shift, grad_scale))
    return (grad_x.to(x_new.dtype).contiguous(), grad_branch.to(scale.dtype).contiguous(), *per_sample)


def _check(x, branch, gate, shift, scale, eps=1e-6) -> None:
    check_tokens("x", x)
    check_modulation("x", x, gate=gate, shift=shift, scale=scale)
    check_tokens_like("branch", branch, "x", x, "gate", gate)
    check_tolerance(eps=eps)


def _check_backward(x_new, branch, gate, scale, mean, rstd, grad_x_new=None, grad_y=None) -> None:
    check_tokens("x_new", x_new)
    check_modulation("x_new", x_new, gate=gate, scale=scale)
    check_tokens_like("branch", branch, "x_new", x_new, "gate", gate)
    check_statistics("x_new", x_new, mean=mean, rstd=rstd)
    if grad_x_new is None and grad_y is None:
        raise ValueError("grad_x_new and grad_y are both None: pass at least one of them.")
    if grad_x_new is not None:
        check_tokens_like("grad_x_new", grad_x_new, "x_new", x_new, "x_new", x_new)
    if grad_y is not None:
        check_tokens_like("grad_y", grad_y, "x_new", x_new, "scale", scale)


def _setup_context(ctx, inputs, output) -> None:
    # PyTorch leaves trailing defaults out
    _, branch, gate, _, scale, ctx.eps = inputs if len(inputs) == 6 else (*inputs, 1e-6)
    x_new, _, mean, rstd = output
    ctx.save_for_backward(x_new, branch, gate, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, grad_x_new, grad_y, grad_mean, grad_rstd) -> dict:
    if grad_x_new is None and grad_y is None:
        return {}
    x_new, branch, gate, scale, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted: PyTorch's own operations, mean and rstd as x_new's
        again = statistics(x_new, ctx.eps)
        gradients = backward_reference(x_new, branch, gate, scale, *again, grad_x_new, grad_y)
    else:
        gradients = _backward_row(x_new, branch, gate, scale, mean, rstd, grad_x_new, grad_y)
    return dict(zip(("x", "branch", "gate", "shift", "scale"), gradients))


def _arguments(*, shape, device="cpu", dtype=F32, state=F32, layout="contiguous", chunked=False, eps=1e-6) -> dict:
    x = tokens(shape, 1, layout=layout, device=device, dtype=state)
    branch = tokens(shape, 2, layout=layout, device=device, dtype=dtype)
    gate, shift, scale = vectors(shape, 3, 20, chunked=chunked, device=device, dtype=dtype)
    if state in LOW:
        x, branch, gate = on_grid(x, branch, gate)
    return {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale, "eps": eps}


def _backward_arguments(
    *, shape, device="cpu", dtype=F32, state=F32, layout="contiguous", chunked=False, without=None
) -> dict:
    like = {"device": device, "dtype": dtype}
    x_new = tokens(shape, 1, layout=layout, device=device, dtype=state)
    gate, scale = vectors(shape, 2, 20, chunked=chunked, **like)
    mean, rstd = statistics(x_new, 1e-6)
    arguments = {
        "x_new": x_new,
        "branch": tokens(shape, 2, layout=layout, **like),
        "gate": gate,
        "scale": scale,
        "mean": mean,
        "rstd": rstd,
        "grad_x_new": tokens(shape, 3, layout=layout, device=device, dtype=state),
        "grad_y": tokens(shape, 4, layout=layout, **like),
    }
    return arguments if without is None else {**arguments, without: None}


def _cost(x, branch, gate, shift, scale, eps=1e-6) -> tuple[int, int]:
    read, statistics_bytes = size_of(x, branch, gate, shift, scale), 2 * 4 * x.shape[0] * x.shape[1]
    return read + size_of(x) + size_of(branch) + statistics_bytes, 10 * x.numel()


def _backward_cost(x_new, branch, gate, scale, mean, rstd, grad_x_new=None, grad_y=None) -> tuple[int, int]:
    read = size_of(x_new, branch, gate, scale, mean, rstd, grad_x_new, grad_y)
    return read + size_of(x_new, branch, gate, scale, scale), 18 * x_new.numel()


_TOLERANCE = Tolerance(
    absolute=5e-5,
    relative=1e-5,
    origin="forward: 8 roundings of 2^-24 of terms below 60; backward: sums of up to 384 terms below 60 in float32, in"
    " partial sums of up to 32",
)

_backward_row = register(
    Op(
        name="gated_residual_norm_backward",
        # the gradients stand last because they are optional, and a row's first argument is a tensor
        schema=(
            "(Tensor x_new, Tensor branch, Tensor gate, Tensor scale, Tensor mean, Tensor rstd,"
            " Tensor? grad_x_new=None, Tensor? grad_y=None)"
            " -> (Tensor grad_x, Tensor grad_branch, Tensor grad_gate, Tensor grad_shift, Tensor grad_scale)"
        ),
        reference=backward_reference,
        check=_check_backward,
        # the forward's gradient is differentiated again by PyTorch itself, see _backward
        not_differentiable=("x_new", "branch", "gate", "scale", "mean", "rstd", "grad_x_new", "grad_y"),
        backends=(CPP, triton_backend("gated_residual_norm_backward", why_not_triton)),
        arguments=_backward_arguments,
        cases=(
            *CASES,
            *({"shape": (3, 5, 37), "dtype": BF16, "without": name} for name in ("grad_x_new", "grad_y")),
        ),
        sizes=SIZES,
        cost=_backward_cost,
        tolerance=_TOLERANCE,
    )
)

_row = register(
    Op(
        name="gated_residual_norm",
        schema=(
            "(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, float eps=1e-6)"
            " -> (Tensor x_new, Tensor y, Tensor mean, Tensor rstd)"
        ),
        reference=reference,
        check=_check,
        setup_context=_setup_context,
        backward=_backward,
        backends=(CPP, triton_backend("gated_residual_norm", why_not_triton)),
        arguments=_arguments,
        cases=(*CASES, {"shape": (3, 5, 37), "eps": 0.5}),
        sizes=SIZES,
        cost=_cost,
        tolerance=_TOLERANCE,
    )
)


def gated_residual_norm(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream, and take the modulated layer norm of the sum, in one pass.

        x_new = x + gate branch
        y     = (x_new - mean) / sqrt(variance + eps) * (1 + scale) + shift,    of x_new as it is stored

    Args:
        x: (B, T, D) residual stream, float32, bfloat16, float16 or float64; arithmetic is in float32, or in float64 for
            float64.
        branch: (B, T, D) output of attention or MLP.
        gate, shift, scale: (B, D), of branch's dtype. Chunks of a wider tensor, such as of a (B, 6 D), are read where
            they lie.
        eps: added to the variance.

    Returns:
        x_new (B, T, D) in x's dtype and y (B, T, D) in branch's, contiguous. Differentiable in all five tensors, also
        twice (the second time by PyTorch's own operations); the gradients of gate, shift and scale are summed over the
        tokens in float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or eps is negative.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> x, branch, one = torch.tensor([[[-1.0, 1.0]]]), torch.tensor([[[0.0, 1.0]]]), torch.ones(1, 2)
        >>> ops.gated_residual_norm(x, branch, 4 * one, 0 * one, one, eps=0.0)
        (tensor([[[-1.,  5.]]]), tensor([[[-2.,  2.]]]))

    Source: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), section 3.2
    (adaLN-Zero): the gated sum of one sublayer and the norm of the next.
    """
    return _row(x, branch, gate, shift, scale, eps)[:2]

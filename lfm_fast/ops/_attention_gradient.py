"""attention with its gradient as two rows: the forward that keeps the log-sum-exp of each query, and the backward.

What autograd sees of the compiled kernel: the composite rows `attention` and `self_attention` call these where a
gradient is needed. q comes with k and v, or alone as the (B, T, 3, heads, d) that a projection makes: then its gradient
is one tensor too, and nothing is copied between the projection's backward and this one.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lfm_fast import _library
from lfm_fast.ops._cases import numbers
from lfm_fast.ops._checks import VELOCITY, check_like, check_number, check_per_sample, check_tensor
from lfm_fast.ops._registry import Backend, Op, Tolerance, register

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
_MOST_KEYS, _MOST_WIDTH = 4096, 256  # of csrc/cpu/attention_heads.h


def default_scale(q: Tensor, scale: float | None) -> float:
    if scale is not None:
        return float(scale)
    return q.shape[-1] ** -0.5 if q.shape[-1] else 1.0


def parts(q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, heads, T, d), which may come in q alone as (B, T, 3, heads, d)."""
    return (q, k, v) if k is not None else tuple(x.transpose(1, 2) for x in q.unbind(2))


def reference(q, k, v, scale=None):
    q, k, v = parts(q, k, v)
    wide = torch.promote_types(q.dtype, F32)
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * default_scale(q, scale)
    out = (torch.softmax(scores, dim=-1) @ v.to(wide)).to(q.dtype)
    heads_together = out.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # (B, T_q, heads, d) in memory
    return heads_together.transpose(1, 2), torch.logsumexp(scores, dim=-1)


def backward_reference(grad, q, k, v, out, lse, scale=None):
    q, k, v = parts(q, k, v)
    factor, dtype = default_scale(q, scale), q.dtype
    grad, q, k, v, out = (x.to(lse.dtype) for x in (grad, q, k, v, out))
    weights = torch.exp((q @ k.transpose(-2, -1)) * factor - lse[..., None])  # (B, heads, T_q, T_k)
    # 0 lse: a query whose scores are not finite has no weights, and NaN for a gradient
    delta = (grad * out).sum(-1, keepdim=True) + 0.0 * lse[..., None]
    slopes = weights * (grad @ v.transpose(-2, -1) - delta)
    gradients = slopes @ k * factor, slopes.transpose(-2, -1) @ q * factor, weights.transpose(-2, -1) @ grad
    tokens = max(q.shape[2], k.shape[2])
    padded = [F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, tokens - x.shape[2])) for x in gradients]
    return torch.stack(padded, dim=2).to(dtype)


def check_three(q, k, v) -> None:
    check_tensor("q", q, VELOCITY)
    check_tensor("k", k, VELOCITY)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{name} is {tuple(x.shape)}, expected (B, heads, T, d).")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k is {tuple(k.shape)} but q is {tuple(q.shape)}: only the number of tokens may differ.")
    if q.device != k.device:
        raise ValueError(f"k is on {k.device} but q is on {q.device}: move one of them.")
    check_like("v", v, "k", k, VELOCITY)
    for name, x in (("k", k), ("v", v)):
        if x.dtype is not q.dtype:
            came, wanted = (str(t.dtype).removeprefix("torch.") for t in (x, q))
            raise ValueError(f"{name} is {came} but q is {wanted}: convert one of them.")


def check_fused(name: str, qkv) -> None:
    check_tensor(name, qkv, VELOCITY)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{name} is {tuple(qkv.shape)}, expected (B, T, 3, heads, d).")


def check_scale(scale) -> None:
    if scale is None:
        return
    if isinstance(scale, bool):
        raise ValueError("scale is a bool: pass a number.")
    check_number("scale", scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}, expected a positive number.")


def _check(q, k, v, scale=None) -> None:
    if k is None and v is None:
        check_fused("q", q)
    else:
        check_three(q, k, v)
    check_scale(scale)


def _check_backward(grad, q, k, v, out, lse, scale=None) -> None:
    _check(q, k, v, scale)
    queries = parts(q, k, v)[0]
    for name, x in (("grad", grad), ("out", out)):
        check_like(name, x, "the queries", queries, (q.dtype,))
    check_per_sample("lse", lse, tuple(queries.shape[:3]), "q", q, (torch.promote_types(q.dtype, F32),))


def why_not_empty(q, k, v, scale=None) -> str | None:
    if 0 in q.shape or k.shape[2] == 0:
        return "there is nothing to compute, and fused kernels differ in what they make of that"
    return None


def why_not_cpp(q, k, v, scale=None) -> str | None:
    """The compiled kernels' reason, forward and backward."""
    given = [x.dim() for x in (q, k, v) if isinstance(x, Tensor)]  # the operator called with anything at all
    if given != [4, 4, 4] and not (given == [5] and q.shape[2] == 3):
        return "it takes q, k and v of four dimensions, or one (B, T, 3, heads, d)"
    if q.dtype is not BF16:
        return "it computes in bfloat16 alone, where the processor's tiles do"
    q, k, v = parts(q, k, v)
    if k.shape[2] > _MOST_KEYS or q.shape[3] > _MOST_WIDTH:
        return f"it takes at most {_MOST_KEYS} keys of {_MOST_WIDTH} channels"
    return why_not_empty(q, k, v)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale = inputs if len(inputs) == 4 else (*inputs, None)  # PyTorch leaves trailing defaults out
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, grad, grad_lse) -> dict:
    if grad is None:
        return {}
    q, k, v, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted: PyTorch's own operations, out and lse as q's, k's, v's
        gradients = backward_reference(grad.to(q.dtype), q, k, v, *reference(q, k, v, ctx.scale), ctx.scale)
    else:
        gradients = _backward_row(grad.to(q.dtype), q, k, v, out, lse, ctx.scale)
    if k is None:
        return {"q": gradients}
    of_q, of_k, of_v = (x.transpose(1, 2) for x in gradients.unbind(2))
    return {"q": of_q[:, :, : q.shape[2]], "k": of_k[:, :, : k.shape[2]], "v": of_v[:, :, : k.shape[2]]}


def _arguments(*, shape, keys=None, device="cpu", dtype=BF16, layout="contiguous", scale=None) -> dict:
    """shape (B, heads, T_q, d); keys T_k, T_q where None; layout "fused": one (B, T, 3, heads, d)."""
    batch, heads, tokens, width = shape
    known = {"device": device, "dtype": dtype}
    if layout == "fused":
        return {"q": numbers((batch, tokens, 3, heads, width), 1, **known), "k": None, "v": None, "scale": scale}
    other = (batch, heads, tokens if keys is None else keys, width)
    made = (numbers(s, 1 + i, layout=layout, **known) for i, s in enumerate((shape, other, other)))
    return dict(zip("qkv", made), scale=scale)


def _backward_arguments(*, shape, layout="contiguous", **case) -> dict:
    forward = _arguments(shape=shape, layout=layout, **case)
    out, lse = reference(**forward)  # heads side by side, as after a fused projection
    out = out if layout == "fused" else out.contiguous()
    grad = numbers(shape, 5, layout="contiguous" if layout == "fused" else layout, device=out.device, dtype=out.dtype)
    return {"grad": grad, **dict(zip("qkv", list(forward.values())[:3])), "out": out, "lse": lse,
            "scale": forward["scale"]}  # fmt: skip


def _cost(q, k, v, scale=None) -> tuple[int, int]:
    queries, keys, values = parts(q, k, v)
    moved = sum(x.numel() * x.element_size() for x in (queries, queries, keys, values))  # the result has q's size
    scores = queries.shape[0] * queries.shape[1] * queries.shape[2] * keys.shape[2]
    return moved + 4 * scores // max(keys.shape[2], 1), scores * (4 * queries.shape[3] + 5)


def _backward_cost(grad, q, k, v, out, lse, scale=None) -> tuple[int, int]:
    moved, flops = _cost(q, k, v, scale)
    queries, keys, _ = parts(q, k, v)
    tokens = max(queries.shape[2], keys.shape[2])
    written = 3 * queries.shape[0] * tokens * queries.shape[1] * queries.shape[3] * q.element_size()
    return moved + written + grad.numel() * grad.element_size(), flops // 2 * 5  # five products for two


_CASES = (
    {"shape": (3, 2, 17, 8)},
    {"shape": (3, 2, 20, 16), "layout": "fused"},
    {"shape": (3, 2, 5, 8), "dtype": F32},
    *({"shape": s} for s in ((0, 2, 4, 8), (2, 0, 4, 8), (2, 2, 0, 8), (2, 2, 3, 0), (1, 1, 1, 1))),
    *({"shape": s, "layout": "fused"} for s in ((0, 4, 2, 8), (2, 1, 0, 8), (1, 1, 1, 1))),
    *({"shape": (2, 2, 3, 8), "keys": n} for n in (0, 1, 7)),
    {"shape": (2, 1, 1, 8), "keys": 70},
    {"shape": (1, 2, 0, 8), "keys": 3},
    {"shape": (2, 3, 70, 72), "layout": "fused"},
    {"shape": (1, 1, 290, 33), "keys": 65, "scale": 0.3},
    {"shape": (2, 2, 9, 13), "dtype": F16, "scale": 1},
    {"shape": (2, 2, 9, 13), "dtype": F64, "keys": 4, "scale": 2.0},
    *({"shape": (2, 3, 8, 16), "layout": x} for x in ("transposed", "sliced", "expanded", "channels_last")),
)
_SIZES = tuple(
    {"shape": shape, "layout": "fused"}
    for shape in ((8, 16, 256, 72), (32, 6, 64, 64), (32, 8, 16, 32), (32, 6, 256, 64))
)


_CPP = Backend(name="cpp", devices=("cpu",), why_not=why_not_cpp, available=_library.why_no_tiles)

_backward_row = register(
    Op(
        name="attention_backward",
        schema=("(Tensor grad, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor lse, float? scale=None) -> Tensor"),
        reference=backward_reference,
        check=_check_backward,
        # the forward's gradient is differentiated again by PyTorch itself, see _backward
        not_differentiable=("grad", "q", "k", "v", "out", "lse"),
        backends=(replace(_CPP, why_not=lambda grad, *args: why_not_cpp(*args[:3])),),
        arguments=_backward_arguments,
        cases=_CASES,
        sizes=_SIZES,
        cost=_backward_cost,
        tolerance=Tolerance(
            absolute=2e-5,
            relative=1e-5,
            low=0.06,
            origin=(
                "sums of up to 290 terms below 20 in float32; low: weights and their gradients, which sum up to 10, are"
                " rounded to 2^-9 before they meet numbers below 4"
            ),
        ),
    )
)

_row = register(
    Op(
        name="attention_with_lse",
        schema="(Tensor q, Tensor? k, Tensor? v, float? scale=None) -> (Tensor out, Tensor lse)",
        reference=reference,
        check=_check,
        setup_context=_setup_context,
        backward=_backward,
        backends=(_CPP,),
        arguments=_arguments,
        cases=_CASES,
        sizes=_SIZES,
        cost=_cost,
        tolerance=Tolerance(
            absolute=1e-4,
            relative=1e-5,
            low=0.03,
            origin="the compiled exponential's 8e-5; low: weights, which sum up to 1, are rounded to 2^-9, v below 5",
        ),
    )
)


def differentiable(q: Tensor, k: Tensor | None, v: Tensor | None, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v, differentiable."""
    return _row(q, k, v, scale)[0]

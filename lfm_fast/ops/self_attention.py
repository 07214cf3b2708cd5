"""self_attention: attention among the tokens of one projection, whose gradient is one tensor as the projection is."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from lfm_fast.ops._attention_gradient import check_fused, check_scale, differentiable, parts
from lfm_fast.ops._cases import numbers
from lfm_fast.ops._checks import needs_gradient
from lfm_fast.ops._registry import Backend, Op, register, row
from lfm_fast.ops.attention import prepare
from lfm_fast.ops.attention import reference as attention_reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
_ATTENTION = row("attention")


def reference(qkv, scale=None):
    return attention_reference(*parts(qkv), scale)


def _check(qkv, scale=None) -> None:
    check_fused("qkv", qkv)
    check_scale(scale)


def _cpp(qkv, scale=None):
    if needs_gradient(qkv):
        return differentiable(qkv, None, None, scale)
    return _ATTENTION.kernels["cpp"](*parts(qkv), scale)


def _of_slices(backend: Backend) -> Backend:
    """A backend of `attention`, given the slices."""

    def kernel(qkv, scale=None):
        return _ATTENTION.kernels[backend.name](*parts(qkv), scale)

    def why_not(qkv, scale=None) -> str | None:
        return backend.why_not(*parts(qkv), scale)

    return replace(backend, why_not=why_not, kernel=_cpp if backend.name == "cpp" else kernel, with_gradient=None)


def _rank(op: Op, args: tuple) -> tuple[str, dict[str, str]]:
    """What `attention` would take, by measurement or by name."""
    qkv, scale = args if len(args) == 2 else (*args, None)
    return _ATTENTION.choose((*parts(qkv), scale)), {}


def _arguments(*, shape, device="cpu", dtype=F32, layout="contiguous", scale=None) -> dict:
    """shape (B, heads, T, d), as for `attention`."""
    batch, heads, tokens, width = shape
    known = {"device": device, "dtype": dtype, "layout": layout}
    return {"qkv": numbers((batch, tokens, 3, heads, width), 1, **known), "scale": scale}


def _cost(qkv, scale=None) -> tuple[int, int]:
    return _ATTENTION.cost(*parts(qkv), scale)


_row = register(
    Op(
        name="self_attention",
        schema="(Tensor qkv, float? scale=None) -> Tensor",
        reference=reference,
        check=_check,
        composite=True,
        prepare=functools.partial(prepare, tensors=1),
        rank=_rank,
        backends=tuple(_of_slices(b) for b in _ATTENTION.backends),
        arguments=_arguments,
        cases=(
            {"shape": (3, 2, 17, 8)},
            *({"shape": s} for s in ((0, 2, 4, 8), (2, 0, 4, 8), (2, 2, 0, 8), (2, 2, 3, 0), (1, 1, 1, 1))),
            {"shape": (2, 3, 70, 72)},
            {"shape": (2, 2, 16, 64), "dtype": BF16},
            {"shape": (2, 2, 9, 13), "dtype": BF16, "scale": 0.3},
            {"shape": (2, 2, 9, 13), "dtype": F16, "scale": 1},
            {"shape": (2, 2, 9, 13), "dtype": F64},
            *({"shape": (2, 3, 8, 16), "layout": x} for x in ("transposed", "sliced", "expanded")),
            *({"shape": (2, 3, 8, 16), "layout": x, "dtype": BF16} for x in ("transposed", "sliced", "expanded")),
        ),
        sizes=({"shape": (32, 6, 256, 64), "dtype": BF16},),
        cost=_cost,
        tolerance=_ATTENTION.tolerance,
    )
)


def self_attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention of tokens to one another, from one projection of them.

        result = softmax(scale q k^T) v

    Args:
        qkv: (B, T, 3, heads, d) with q, k and v in this order; float32, bfloat16, float16 or float64.
        scale: a positive number; None means 1 / sqrt(d).

    Returns:
        (B, heads, T, d), what `attention` gives for the three slices, by the backend that it would take. Where that is
        "cpp", the gradient is written into one (B, T, 3, heads, d) and copied nowhere.

    Raises:
        ValueError: qkv has another shape or dtype, or scale is not a positive number.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> qkv = torch.zeros(1, 2, 3, 1, 2)
        >>> qkv[0, :, 2, 0] = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> ops.self_attention(qkv)[0, 0]
        tensor([[2., 4.],
                [2., 4.]])

    Source: Vaswani et al. 2017, "Attention is all you need" (arXiv 1706.03762), equation 1.
    """
    return _row(qkv, scale)

"""attention: softmax(q k^T scale) v by the fastest of PyTorch's and xformers' kernels for the call."""

import torch
from torch import Tensor

from lfm_fast.ops import _attention
from lfm_fast.ops._attention_gradient import check_scale, check_three, default_scale
from lfm_fast.ops._cases import numbers
from lfm_fast.ops._registry import Op, Tolerance, register

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def reference(q, k, v, scale=None):
    wide = torch.promote_types(q.dtype, F32)
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * default_scale(q, scale)
    weights = torch.softmax(scores, dim=-1)  # (B, heads, T_q, T_k)
    return (weights @ v.to(wide)).to(q.dtype)


def _check(q, k, v, scale=None) -> None:
    check_three(q, k, v)
    check_scale(scale)


def prepare(args: tuple, tensors: int = 3) -> tuple:
    """Autocast treats attention as it treats a matrix product."""
    first, rest = args[:tensors], args[tensors:]
    if not all(isinstance(x, Tensor) for x in first) or first[0].device.type not in ("cpu", "cuda"):
        return args
    device = first[0].device.type
    if not torch.is_autocast_enabled(device):
        return args
    dtype = torch.get_autocast_dtype(device)
    return (*(x.to(dtype) if x.dtype in (F32, BF16, F16) else x for x in first), *rest)


def _arguments(*, shape, keys=None, device="cpu", dtype=F32, layout="contiguous", scale=None) -> dict:
    """shape (B, heads, T_q, d); keys T_k, T_q where None; layout "fused": slices of one (B, T, 3, heads, d)."""
    batch, heads, tokens, width = shape
    known = {"device": device, "dtype": dtype}
    if layout == "fused":
        fused = numbers((batch, tokens, 3, heads, width), 1, **known)
        return dict(zip("qkv", fused.permute(2, 0, 3, 1, 4)), scale=scale)
    other = (batch, heads, tokens if keys is None else keys, width)
    made = (numbers(s, 1 + i, layout=layout, **known) for i, s in enumerate((shape, other, other)))
    return dict(zip("qkv", made), scale=scale)


def _cost(q, k, v, scale=None) -> tuple[int, int]:
    moved = sum(x.numel() * x.element_size() for x in (q, q, k, v))  # the result has q's size
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return moved, scores * (4 * q.shape[3] + 5)  # two products; scaling, maximum, difference, exponential, sum


_row = register(
    Op(
        name="attention",
        schema="(Tensor q, Tensor k, Tensor v, float? scale=None) -> Tensor",
        reference=reference,
        check=_check,
        composite=True,
        like_compiled=_attention.like_cpp,
        prepare=prepare,
        rank=_attention.rank,
        backends=_attention.BACKENDS,
        arguments=_arguments,
        cases=(
            {"shape": (3, 2, 17, 8)},
            {"shape": (3, 2, 5, 8)},
            *({"shape": s} for s in ((0, 2, 4, 8), (2, 0, 4, 8), (2, 2, 0, 8), (2, 2, 3, 0), (1, 1, 1, 1))),
            *({"shape": (2, 2, 3, 8), "keys": n} for n in (0, 1, 7)),
            {"shape": (2, 1, 1, 8), "keys": 70},
            {"shape": (1, 2, 0, 8), "keys": 3},
            {"shape": (2, 3, 70, 72)},
            {"shape": (2, 2, 16, 64), "dtype": BF16, "layout": "fused"},
            {"shape": (1, 2, 33, 7), "keys": 65, "scale": 0.3},
            {"shape": (2, 2, 9, 13), "dtype": F16, "scale": 1},
            {"shape": (2, 2, 9, 13), "dtype": BF16, "keys": 4},
            {"shape": (2, 2, 9, 13), "dtype": F64, "keys": 4, "scale": 2.0},
            *({"shape": (2, 3, 8, 16), "layout": x} for x in ("fused", "transposed", "sliced", "expanded")),
            {"shape": (2, 3, 8, 16), "layout": "channels_last", "dtype": BF16},
        ),
        sizes=tuple(
            {"shape": shape, "dtype": dtype, "layout": "fused"}
            for shape in ((32, 6, 256, 64), (8, 16, 256, 64), (8, 16, 256, 72), (32, 6, 64, 64), (32, 8, 16, 32))
            for dtype in (F32, BF16)
        ),
        cost=_cost,
        tolerance=Tolerance(
            absolute=1e-5,
            relative=1e-5,
            low=0.03,
            origin=(
                "scores below 30 in the cases, so 30 2^-24 relative in a weight and sums of 70 terms below 5; low: "
                "scores, weights and their products' sums are rounded to 2^-9 where they are kept in bf16, v below 5"
            ),
        ),
    )
)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention, on the kernel that is fastest for this device, dtype and shape.

        result = softmax(scale q k^T) v

    Args:
        q: (B, heads, T_q, d) float32, bfloat16, float16 or float64. Slices of a fused (B, T, 3, heads, d) are read
            where they lie.
        k, v: (B, heads, T_k, d), q's dtype. Without keys (T_k = 0) the result is 0.
        scale: a positive number; None means 1 / sqrt(d).

    Returns:
        (B, heads, T_q, d) in q's dtype; its strides are the backend's own. Differentiable in q, k and v once (the
        reference: any number of times), by the backward pass of the backend that ran forward. Autocast makes the
        arguments those of its dtype.

    The backends: "cpp" is a compiled kernel for bfloat16 on processors with AMX, "sdpa" PyTorch's own choice among its
    fused kernels; "flash", "cudnn", "efficient" and "xformers" are single CUDA kernels, "math" the two
    matrix products with the weights in memory, on either device. Which one runs is measured once and remembered in the
    user's cache folder, or not measured at all: LFM_FAST_MEASURE is "auto" (on CUDA, in a run of one process), "always"
    or "never". Under torch.compile the choice is made when the graph is traced, by what is remembered.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or scale is not a positive number.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> q, k, v = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 2, 2), torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
        >>> ops.attention(q, k, v)
        tensor([[[[2., 4.]]]])

    Source: Vaswani et al. 2017, "Attention is all you need" (arXiv 1706.03762), equation 1; Dao 2023,
    "FlashAttention-2" (arXiv 2307.08691), for computing it without the weights in memory.
    """
    return _row(q, k, v, scale)

"""packed_linear: a linear layer in bfloat16 whose weights lie in the order in which matrix tiles read them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lfm_fast import _library
from lfm_fast.ops._cases import numbers
from lfm_fast.ops._checks import check_tensor
from lfm_fast.ops._registry import Backend, Op, Tolerance, register

BF16 = torch.bfloat16
PANEL, STEP = 32, 32  # columns of the result, and inner numbers, of two tiles side by side


def pack(weight: Tensor) -> Tensor:
    """The weight (N, K) of a linear layer in bfloat16 and in the tiles' order: (N / 32, K / 32, 2, 16, 16, 2).

    Panels of 32 outputs, in each steps of 32 inputs, in each two tiles of 16 outputs, in each 16 pairs of inputs, in
    each the two inputs of each of 16 outputs. Zeros fill up N and K.
    """
    outer, inner = weight.shape
    padded = F.pad(weight.detach().to(BF16), (0, -inner % STEP, 0, -outer % PANEL))
    tiles = padded.reshape(-(-outer // PANEL), 2, 16, -(-inner // STEP), 16, 2)  # (panel, half, output, step, pair, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()


def unpack(weight: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight (N, K) that `pack` was given, rounded as it did."""
    panels, steps = weight.shape[:2]
    wide = weight.permute(0, 2, 4, 1, 3, 5).reshape(panels * PANEL, steps * STEP)
    return wide[:out_features, :in_features]


def reference(x, weight, bias, out_features, gelu=False):
    wide = torch.promote_types(x.dtype, torch.float32)
    plain = unpack(weight, out_features, x.shape[-1]).to(wide)
    y = F.linear(x.to(wide), plain, None if bias is None else bias.to(wide))
    return (F.gelu(y, approximate="tanh") if gelu else y).to(x.dtype)


def check_packed(x, weight, tiles, by, out_features, vectors) -> None:
    """x (..., K) in bfloat16, `weight` in tiles of such a dtype, inner numbers of a step and last shape, which `by`
    makes, and vectors {name: (vector or None, dtypes)}, a number for each output."""
    dtype, step, tile = tiles
    check_tensor("x", x, (BF16,))
    if x.dim() < 1:
        raise ValueError("x is a scalar, expected (..., in_features).")
    if isinstance(out_features, bool) or not isinstance(out_features, (int, torch.SymInt)) or out_features < 0:
        raise ValueError(f"out_features is {out_features!r}, expected a whole number from 0 on.")
    check_tensor("weight", weight, (dtype,))
    expected = (-(-out_features // PANEL), -(-x.shape[-1] // step), 2, *tile)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, expected {expected}, which {by}.pack makes for {x.shape[-1]} inputs and "
            f"{out_features} outputs."
        )
    present = {name: vector for name, (vector, _) in vectors.items() if vector is not None}
    for name, vector in present.items():
        check_tensor(name, vector, vectors[name][1])
        if vector.shape != (out_features,):
            raise ValueError(f"{name} is {tuple(vector.shape)}, expected ({out_features},), one for each output.")
    for name, other in {"weight": weight, **present}.items():
        if other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but x is on {x.device}: move one of them.")


def _check(x, weight, bias, out_features, gelu=False) -> None:
    tiles = BF16, STEP, (16, 16, 2)
    check_packed(x, weight, tiles, "packed_linear", out_features, {"bias": (bias, (BF16,))})


def _arguments(*, shape, outputs, bias=True, gelu=False, device="cpu", dtype=BF16, layout="contiguous") -> dict:
    """shape: of x, the inputs last."""
    known = {"device": device, "dtype": dtype}
    x = numbers(shape, 1, layout=layout, **known)
    weight = pack(numbers((outputs, shape[-1]), 2, **known) / max(shape[-1], 1) ** 0.5)
    shift = numbers((outputs,), 3, **known) if bias else None
    return {"x": x, "weight": weight, "bias": shift, "out_features": outputs, "gelu": gelu}


def packed_cost(x, weight, out_features, gelu) -> tuple[int, int]:
    rows = x.numel() // max(x.shape[-1], 1)
    moved = 2 * (x.numel() + rows * out_features) + weight.numel() * weight.element_size()
    return moved, 2 * x.numel() * out_features + (26 * rows * out_features if gelu else 0)


SIZES = tuple(
    {"shape": (batch, 256, inner), "outputs": outer, "gelu": gelu}
    for batch in (4, 16)
    for inner, outer, gelu in ((384, 1152, False), (384, 384, False), (384, 1536, True), (1536, 384, False))
) + tuple(
    {"shape": (4, 256, inner), "outputs": outer, "gelu": gelu}
    for inner, outer, gelu in ((1024, 3072, False), (1024, 4096, True), (4096, 1024, False))
)

CASES = (
    {"shape": (3, 5, 40), "outputs": 50},
    {"shape": (3, 40), "outputs": 7, "gelu": True},
    {"shape": (33, 33), "outputs": 33, "bias": False},
    *({"shape": s, "outputs": 8} for s in ((0, 3, 8), (2, 0, 8), (2, 3, 0), (1, 1))),
    {"shape": (2, 3), "outputs": 0},
    {"shape": (2, 1), "outputs": 1},
    {"shape": (3, 70, 600), "outputs": 100, "gelu": True},
    {"shape": (2, 31, 1100), "outputs": 40, "layout": "transposed"},
    {"shape": (3, 4, 64), "outputs": 96, "layout": "sliced"},
    {"shape": (3, 4, 64), "outputs": 48, "layout": "expanded"},
)

_row = register(
    Op(
        name="packed_linear",
        schema="(Tensor x, Tensor weight, Tensor? bias, int out_features, bool gelu=False) -> Tensor",
        reference=reference,
        check=_check,
        backends=(
            Backend(
                name="cpp",
                devices=("cpu",),
                why_not=lambda *args: None,
                available=_library.why_no_tiles,
            ),
        ),
        arguments=_arguments,
        cases=CASES,
        sizes=SIZES,
        cost=lambda x, weight, bias, out_features, gelu=False: packed_cost(x, weight, out_features, gelu),
        tolerance=Tolerance(
            absolute=1e-5,
            relative=1e-5,
            low=2e-4,
            origin="up to 1,100 products of order 1 / 1,100 are summed in another order; GELU's logistic to 1.5e-4",
        ),
        shared=("weight", "bias"),
        not_differentiable=("x", "weight", "bias"),
    )
)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, gelu: bool = False) -> Tensor:
    """A linear layer, with the GELU after it where that is wanted.

        y = x W^T + b        or        y = gelu(x W^T + b), gelu in its tanh form

    Args:
        x: (..., K), any strides, bfloat16.
        weight: W (N, K) as `pack` orders it, (ceil(N / 32), ceil(K / 32), 2, 16, 16, 2), bfloat16.
        bias: b (N,) bfloat16, or None.
        out_features: N.
        gelu: whether GELU follows.

    Returns:
        y (..., N) bfloat16, contiguous. Products of bfloat16 are summed in float32 and rounded once, after the GELU.

    Raises:
        ValueError: shapes or dtypes other than these, or a gradient asked for: this is the layer of a network that is
            not trained any more.

    Example:
        >>> import torch
        >>> from lfm_fast.ops.packed_linear import pack, packed_linear
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.bfloat16)
        >>> packed_linear(torch.ones(1, 2, dtype=torch.bfloat16), pack(weight), None, 3)
        tensor([[ 3.,  7., 11.]], dtype=torch.bfloat16)

    Source: Hendrycks and Gimpel 2016, "Gaussian error linear units" (arXiv 1606.08415), section 2, for the GELU.
    """
    return _row(x, weight, bias, out_features, gelu)

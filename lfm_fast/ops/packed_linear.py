"""packed_linear: a linear layer whose weights lie in the order in which the processor's matrix tiles read them.

The tiles multiply bfloat16. A number in float32 is the sum of three of those, and products of such sums are made of
six products of their parts: float32 at a sixth of the tiles' speed, which is still twice that of vector units.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lfm_fast import _library
from lfm_fast.ops._cases import numbers
from lfm_fast.ops._checks import check_tensor
from lfm_fast.ops._registry import Backend, Op, Tolerance, register

BF16, FLOAT = torch.bfloat16, torch.float32
PANEL, STEP = 32, 32  # columns of the result, and inner numbers, of two tiles side by side
_PARTS = {BF16: (1,), FLOAT: (2, 3)}  # of the weights, by the type of x


def parts_of(x: Tensor, parts: int) -> list[Tensor]:
    """Numbers as so many bfloat16 each, every one the rounding of what is left: their sum is x but for 2^(-9 parts)."""
    rest, result = x.detach().float(), []
    for _ in range(parts):
        result.append(rest.to(BF16))
        rest = rest - result[-1].float()
    return result


def pack(weight: Tensor, parts: int = 1) -> Tensor:
    """The weight (N, K) of a linear layer in bfloat16 and in the tiles' order: (N / 32, K / 32, parts, 2, 16, 16, 2).

    Panels of 32 outputs, in each steps of 32 inputs, in each the parts whose sum the weight is, in each two tiles of
    16 outputs, in each 16 pairs of inputs, in each the two inputs of each of 16 outputs. Zeros fill up N and K.
    parts: 1 for layers in bfloat16; 3 for float32, 2 for its upper 16 bits.
    """
    outer, inner = weight.shape
    split = torch.stack(parts_of(weight, parts))
    padded = F.pad(split, (0, -inner % STEP, 0, -outer % PANEL))
    # (part, panel, half, output, step, pair, 2)
    tiles = padded.reshape(parts, -(-outer // PANEL), 2, 16, -(-inner // STEP), 16, 2)
    return tiles.permute(1, 4, 0, 2, 5, 3, 6).contiguous()


def unpack(weight: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight (N, K) that `pack` was given, rounded as it did: bfloat16 of one part, float32 of several."""
    panels, steps, parts = weight.shape[:3]
    wide = weight.permute(2, 0, 3, 5, 1, 4, 6).reshape(parts, panels * PANEL, steps * STEP)
    wide = wide[:, :out_features, :in_features]
    # the smallest first: then nothing is rounded
    return wide[0] if parts == 1 else sum(part.float() for part in reversed(wide.unbind(0)))


def reference(x, weight, bias, out_features, gelu=False):
    wide = torch.promote_types(x.dtype, torch.float32)
    plain = unpack(weight, out_features, x.shape[-1]).to(wide)
    rows = x.to(wide) if weight.shape[2] == 1 else sum(part.to(wide) for part in parts_of(x, weight.shape[2]))
    y = F.linear(rows, plain, None if bias is None else bias.to(wide))
    return (F.gelu(y, approximate="tanh") if gelu else y).to(x.dtype)


def check_packed(x, types, weight, tiles, by, out_features, vectors) -> None:
    """x (..., K) of such types, `weight` in tiles of a dtype, of so many inner numbers of a step and one of such last
    shapes, which `by` makes, and vectors {name: (vector or None, dtypes)}, a number for each output."""
    dtype, step, lasts = tiles
    check_tensor("x", x, types)
    if x.dim() < 1:
        raise ValueError("x is a scalar, expected (..., in_features).")
    if isinstance(out_features, bool) or not isinstance(out_features, (int, torch.SymInt)) or out_features < 0:
        raise ValueError(f"out_features is {out_features!r}, expected a whole number from 0 on.")
    check_tensor("weight", weight, (dtype,))
    expected = [(-(-out_features // PANEL), -(-x.shape[-1] // step), *last) for last in lasts]
    if tuple(weight.shape) not in expected:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, expected {' or '.join(map(str, expected))}, which {by}.pack makes for "
            f"{x.shape[-1]} inputs and {out_features} outputs."
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
    check_tensor("x", x, tuple(_PARTS))
    tiles = BF16, STEP, [(parts, 2, 16, 16, 2) for parts in _PARTS[x.dtype]]
    check_packed(x, (x.dtype,), weight, tiles, "packed_linear", out_features, {"bias": (bias, (x.dtype,))})


def _arguments(
    *, shape, outputs, bias=True, gelu=False, parts=None, device="cpu", dtype=BF16, layout="contiguous"
) -> dict:
    """shape: of x, the inputs last; parts: the most that there are."""
    known = {"device": device, "dtype": dtype}
    x = numbers(shape, 1, layout=layout, **known)
    weight = numbers((outputs, shape[-1]), 2, **known) / max(shape[-1], 1) ** 0.5
    weight = pack(weight, parts or _PARTS[dtype][-1])
    shift = numbers((outputs,), 3, **known) if bias else None
    return {"x": x, "weight": weight, "bias": shift, "out_features": outputs, "gelu": gelu}


def packed_cost(x, weight, out_features, gelu) -> tuple[int, int]:
    rows = x.numel() // max(x.shape[-1], 1)
    moved = x.element_size() * (x.numel() + rows * out_features) + weight.numel() * weight.element_size()
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
        cases=(
            *CASES,
            {"shape": (3, 5, 40), "outputs": 50, "dtype": FLOAT},
            {"shape": (3, 40), "outputs": 7, "gelu": True, "dtype": FLOAT},
            {"shape": (33, 33), "outputs": 33, "bias": False, "dtype": FLOAT},
            {"shape": (2, 31, 1100), "outputs": 40, "layout": "transposed", "dtype": FLOAT},
            {"shape": (3, 70, 600), "outputs": 100, "gelu": True, "dtype": FLOAT, "parts": 2},
            *({"shape": s, "outputs": 8, "dtype": FLOAT} for s in ((0, 3, 8), (2, 3, 0), (1, 1))),
        ),
        sizes=(*SIZES, *({**size, "dtype": FLOAT} for size in SIZES if size["shape"][0] == 16)),
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
        x: (..., K), any strides, bfloat16 or float32.
        weight: W (N, K) as `pack` orders it, (ceil(N / 32), ceil(K / 32), parts, 2, 16, 16, 2), bfloat16; 1 part for
            x in bfloat16, 2 or 3 for float32.
        bias: b (N,) in the type of x, or None.
        out_features: N.
        gelu: whether GELU follows.

    Returns:
        y (..., N) in the type of x, contiguous. Products of bfloat16 are summed in float32; a result in bfloat16 is
        rounded once, after the GELU. In float32, 3 parts leave out 2^-24 of a product, 2 parts 2^-17; a number that is
        not finite makes every result that depends on it NaN.

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

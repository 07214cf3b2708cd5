"""packed_linear_int8: a linear layer in int8 whose weights lie in the order in which matrix tiles read them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lfm_fast import _library
from lfm_fast.ops._cases import numbers
from lfm_fast.ops._registry import Backend, Op, Tolerance, register
from lfm_fast.ops.packed_linear import BF16, CASES, PANEL, SIZES, check_packed, packed_cost

F32, INT8 = torch.float32, torch.int8
STEP = 64  # inner numbers of two tiles side by side
LARGEST = 127.0  # of the whole numbers that stand for a row
LEAST_ROW = 2.0**-100  # a row whose largest number is below it counts as zero: 127 / largest would leave float32


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., K) -> whole numbers (..., K) in -127..127 and a scale (...), float32, whose product they are up to
    half a scale.

    scale = max |row| / 127, number = round(row / scale), ties to even. A row that holds an infinity or NaN has NaN for
    its scale, and zeros.
    """
    rows = rows.detach().to(F32)
    largest = rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])
    finite = largest.isfinite()
    counts = finite & (largest >= LEAST_ROW)
    most = torch.full_like(largest, LARGEST)  # a number divided by a tensor is multiplied by its reciprocal
    factor = torch.where(counts, most / largest, 0.0)
    scale = torch.where(counts, largest / most, torch.where(finite, 0.0, torch.nan))
    # in float64 the product is exact, and rounded once
    whole = (rows.masked_fill(~finite[..., None], 0.0).double() * factor[..., None].double()).round()
    return whole.to(INT8), scale


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight (N, K) of a linear layer as int8 in the tiles' order, (N / 32, K / 64, 2, 16, 16, 4), and the scales
    (N,) of its rows, float32.

    Panels of 32 outputs, in each steps of 64 inputs, in each two tiles of 16 outputs. In a tile, row r holds for each
    of 16 outputs the inputs 2 r, 2 r + 1, 32 + 2 r and 33 + 2 r: two pairs, as two registers of bfloat16 give them.
    Zeros fill up N and K.
    """
    whole, scale = quantise(weight)
    outer, inner = weight.shape
    padded = F.pad(whole, (0, -inner % STEP, 0, -outer % PANEL))
    tiles = padded.reshape(-(-outer // PANEL), 2, 16, -(-inner // STEP), 2, 16, 2)  # (panel, half, output, step, pair
    return tiles.permute(0, 3, 1, 5, 2, 4, 6).flatten(-2).contiguous(), scale  # of pairs, row, 2)


def unpack(weight: Tensor, scale: Tensor, in_features: int) -> Tensor:
    """The weight (N, K), float32, that `pack` was given, rounded as it did."""
    panels, steps = weight.shape[:2]
    tiles = weight.unflatten(-1, (2, 2)).permute(0, 2, 4, 1, 5, 3, 6)
    whole = tiles.reshape(panels * PANEL, steps * STEP)[: len(scale), :in_features]
    return whole.to(F32) * scale[:, None]


def reference(x, weight, scale, bias, out_features, gelu=False):
    dtype = torch.promote_types(x.dtype, F32)
    whole, size = quantise(x)
    columns = unpack(weight, torch.ones_like(scale), x.shape[-1]).to(dtype)
    y = F.linear(whole.to(dtype), columns) * size.to(dtype)[..., None] * scale.to(dtype)
    y = y if bias is None else y + bias.to(dtype)
    return (F.gelu(y, approximate="tanh") if gelu else y).to(x.dtype)


def _check(x, weight, scale, bias, out_features, gelu=False) -> None:
    vectors = {"scale": (scale, (F32,)), "bias": (bias, (BF16, F32))}
    check_packed(x, (BF16,), weight, (INT8, STEP, [(2, 16, 16, 4)]), "packed_linear_int8", out_features, vectors)


def _arguments(*, shape, outputs, bias=True, gelu=False, device="cpu", dtype=BF16, layout="contiguous") -> dict:
    """shape: of x, the inputs last."""
    known = {"device": device, "dtype": dtype}
    x = numbers(shape, 1, layout=layout, **known)
    weight, scale = pack(numbers((outputs, shape[-1]), 2, **known) / max(shape[-1], 1) ** 0.5)
    shift = numbers((outputs,), 3, **known) if bias else None
    return {"x": x, "weight": weight, "scale": scale, "bias": shift, "out_features": outputs, "gelu": gelu}


_row = register(
    Op(
        name="packed_linear_int8",
        schema="(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int out_features, bool gelu=False) -> Tensor",
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
        cost=lambda x, weight, scale, bias, out_features, gelu=False: packed_cost(x, weight, out_features, gelu),
        tolerance=Tolerance(
            absolute=1e-5,
            relative=1e-5,
            low=2e-4,
            origin="whole numbers are equal, their sums exact, then roundings in float32; GELU's logistic to 1.5e-4",
        ),
        shared=("weight", "scale", "bias"),
        not_differentiable=("x", "weight", "scale", "bias"),
    )
)


def packed_linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, gelu: bool = False
) -> Tensor:
    """A linear layer whose products are of int8, with the GELU after it where that is wanted.

        y = s_x s (q(x) Q^T) + b        or        y = gelu of that, in its tanh form

    q(x) = round(x / s_x) are whole numbers of -127 to 127, and s_x = max |x| / 127 is found for every row x as it comes
    (dynamic, symmetric). Their products are summed exactly. A row with an infinity or NaN gives NaN throughout.

    Args:
        x: (..., K), any strides, bfloat16.
        weight: Q (N, K) as `pack` orders it, (ceil(N / 32), ceil(K / 64), 2, 16, 16, 4), int8.
        scale: s (N,) float32, which `pack` gives too: the weight is Q s.
        bias: b (N,) bfloat16 or float32, or None.
        out_features: N.
        gelu: whether GELU follows.

    Returns:
        y (..., N) bfloat16, contiguous, rounded once.

    Raises:
        ValueError: shapes or dtypes other than these, or a gradient asked for: this is the layer of a network that is
            not trained any more.

    Example:
        >>> import torch
        >>> from lfm_fast.ops.packed_linear_int8 import pack, packed_linear_int8
        >>> weight, scale = pack(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        >>> packed_linear_int8(torch.ones(1, 2, dtype=torch.bfloat16), weight, scale, None, 3)
        tensor([[ 3.0156,  7.0000, 11.0000]], dtype=torch.bfloat16)

    Source: Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 2.1, for scales of rows and columns.
    """
    return _row(x, weight, scale, bias, out_features, gelu)

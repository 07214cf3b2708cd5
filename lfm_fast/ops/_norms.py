"""What the rows of the modulated layer norm share: its statistics and gradient in PyTorch, checks, and test inputs."""

import math

import torch
from torch import Tensor

from lfm_fast.ops._cases import numbers
from lfm_fast.ops._checks import VELOCITY, check_like, check_per_sample, check_tensor, refuse_float64
from lfm_fast.ops._registry import Backend

LOW = (torch.bfloat16, torch.float16)


def wide(x: Tensor) -> Tensor:
    """In the dtype of the arithmetic: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each token, (B, T); 0 and 1 / sqrt(eps) for tokens without channels."""
    x, count = wide(x), max(x.shape[-1], 1)
    mean = x.sum(-1) / count
    variance = (x - mean[..., None]).square().sum(-1) / count
    return mean, (variance + eps).rsqrt()


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) rstd (1 + scale) + shift in shift's dtype, mean and rstd."""
    mean, rstd = statistics(x, eps)
    shift, scale = shift.to(mean.dtype)[:, None], scale.to(mean.dtype)[:, None]
    y = normalised(x, mean, rstd) * (1.0 + scale) + shift
    return y, mean, rstd


def normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (wide(x) - mean[..., None]) * rstd[..., None]


def modulated_norm_gradients(
    grad_y: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, ...]:
    """Gradients in x, shift and scale, in the dtype of the arithmetic. Differentiable where mean and rstd are x's."""
    n, g, count = normalised(x, mean, rstd), grad_y.to(mean.dtype), max(x.shape[-1], 1)
    d = g * (1.0 + scale.to(mean.dtype)[:, None])
    along_ones = d.sum(-1, keepdim=True) / count
    along_n = (d * n).sum(-1, keepdim=True) / count
    return rstd[..., None] * ((d - along_ones) - n * along_n), g.sum(1), (g * n).sum(1)


def check_tokens(name: str, x) -> None:
    """Tokens (B, T, D)."""
    check_tensor(name, x, VELOCITY)
    if x.dim() != 3:
        raise ValueError(f"{name} is {tuple(x.shape)}, expected tokens (B, T, D).")


def check_modulation(x_name: str, x: Tensor, **vectors) -> None:
    """Per-sample vectors (B, D) of one dtype for tokens x."""
    first_name, first = next(iter(vectors.items()))
    for name, vector in vectors.items():
        check_per_sample(name, vector, (x.shape[0], x.shape[2]), x_name, x, VELOCITY)
        check_same_dtype(name, vector, first_name, first)


def check_statistics(x_name: str, x: Tensor, **statistics) -> None:
    """mean and rstd of tokens x: (B, T), float32, float64 beside a float64 x."""
    expected = torch.promote_types(x.dtype, torch.float32)
    for name, value in statistics.items():
        check_per_sample(name, value, (x.shape[0], x.shape[1]), x_name, x, (expected,))


def check_tokens_like(name: str, value, x_name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Tokens of x's shape and another tensor's dtype."""
    check_like(name, value, x_name, x, VELOCITY)
    check_same_dtype(name, value, other_name, other)


def check_same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype is not other.dtype:
        came, wanted = (str(x.dtype).removeprefix("torch.") for x in (value, other))
        raise ValueError(f"{name} is {came} but {other_name} is {wanted}: convert one of them.")


def _why_not_cpp(*args) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(x.dtype is torch.float16 for x in tensors):
        return "its kernels take float32 and bfloat16, and an argument is float16"
    return refuse_float64(*tensors)


CPP = Backend(name="cpp", devices=("cpu",), why_not=_why_not_cpp)
_WIDEST = 16384  # channels that the Triton kernels hold in the registers of one program


def why_not_triton(*args) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    if tensors[0].shape[2] > _WIDEST:
        return f"it holds a token in registers, and more than {_WIDEST} channels do not fit"
    return refuse_float64(*tensors)


def tokens(shape, seed: int, *, layout: str = "contiguous", **known) -> Tensor:
    """Tokens of a case. Beyond the layouts of `numbers`: "rows", a slice whose rows are whole but lie apart."""
    if layout != "rows":
        return numbers(shape, seed, layout=layout, **known)
    batch, length, width = shape
    values = numbers(shape, seed, **known)
    apart = torch.full((batch, length + 1, 2 * width + 3), math.nan, dtype=values.dtype, device=values.device)
    apart[:, 1:, 3 : width + 3] = values
    return apart[:, 1:, 3 : width + 3]


def vectors(shape, count: int, seed: int, *, chunked: bool = False, **known) -> list[Tensor]:
    """Per-sample vectors (B, D); chunked: as chunks of one (B, 6 D), which is how a network makes them."""
    batch, _, width = shape
    if not chunked:
        return [numbers((batch, width), seed + i, **known) for i in range(count)]
    return list(numbers((batch, 6 * width), seed, **known).chunk(6, dim=-1)[6 - count :])


def on_grid(*values: Tensor) -> list[Tensor]:
    """Rounded to halves. x + gate branch is then exact in 16 bits too, so that float64 stores the same x_new."""
    return [(2 * x).round() / 2 for x in values]


def size_of(*values: Tensor | None) -> int:
    """Bytes of these tensors."""
    return sum(x.numel() * x.element_size() for x in values if x is not None)


# B, T or D of 0 and 1, odd ones, one more than a power of two, more than one block of rows
TOKENS = (
    (0, 4, 8), (2, 0, 8), (2, 3, 0), (1, 1, 1), (2, 5, 1), (1, 1, 129), (7, 2, 3), (2, 3, 64), (2, 70, 65),
    (1, 40, 384),
)  # fmt: skip
SIZES = tuple(
    {"shape": (batch, 256, width), "dtype": dtype, "state": dtype}
    for width in (384, 1024)
    for batch in (4, 32)
    for dtype in (torch.float32, torch.bfloat16)
)

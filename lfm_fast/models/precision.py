"""What matrix products are computed in, beyond tensors' dtypes: TF32 on CUDA, and float8 with scales."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

E4M3, E5M2, _F32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float32
_LEAST = 2.0**-100  # rows below it are nearly zeros: a scale has to be a number that divides


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Within, products of float32 on CUDA are of TF32 (10 bits of mantissa, float32 sums) or of float32 throughout.

    PyTorch's setting is one for the whole process: it is put back at the end, also after an error. A backward pass has
    to run within as well.

    >>> before = torch.get_float32_matmul_precision()
    >>> with float32_products(tf32=True):
    ...     torch.get_float32_matmul_precision()
    'high'
    >>> torch.get_float32_matmul_precision() == before
    True
    """
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [setting.fp32_precision for setting in settings]
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody set one of the above alone, and PyTorch then refuses to say
        overall = None
    torch.set_float32_matmul_precision("high" if tf32 else "highest")  # sets them as well
    try:
        yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for setting, value in zip(settings, before):
            setting.fp32_precision = value


def quantise(rows: Tensor, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Rows (M, K) -> the same in float8, contiguous, and their scales (M, 1) float32: rows = number times scale."""
    rows = rows.detach().to(_F32)
    largest = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(rows.shape[0], 1)
    scale = largest.clamp(min=_LEAST) / torch.finfo(dtype).max
    return (rows / scale).to(dtype).contiguous(), scale


def product(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], bias: Tensor | None = None, fast: bool = False):
    """left right^T + bias in bfloat16, (M, N), of factors (M, K) and (N, K) as `quantise` gives them.

    fast: sums inside the tensor cores may keep fewer bits.
    """
    from torch.nn.functional import ScalingType, scaled_mm

    (a, scale_a), (b, scale_b) = left, right
    way, scale_b = ScalingType.RowWise, scale_b.t().contiguous()
    with torch.autocast(a.device.type, enabled=False):  # it would round the scales to bfloat16
        return scaled_mm(
            a, b.t(), scale_a, way, scale_b, way, bias=bias, output_dtype=torch.bfloat16, use_fast_accum=fast
        )


def why_not(precision: str, device: torch.device) -> str | None:
    """Why a device does not compute in "tf32" or "fp8", as a sentence without full stop, or None."""
    if precision not in ("tf32", "fp8") or (precision == "tf32" and device.type == "cuda"):
        return None
    if device.type != "cuda":
        instead = "use fp32" if precision == "tf32" else "PyTorch would convert every number here; use bf16"
        return f"precision {precision} exists on CUDA devices only, and this is a {device.type}; {instead}"
    return _why_no_float8(device)


@functools.cache
def _why_no_float8(device: torch.device) -> str | None:
    """By trying: which GPUs PyTorch multiplies row by row on depends on both of their versions."""
    ones = torch.ones(16, 16, device=device)
    try:
        for dtype in (E4M3, E5M2):
            product(quantise(ones, dtype), quantise(ones)).sum().item()
    except (ImportError, RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"precision fp8 needs PyTorch's product of float8 scaled row by row, but here it fails ({said}); use bf16"
        )
    return None

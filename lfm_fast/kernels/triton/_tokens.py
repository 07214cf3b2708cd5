"""What the kernels over tokens (B, T, D) share: one token's channels lie in the registers of one program.

How many threads share a token (num_warps) decides the order of its sums, so it follows from D alone and is no matter
for tuning. The backward kernels take a span of tokens of one sample, one after the other, and keep the sums over them
of each channel in registers; `add_up` adds the sums of a sample's programs in their order. No atomics: the same bits in
every run, of a batch of this size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfm_fast.kernels.triton._tuning import Configuration, Tuned, bucket

SPANS = (64, 32, 16)
PROGRAMS = 2048  # about five times as many as run at once on a GPU of 132 multiprocessors


@triton.jit
def statistics(value, inside, width, eps):
    """Mean and 1 / sqrt(variance + eps) of a token's channels, the second from the differences to the first."""
    mean = tl.sum(value, 0) / width
    difference = tl.where(inside, value - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(difference * difference, 0) / width + eps)


@triton.jit
def norm_gradient(g, value, factor, mean, rstd, inside, width):
    """The gradient in a token's channels, and the token normalised; g is y's gradient, factor 1 + scale."""
    n = tl.where(inside, (value - mean) * rstd, 0.0)
    d = g * factor
    along_ones = tl.sum(d, 0) / width
    along_n = tl.sum(d * n, 0) / width
    return rstd * ((d - along_ones) - n * along_n), n


def block_of(width: int) -> int:
    return triton.next_power_of_2(max(width, 1))


def warps(width: int, channels_per_thread: int) -> int:
    """At least 8 channels to a thread are 16 bytes of 16-bit numbers."""
    return min(max(block_of(width) // (32 * channels_per_thread), 1), 16)


def registers(width: int, channels_per_thread: int, most: int, *tensors: Tensor) -> int | None:
    """A limit to the registers of a thread, which lets more programs run at once, and so more loads be on their way.

    None where it would make a thread spill, which holds more channels or 32-bit numbers; of these half as many tokens
    are enough. (Triton 3.6 for sm_90, 1,152 channels in bfloat16, backward: 94 and 120 registers without it, so two
    programs to a multiprocessor; 72 and 80 with it, nothing spilled, so three.)
    """
    held = block_of(width) // (32 * warps(width, channels_per_thread))
    low = all(x is None or x.element_size() <= 2 for x in tensors)
    return most if low and held <= channels_per_thread else None


def strided_tokens(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """x and the strides between its samples and between its tokens. Copied only where its channels are strided."""
    if x is None:
        return None, 0, 0
    if x.stride(2) != 1 and x.shape[2] > 1:
        x = x.contiguous()
    return x, x.stride(0), x.stride(1)


def strided_vectors(*vectors: Tensor) -> list:
    """Each (B, D) vector, and after them the strides between their samples. Chunks of a (B, 6 D) are not copied."""
    found = [v if v.stride(1) == 1 or v.shape[1] <= 1 else v.contiguous() for v in vectors]
    return [*found, *(v.stride(0) for v in found)]


def span_of(batch: int, length: int) -> int:
    """How many tokens a program of a backward kernel takes: the more, the fewer sums are written and read again (at 16
    tokens a sixth of all bytes in bfloat16, at 64 a 24th), but not so many that programs are few."""
    return next((span for span in SPANS if batch * triton.cdiv(length, span) >= PROGRAMS), SPANS[-1])


def partial_sums(x: Tensor, count: int) -> tuple[Tensor, int]:
    """Where a backward kernel leaves `count` sums over each span of tokens, (B, spans, count, D) float32; the span."""
    batch, length, width = x.shape
    span = span_of(batch, length)
    shape = (batch, triton.cdiv(length, span), count, width)
    return torch.empty(shape, dtype=torch.float32, device=x.device), span


@triton.jit(do_not_specialize=("per_sample",))
def _add_up(parts, first, second, third, per_sample, width, BLOCK: tl.constexpr):
    per_row = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    sample = (program // per_row).to(tl.int64)
    lane = (program % per_row) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < width
    count: tl.constexpr = 2 if third is None else 3
    sum_0 = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_1 = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_2 = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(per_sample):
        start = parts + (sample * per_sample + part) * (count * width) + lane
        sum_0 += tl.load(start, mask=inside, other=0.0)
        sum_1 += tl.load(start + width, mask=inside, other=0.0)
        if third is not None:
            sum_2 += tl.load(start + 2 * width, mask=inside, other=0.0)
    place = sample * width + lane
    tl.store(first + place, sum_0.to(first.dtype.element_ty), mask=inside)
    tl.store(second + place, sum_1.to(second.dtype.element_ty), mask=inside)
    if third is not None:
        tl.store(third + place, sum_2.to(third.dtype.element_ty), mask=inside)


_launch = Tuned(_add_up, *(Configuration({"BLOCK": b}, num_warps=w) for b, w in ((128, 1), (256, 1), (512, 4))))


def add_up(parts: Tensor, first: Tensor, second: Tensor, third: Tensor | None = None) -> None:
    """Each result (B, D) is the sum of its parts, in the order of the tokens."""
    batch, per_sample, _, width = parts.shape
    _launch(
        lambda c: batch * triton.cdiv(width, c["BLOCK"]),
        (bucket(batch), bucket(width), bucket(per_sample), third is None),
        parts, first, second, third, per_sample, width,
    )  # fmt: skip

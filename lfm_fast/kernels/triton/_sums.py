"""Sums over a sample whose order is fixed: a program takes SPAN elements of one sample, BLOCK at a time, with one
accumulator per lane; where a sample has several programs, `finish` adds their sums up. No atomics, and none of it is
left to timing, so a result has the same bits in every run.
"""

import triton
import triton.language as tl
from torch import Tensor

from lfm_fast.kernels.triton._tuning import Configuration, Tuned

SPAN = 8192
BLOCK = 1024


@triton.jit(do_not_specialize=("weight_stride", "per_sample"))
def _kernel(sums, weight, out, weight_stride, per_sample, factor, ROOT: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, per_sample, BLOCK):
        inside = start + lane < per_sample
        total += tl.load(sums + sample * per_sample + start + lane, mask=inside, other=0.0)
    result = tl.sum(total, 0) * factor
    if weight is not None:
        result = result * tl.load(weight + sample * weight_stride)
    if ROOT:
        result = tl.sqrt_rn(result)
    tl.store(out + sample, result)


_launch = Tuned(_kernel, Configuration({"BLOCK": 128}, num_warps=1))


def finish(sums: Tensor, out: Tensor, per_sample: int, factor: float, weight: Tensor | None = None, root=False) -> None:
    """out_b = factor (sum of the sample's `per_sample` sums) weight_b, or its square root."""
    weight_stride = 0 if weight is None else weight.stride(0)
    _launch(lambda c: out.shape[0], (), sums, weight, out, weight_stride, per_sample, factor, ROOT=root)

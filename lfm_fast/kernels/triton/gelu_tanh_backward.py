"""gelu_tanh_backward in Triton: grad (s + x s (1 - s) 2 u'), where s = 1 / (1 + exp(-2 u)); see gelu_tanh."""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton._rows import alike_rows
from lfm_fast.kernels.triton._tuning import Tuned, bucket
from lfm_fast.kernels.triton.gelu_tanh import CONFIGURATIONS, CUBIC, MINUS_TWICE_SLOPE


@triton.jit
def _kernel(grad, x, grad_x, grad_stride, x_stride, count, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    per_row = tl.cdiv(count, BLOCK)
    row = (program // per_row).to(tl.int64)
    start = (program % per_row).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < count - start
    value = tl.load(x + row * x_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(MINUS_TWICE_SLOPE * (value + CUBIC * (value * value * value))))
    # beyond 16 s (1 - s) is 0, and x^2 might be infinite
    square = tl.where(tl.abs(value) < 16.0, value * value, 0.0)
    twice_slope = -MINUS_TWICE_SLOPE * (1.0 + 3.0 * CUBIC * square)
    result = g * (s + value * (s * (1.0 - s)) * twice_slope)
    tl.store(grad_x + row * count + start + lane, result.to(grad_x.dtype.element_ty), mask=inside)


_launch = Tuned(_kernel, *CONFIGURATIONS, enable_fp_fusion=True)


def kernel(grad, x):
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, count, [(g, g_stride), (values, stride)] = alike_rows(grad, x)
    _launch(
        lambda c: batch * triton.cdiv(count, c["BLOCK"]),
        (bucket(batch * count), bucket(count), x.dtype),
        g, values, grad_x, g_stride, stride, count,
    )  # fmt: skip
    return grad_x

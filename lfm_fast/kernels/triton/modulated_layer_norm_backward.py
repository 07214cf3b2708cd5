"""modulated_layer_norm_backward in Triton: one pass over the tokens, the sums over them in registers (see _tokens)."""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton import _tokens
from lfm_fast.kernels.triton._tokens import norm_gradient, strided_tokens, strided_vectors
from lfm_fast.kernels.triton._tuning import Tuned


@triton.jit(do_not_specialize=("length",))
def _kernel(
    grad_y, x, scale, mean, rstd, grad_x, parts, g_sample, g_token, x_sample, x_token, scale_stride, length, width,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    per_sample = tl.cdiv(length, SPAN)
    sample = (program // per_sample).to(tl.int64)
    first = (program % per_sample).to(tl.int64) * SPAN
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    factor = 1.0 + tl.load(scale + sample * scale_stride + lane, mask=inside, other=0.0).to(tl.float32)
    x += sample * x_sample + first * x_token + lane
    grad_y += sample * g_sample + first * g_token + lane
    row = sample * length + first
    sum_g = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_gn = tl.zeros((BLOCK,), dtype=tl.float32)
    count = tl.minimum(length - first, SPAN)
    next_x = tl.load(x, mask=inside, other=0.0)
    next_g = tl.load(grad_y, mask=inside, other=0.0)
    for k in range(count):
        value, g = next_x.to(tl.float32), next_g.to(tl.float32)
        # the next token is on its way while this one's sums wait for all threads
        ahead = inside & (k + 1 < count)
        x += x_token
        grad_y += g_token
        next_x = tl.load(x, mask=ahead, other=0.0)
        next_g = tl.load(grad_y, mask=ahead, other=0.0)
        gradient, n = norm_gradient(g, value, factor, tl.load(mean + row), tl.load(rstd + row), inside, width)
        tl.store(grad_x + row * width + lane, gradient.to(grad_x.dtype.element_ty), mask=inside)
        sum_g += g
        sum_gn += g * n
        row += 1
    part = parts + program.to(tl.int64) * (2 * width) + lane
    tl.store(part, sum_g, mask=inside)
    tl.store(part + width, sum_gn, mask=inside)


_launch = Tuned(_kernel, enable_fp_fusion=True)


def kernel(grad_y, x, scale, mean, rstd):
    batch, length, width = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_shift, grad_scale = (torch.empty(scale.shape, dtype=scale.dtype, device=x.device) for _ in range(2))
    parts, span = _tokens.partial_sums(x, 2)
    if width:
        x, x_sample, x_token = strided_tokens(x)
        grad_y, g_sample, g_token = strided_tokens(grad_y)
        scale, scale_stride = strided_vectors(scale)
        _launch(
            lambda c: batch * triton.cdiv(length, span), (),
            grad_y, x, scale, mean.contiguous(), rstd.contiguous(), grad_x, parts, g_sample, g_token, x_sample, x_token,
            scale_stride, length, width, BLOCK=_tokens.block_of(width), SPAN=span, num_warps=_tokens.warps(width, 8),
            maxnreg=_tokens.registers(width, 8, 72, x, grad_y),
        )  # fmt: skip
    _tokens.add_up(parts, grad_shift, grad_scale)
    return grad_x, grad_shift, grad_scale

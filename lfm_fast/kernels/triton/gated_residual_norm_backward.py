"""gated_residual_norm_backward in Triton: one pass over the tokens, the sums over them in registers (see _tokens)."""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton import _tokens
from lfm_fast.kernels.triton._tokens import norm_gradient, strided_tokens, strided_vectors
from lfm_fast.kernels.triton._tuning import Tuned


@triton.jit(do_not_specialize=("length",))
def _kernel(
    x_new, branch, grad_x_new, grad_y, gate, scale, mean, rstd, grad_x, grad_branch, parts, x_sample, x_token,
    branch_sample, branch_token, gx_sample, gx_token, gy_sample, gy_token, gate_stride, scale_stride, length, width,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    per_sample = tl.cdiv(length, SPAN)
    sample = (program // per_sample).to(tl.int64)
    first = (program % per_sample).to(tl.int64) * SPAN
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    opened = tl.load(gate + sample * gate_stride + lane, mask=inside, other=0.0).to(tl.float32)
    branch += sample * branch_sample + first * branch_token + lane
    row = sample * length + first
    if grad_x_new is not None:
        grad_x_new += sample * gx_sample + first * gx_token + lane
    if grad_y is not None:
        factor = 1.0 + tl.load(scale + sample * scale_stride + lane, mask=inside, other=0.0).to(tl.float32)
        x_new += sample * x_sample + first * x_token + lane
        grad_y += sample * gy_sample + first * gy_token + lane
    sum_gate = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_g = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_gn = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(tl.minimum(length - first, SPAN)):
        # all of a token's loads stand before its sums, so that they are on their way together
        change = tl.load(branch, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        if grad_x_new is not None:
            total = tl.load(grad_x_new, mask=inside, other=0.0).to(tl.float32)
        if grad_y is not None:
            g = tl.load(grad_y, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x_new, mask=inside, other=0.0).to(tl.float32)
            gradient, n = norm_gradient(g, value, factor, tl.load(mean + row), tl.load(rstd + row), inside, width)
            total = total + gradient
            sum_g += g
            sum_gn += g * n
        tl.store(grad_x + row * width + lane, total.to(grad_x.dtype.element_ty), mask=inside)
        tl.store(grad_branch + row * width + lane, (opened * total).to(grad_branch.dtype.element_ty), mask=inside)
        sum_gate += total * change
        branch += branch_token
        row += 1
        if grad_x_new is not None:
            grad_x_new += gx_token
        if grad_y is not None:
            x_new += x_token
            grad_y += gy_token
    part = parts + program.to(tl.int64) * (3 * width) + lane
    tl.store(part, sum_gate, mask=inside)
    tl.store(part + width, sum_g, mask=inside)
    tl.store(part + 2 * width, sum_gn, mask=inside)


_launch = Tuned(_kernel, enable_fp_fusion=True)


def kernel(x_new, branch, gate, scale, mean, rstd, grad_x_new=None, grad_y=None):
    batch, length, width = x_new.shape
    grad_x = torch.empty(x_new.shape, dtype=x_new.dtype, device=x_new.device)
    grad_branch = torch.empty(x_new.shape, dtype=branch.dtype, device=x_new.device)
    vectors = [torch.empty(scale.shape, dtype=scale.dtype, device=x_new.device) for _ in range(3)]
    parts, span = _tokens.partial_sums(x_new, 3)
    if width:
        found = [strided_tokens(t) for t in (x_new, branch, grad_x_new, grad_y)]
        tensors, strides = [t for t, *_ in found], [s for _, *both in found for s in both]
        gate, scale, *vector_strides = strided_vectors(gate, scale)
        _launch(
            lambda c: batch * triton.cdiv(length, span), (),
            *tensors, gate, scale, mean.contiguous(), rstd.contiguous(), grad_x, grad_branch, parts, *strides,
            *vector_strides, length, width, BLOCK=_tokens.block_of(width), SPAN=span, num_warps=_tokens.warps(width, 8),
            maxnreg=_tokens.registers(width, 8, 80, x_new, branch, grad_x_new, grad_y),
        )  # fmt: skip
    _tokens.add_up(parts, *vectors)
    return grad_x, grad_branch, *vectors

"""gated_residual_norm in Triton: the gated sum is rounded as it is stored, and its norm taken, in registers."""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton._tokens import block_of, statistics, strided_tokens, strided_vectors, warps
from lfm_fast.kernels.triton._tuning import Configuration, Tuned, bucket


@triton.jit(do_not_specialize=("length",))
def _kernel(
    x, branch, gate, shift, scale, x_new, y, mean, rstd, x_sample, x_token, branch_sample, branch_token, gate_stride,
    shift_stride, scale_stride, length, width, eps, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    per_sample = tl.cdiv(length, TOKENS)
    sample = (program // per_sample).to(tl.int64)
    first = (program % per_sample).to(tl.int64) * TOKENS
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    opened = tl.load(gate + sample * gate_stride + lane, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(scale + sample * scale_stride + lane, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(shift + sample * shift_stride + lane, mask=inside, other=0.0).to(tl.float32)
    x += sample * x_sample + first * x_token + lane
    branch += sample * branch_sample + first * branch_token + lane
    row = sample * length + first
    count = tl.minimum(length - first, TOKENS)
    next_x = tl.load(x, mask=inside, other=0.0)
    next_branch = tl.load(branch, mask=inside, other=0.0)
    for k in range(count):
        value, change = next_x.to(tl.float32), next_branch.to(tl.float32)
        # the next token is on its way while this one's sums wait for all threads
        ahead = inside & (k + 1 < count)
        x += x_token
        branch += branch_token
        next_x = tl.load(x, mask=ahead, other=0.0)
        next_branch = tl.load(branch, mask=ahead, other=0.0)
        stored = (value + opened * change).to(x_new.dtype.element_ty)
        tl.store(x_new + row * width + lane, stored, mask=inside)
        value = stored.to(tl.float32)
        average, inverse = statistics(value, inside, width, eps)
        result = (value - average) * inverse * factor + added
        tl.store(y + row * width + lane, result.to(y.dtype.element_ty), mask=inside)
        tl.store(mean + row, average)
        tl.store(rstd + row, inverse)
        row += 1


_launch = Tuned(_kernel, *(Configuration({"TOKENS": tokens}) for tokens in (2, 1, 4, 8)), enable_fp_fusion=True)


def kernel(x, branch, gate, shift, scale, eps=1e-6):
    batch, length, width = x.shape
    x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=branch.dtype, device=x.device)
    mean, rstd = (torch.empty((batch, length), dtype=torch.float32, device=x.device) for _ in range(2))
    if width == 0:
        return x_new, y, mean.zero_(), rstd.fill_(eps).rsqrt_()
    x, x_sample, x_token = strided_tokens(x)
    branch, branch_sample, branch_token = strided_tokens(branch)
    gate, shift, scale, *strides = strided_vectors(gate, shift, scale)
    _launch(
        lambda c: batch * triton.cdiv(length, c["TOKENS"]),
        (bucket(batch * length), bucket(width), x.dtype, y.dtype),
        x, branch, gate, shift, scale, x_new, y, mean, rstd, x_sample, x_token, branch_sample, branch_token, *strides,
        length, width, eps, BLOCK=block_of(width), num_warps=warps(width, 16),
    )  # fmt: skip
    return x_new, y, mean, rstd

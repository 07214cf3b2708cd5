"""modulated_layer_norm in Triton: a program takes a few tokens of one sample, whose shift and scale it reads once."""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton._tokens import block_of, registers, statistics, strided_tokens, strided_vectors, warps
from lfm_fast.kernels.triton._tuning import Configuration, Tuned, bucket


@triton.jit(do_not_specialize=("length",))
def _kernel(
    x, shift, scale, y, mean, rstd, x_sample, x_token, shift_stride, scale_stride, length, width, eps,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    per_sample = tl.cdiv(length, TOKENS)
    sample = (program // per_sample).to(tl.int64)
    first = (program % per_sample).to(tl.int64) * TOKENS
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    factor = 1.0 + tl.load(scale + sample * scale_stride + lane, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(shift + sample * shift_stride + lane, mask=inside, other=0.0).to(tl.float32)
    x += sample * x_sample + first * x_token + lane
    row = sample * length + first
    count = tl.minimum(length - first, TOKENS)
    next_x = tl.load(x, mask=inside, other=0.0)
    for k in range(count):
        value = next_x.to(tl.float32)
        # the next token is on its way while this one's sums wait for all threads
        x += x_token
        next_x = tl.load(x, mask=inside & (k + 1 < count), other=0.0)
        average, inverse = statistics(value, inside, width, eps)
        result = (value - average) * inverse * factor + added
        tl.store(y + row * width + lane, result.to(y.dtype.element_ty), mask=inside)
        tl.store(mean + row, average)
        tl.store(rstd + row, inverse)
        row += 1


_launch = Tuned(_kernel, *(Configuration({"TOKENS": tokens}) for tokens in (2, 1, 4, 8)), enable_fp_fusion=True)


def kernel(x, shift, scale, eps=1e-6):
    batch, length, width = x.shape
    y = torch.empty(x.shape, dtype=shift.dtype, device=x.device)
    mean, rstd = (torch.empty((batch, length), dtype=torch.float32, device=x.device) for _ in range(2))
    if width == 0:
        return y, mean.zero_(), rstd.fill_(eps).rsqrt_()
    x, x_sample, x_token = strided_tokens(x)
    shift, scale, shift_stride, scale_stride = strided_vectors(shift, scale)
    _launch(
        lambda c: batch * triton.cdiv(length, c["TOKENS"]),
        (bucket(batch * length), bucket(width), x.dtype, y.dtype),
        x, shift, scale, y, mean, rstd, x_sample, x_token, shift_stride, scale_stride, length, width, eps,
        BLOCK=block_of(width), num_warps=warps(width, 16),
        maxnreg=registers(width, 16, 72, x, y),
    )  # fmt: skip
    return y, mean, rstd

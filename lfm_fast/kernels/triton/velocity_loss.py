"""velocity_loss in Triton: squared error and gradient in one pass over the velocity."""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton import _sums
from lfm_fast.kernels.triton._noise import normals
from lfm_fast.kernels.triton._rows import elements, rows
from lfm_fast.kernels.triton._tuning import Configuration, Tuned


@triton.jit(do_not_specialize=("weight_stride", "c_row", "c_column", "index_stride", "seed", "stream"))
def _kernel(
    velocity, target, weight, z_0, coefficients, index, gradient, sums, velocity_stride, target_stride, z_0_stride,
    weight_stride, c_row, c_column, index_stride, count, factor, seed: tl.int64, stream: tl.int64,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    per_sample = tl.cdiv(count, SPAN)
    sample = (program // per_sample).to(tl.int64)
    first = (program % per_sample).to(tl.int64) * SPAN
    slope = 2.0 * factor
    if weight is not None:
        slope = slope * tl.load(weight + sample * weight_stride)
    if target is None:
        number = tl.load(index + sample * index_stride)
        d_alpha = tl.load(coefficients + 2 * c_row + sample * c_column)
        d_sigma = tl.load(coefficients + 3 * c_row + sample * c_column)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for piece in range(0, tl.minimum(count - first, SPAN), BLOCK):
        start = first + piece
        inside = lane < count - start
        v = tl.load(velocity + sample * velocity_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
        if target is None:
            data = tl.load(z_0 + sample * z_0_stride + start + lane, mask=inside, other=0.0)
            noise = normals(number, seed.to(tl.int64), stream.to(tl.int64), start // 4, BLOCK)
            wanted = d_alpha * data + d_sigma * noise
        else:
            wanted = tl.load(target + sample * target_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, v - wanted, 0.0)
        total += difference * difference
        result = (slope * difference).to(gradient.dtype.element_ty)
        tl.store(gradient + sample * count + start + lane, result, mask=inside)
    part = tl.sum(total, 0)
    if WHOLE:  # this is the sample's only program
        part = part * factor
        if weight is not None:
            part = part * tl.load(weight + sample * weight_stride)
    tl.store(sums + program, part)


_launch = Tuned(_kernel, Configuration({"SPAN": _sums.SPAN, "BLOCK": _sums.BLOCK}, num_warps=4))


def kernel(velocity, target=None, weight=None, z_0=None, coefficients=None, index=None, seed=0, stream=0):
    batch, count = velocity.shape[0], elements(velocity)
    gradient = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    loss = torch.empty(batch, dtype=torch.float32, device=velocity.device)
    if count == 0:
        return (loss.zero_() if weight is None else weight * 0.0), gradient
    per_sample = triton.cdiv(count, _sums.SPAN)
    sums = loss if per_sample == 1 else loss.new_empty(batch * per_sample)
    (v, v_stride), (wanted, wanted_stride), (data, data_stride) = rows(velocity), rows(target), rows(z_0)
    weight_stride = 0 if weight is None else weight.stride(0)
    c_row, c_column = (0, 0) if coefficients is None else coefficients.stride()
    index_stride = 0 if index is None else index.stride(0)
    _launch(
        lambda c: batch * per_sample, (),
        v, wanted, weight, data, coefficients, index, gradient, sums, v_stride, wanted_stride, data_stride,
        weight_stride, c_row, c_column, index_stride, count, 1.0 / count, seed, stream, WHOLE=per_sample == 1,
    )  # fmt: skip
    if per_sample > 1:
        _sums.finish(sums, loss, per_sample, 1.0 / count, weight)
    return loss, gradient

"""posterior_interpolate in Triton: a row of the table read once, both noises made in registers."""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton._noise import normals
from lfm_fast.kernels.triton._rows import elements, rows
from lfm_fast.kernels.triton._tuning import Configuration, Tuned, bucket

_NOISE, _POSTERIOR = tl.constexpr(0), tl.constexpr(2)  # streams


@triton.jit(do_not_specialize=("rows_stride", "index_stride", "c_row", "c_column", "items", "seed"))
def _kernel(
    mean, log_variance, rows, index, coefficients, z_t, target, mean_stride, variance_stride, rows_stride, index_stride,
    c_row, c_column, items, count, seed: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    per_sample = tl.cdiv(count, BLOCK)
    sample = (program // per_sample).to(tl.int64)
    start = (program % per_sample).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < count - start
    row = tl.load(rows + sample * rows_stride)
    number = tl.load(index + sample * index_stride)
    place = start + lane
    # no element of a row that is not there, whose sample is NaN: the host has not looked at the rows
    read = lane < tl.where(row >= 0, tl.where(row < items, count - start, 0), 0)
    data = tl.load(mean + row * mean_stride + place, mask=read, other=float("nan")).to(tl.float32)
    if log_variance is not None:
        variance = tl.load(log_variance + row * variance_stride + place, mask=read, other=0.0).to(tl.float32)
        deviate = normals(number, seed.to(tl.int64), tl.full((), _POSTERIOR, tl.int64), start // 4, BLOCK)
        data = data + tl.exp(variance * 0.5) * deviate
    noise = normals(number, seed.to(tl.int64), tl.full((), _NOISE, tl.int64), start // 4, BLOCK)
    own = coefficients + sample * c_column
    alpha = tl.load(own).to(tl.float32)
    sigma = tl.load(own + c_row).to(tl.float32)
    d_alpha = tl.load(own + 2 * c_row).to(tl.float32)
    d_sigma = tl.load(own + 3 * c_row).to(tl.float32)
    out = sample * count + place
    tl.store(z_t + out, alpha * data + sigma * noise, mask=inside)
    tl.store(target + out, d_alpha * data + d_sigma * noise, mask=inside)


_launch = Tuned(
    _kernel,
    *(Configuration({"BLOCK": block}, num_warps=warps) for block, warps in ((1024, 4), (512, 4), (2048, 8), (256, 2))),
)


def kernel(mean, rows_of_table, index, coefficients, log_variance=None, seed=0):
    batch, count = rows_of_table.shape[0], elements(mean)
    shape = (batch, *mean.shape[1:])
    z_t, target = (torch.empty(shape, dtype=torch.float32, device=mean.device) for _ in range(2))
    (means, mean_stride), (variances, variance_stride) = rows(mean), rows(log_variance)
    _launch(
        lambda c: batch * triton.cdiv(count, c["BLOCK"]),
        (bucket(batch * count), bucket(count), log_variance is None, mean.dtype),
        means, variances, rows_of_table, index, coefficients, z_t, target, mean_stride, variance_stride,
        rows_of_table.stride(0), index.stride(0), *coefficients.stride(), mean.shape[0], count, seed,
    )  # fmt: skip
    return z_t, target

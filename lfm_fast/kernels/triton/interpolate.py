"""interpolate in Triton: data read once, noise read or made in registers, z_t and target written once."""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton._noise import normals
from lfm_fast.kernels.triton._rows import elements, rows
from lfm_fast.kernels.triton._tuning import Configuration, Tuned, bucket


@triton.jit(do_not_specialize=("c_row", "c_column", "index_stride", "seed", "stream"))
def _kernel(
    z_0, z_1, z_t, target, coefficients, index, z_0_stride, z_1_stride, c_row, c_column, index_stride, count,
    seed: tl.int64, stream: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    per_sample = tl.cdiv(count, BLOCK)
    sample = (program // per_sample).to(tl.int64)
    start = (program % per_sample).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < count - start
    data = tl.load(z_0 + sample * z_0_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
    if z_1 is None:
        number = tl.load(index + sample * index_stride)
        noise = normals(number, seed.to(tl.int64), stream.to(tl.int64), start // 4, BLOCK)
    else:
        noise = tl.load(z_1 + sample * z_1_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
    own = coefficients + sample * c_column
    alpha = tl.load(own).to(tl.float32)
    sigma = tl.load(own + c_row).to(tl.float32)
    d_alpha = tl.load(own + 2 * c_row).to(tl.float32)
    d_sigma = tl.load(own + 3 * c_row).to(tl.float32)
    out = sample * count + start + lane
    tl.store(z_t + out, alpha * data + sigma * noise, mask=inside)
    tl.store(target + out, d_alpha * data + d_sigma * noise, mask=inside)


_launch = Tuned(
    _kernel,
    *(Configuration({"BLOCK": block}, num_warps=warps) for block, warps in ((1024, 4), (512, 4), (2048, 8), (256, 2))),
)


def kernel(z_0, coefficients, z_1=None, index=None, seed=0, stream=0):
    batch, count = z_0.shape[0], elements(z_0)
    z_t, target = (torch.empty(z_0.shape, dtype=z_0.dtype, device=z_0.device) for _ in range(2))
    (data, data_stride), (noise, noise_stride) = rows(z_0), rows(z_1)
    _launch(
        lambda c: batch * triton.cdiv(count, c["BLOCK"]),
        (bucket(batch * count), bucket(count), z_1 is None),
        data, noise, z_t, target, coefficients, index, data_stride, noise_stride, *coefficients.stride(),
        0 if index is None else index.stride(0), count, seed, stream,
    )  # fmt: skip
    return z_t, target

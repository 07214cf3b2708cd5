"""philox_normal in Triton: four normals of a block side by side in one thread, written 16 bytes at a time."""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton._noise import normals
from lfm_fast.kernels.triton._tuning import Configuration, Tuned, bucket


@triton.jit(do_not_specialize=("index_stride", "seed", "stream", "offset"))
def _kernel(
    index, out, index_stride, numel, seed: tl.int64, stream: tl.int64, offset: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    per_sample = tl.cdiv(numel, BLOCK)
    sample = (program // per_sample).to(tl.int64)
    start = (program % per_sample).to(tl.int64) * BLOCK
    number = tl.load(index + sample * index_stride)
    noise = normals(number, seed.to(tl.int64), stream.to(tl.int64), offset.to(tl.int64) + start // 4, BLOCK)
    lane = tl.arange(0, BLOCK)
    tl.store(out + sample * numel + start + lane, noise, mask=lane < numel - start)


_launch = Tuned(
    _kernel,
    *(Configuration({"BLOCK": block}, num_warps=warps) for block, warps in ((1024, 4), (512, 4), (2048, 8), (256, 2))),
)


def kernel(index, numel, seed, stream=0, offset=0):
    batch = index.shape[0]
    out = torch.empty((batch, numel), dtype=torch.float32, device=index.device)
    _launch(
        lambda c: batch * triton.cdiv(numel, c["BLOCK"]),
        (bucket(batch * numel), bucket(numel)),
        index, out, index.stride(0), numel, seed, stream, offset,
    )  # fmt: skip
    return out

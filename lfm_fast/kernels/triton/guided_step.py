"""guided_step in Triton: blend, combine, noise and error in one pass, compiled for the number of stored velocities."""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton import _sums
from lfm_fast.kernels.triton._noise import normals
from lfm_fast.kernels.triton._rows import elements, rows
from lfm_fast.kernels.triton._tuning import Configuration, Tuned, bucket

_STREAM = tl.constexpr(5)  # the noise of stochastic solvers


@triton.jit(
    do_not_specialize=(
        "scale_stride", "w_row", "w_column", "e_row", "e_column", "noise_stride", "index_stride", "seed", "offset",
    )
)  # fmt: skip
def _kernel(
    z, velocity, unconditional, stored, scale, weights, error_weights, noise_scale, index, z_next, blended, sums,
    z_stride, velocity_stride, unconditional_stride, stored_strides,
    scale_stride, w_row, w_column, e_row, e_column, noise_stride, index_stride,
    count, factor, atol, rtol, seed: tl.int64, offset: tl.int64,
    STORED: tl.constexpr, WHOLE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    per_sample = tl.cdiv(count, SPAN)
    sample = (program // per_sample).to(tl.int64)
    first = (program % per_sample).to(tl.int64) * SPAN
    own = weights + sample * w_row
    stop = BLOCK
    if error_weights is not None:
        stop = tl.minimum(count - first, SPAN)
    if unconditional is not None:
        s = tl.load(scale + sample * scale_stride)
    if noise_scale is not None:
        number = tl.load(index + sample * index_stride)
        amount = tl.load(noise_scale + sample * noise_stride)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for piece in range(0, stop, BLOCK):
        start = first + piece
        inside = lane < count - start
        state = tl.load(z + sample * z_stride + start + lane, mask=inside, other=0.0)
        v = tl.load(velocity + sample * velocity_stride + start + lane, mask=inside, other=0.0).to(tl.float32)
        if unconditional is not None:
            u = tl.load(unconditional + sample * unconditional_stride + start + lane, mask=inside, other=0.0)
            v = s * v + (1.0 - s) * u.to(tl.float32)
        out = sample * count + start + lane
        if blended is not None:
            tl.store(blended + out, v, mask=inside)
        following = tl.load(own) * state + tl.load(own + w_column) * v
        if error_weights is not None:
            error = tl.load(error_weights + sample * e_row) * v
        for k in tl.static_range(STORED):
            place = stored[k] + sample * stored_strides[k] + start + lane
            stage = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            following = following + tl.load(own + (2 + k) * w_column) * stage
            if error_weights is not None:
                error = error + tl.load(error_weights + sample * e_row + (1 + k) * e_column) * stage
        if noise_scale is not None:
            noise = normals(
                number, seed.to(tl.int64), tl.full((), _STREAM, tl.int64), offset.to(tl.int64) + start // 4, BLOCK
            )
            following = following + amount * noise
        tl.store(z_next + out, following, mask=inside)
        if error_weights is not None:
            before, after = tl.abs(state), tl.abs(following)
            largest = tl.where((before > after) | (before != before), before, after)  # NaN if either is
            ratio = tl.div_rn(error, atol + rtol * largest)
            total += tl.where(inside, ratio * ratio, 0.0)
    if error_weights is not None:
        part = tl.sum(total, 0)
        if WHOLE:  # this is the sample's only program
            part = tl.sqrt_rn(part * factor)
        tl.store(sums + program, part)


_with_error = Tuned(_kernel, Configuration({"SPAN": _sums.SPAN, "BLOCK": _sums.BLOCK}, num_warps=4))
_without_error = Tuned(
    _kernel,
    *(
        Configuration({"SPAN": block, "BLOCK": block}, num_warps=warps)
        for block, warps in ((1024, 4), (512, 4), (2048, 8), (256, 2))
    ),
)


def kernel(
    z, velocity, unconditional, scale, stored, weights, error_weights=None, atol=0.0, rtol=0.0,
    noise_scale=None, index=None, seed=0, offset=0, keep=False,
):  # fmt: skip
    batch, count, wants_error = z.shape[0], elements(z), error_weights is not None
    z_next = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    blended = torch.empty_like(z_next) if keep else None
    error = z_next.new_empty(batch if wants_error else 0)
    per_sample = triton.cdiv(count, _sums.SPAN)
    sums = error if per_sample <= 1 else error.new_empty(batch * per_sample)
    (state, z_stride), (v, v_stride), (u, u_stride) = rows(z), rows(velocity), rows(unconditional)
    stages, stage_strides = zip(*(rows(stage) for stage in stored)) if stored else (None, None)
    factor = 1.0 / max(count, 1)
    (_with_error if wants_error else _without_error)(
        lambda c: batch * triton.cdiv(count, c["SPAN"]),
        (bucket(batch * count), bucket(count), len(stored), velocity.dtype, noise_scale is None),
        state, v, u, stages, scale, weights, error_weights, noise_scale, index, z_next, blended,
        sums if wants_error else None, z_stride, v_stride, u_stride, stage_strides, _stride(scale), *weights.stride(),
        *(error_weights.stride() if wants_error else (0, 0)), _stride(noise_scale), _stride(index),
        count, factor, atol, rtol, seed, offset, STORED=len(stored), WHOLE=per_sample == 1,
    )  # fmt: skip
    if wants_error and count == 0:
        error.zero_()
    elif wants_error and per_sample > 1:
        _sums.finish(sums, error, per_sample, factor, root=True)
    return z_next, z_next.new_empty(0) if blended is None else blended, error


def _stride(vector: torch.Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)

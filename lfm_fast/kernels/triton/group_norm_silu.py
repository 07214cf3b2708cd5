"""group_norm_silu in Triton: a group that fits a program's registers is read once; else tiles, in three launches.

Sums of squares would cancel where the mean is large, so tiles give mean and squared deviation per channel, which are
merged exactly (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing variances").
"""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton._planes import Planes, place, pointers
from lfm_fast.kernels.triton._tuning import Configuration, Tuned, bucket

_WHOLE = 8192  # elements of a group that one program holds


@triton.jit
def _affine_silu(normal, weight, bias, channel, present, SILU: tl.constexpr):
    h = normal
    if weight is not None:
        h = h * tl.load(weight + channel, mask=present, other=0.0).to(tl.float32)
    if bias is not None:
        h = h + tl.load(bias + channel, mask=present, other=0.0).to(tl.float32)
    if SILU:
        h = h / (1.0 + tl.exp(-h))
    return h


@triton.jit
def _whole_kernel(
    x, y, mean, rstd, weight, bias, sample_stride, groups, per_group, positions, eps, SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    group = program % groups
    count = per_group * positions
    lane = tl.arange(0, BLOCK)
    inside = lane < count
    value = tl.load(x + sample * sample_stride + group * count + lane, mask=inside, other=0.0).to(tl.float32)
    middle = tl.sum(value, 0) / count
    deviation = tl.where(inside, value - middle, 0.0)
    factor = 1.0 / tl.sqrt_rn(tl.sum(deviation * deviation, 0) / count + eps)
    channel = group * per_group + lane // positions
    result = _affine_silu(deviation * factor, weight, bias, channel, inside, SILU)
    tl.store(y + program.to(tl.int64) * count + lane, result.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + program, middle)
    tl.store(rstd + program, factor)


@triton.jit
def _statistics_kernel(
    x, means, squares, sample_stride, channel_stride, position_stride, channels, positions,
    P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    sample, channel, chunk, inside = place(channels, positions, P, C)
    source = pointers(x, sample, channel, chunk, sample_stride, channel_stride, position_stride, P, C)
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    middle = tl.sum(value, 0) / tl.minimum(positions - chunk * P, P)
    deviation = tl.where(inside, value - middle[None, :], 0.0)
    out = (sample * tl.cdiv(positions, P) + chunk) * channels + channel + tl.arange(0, C)
    present = channel + tl.arange(0, C) < channels
    tl.store(means + out, middle, mask=present)
    tl.store(squares + out, tl.sum(deviation * deviation, 0), mask=present)


@triton.jit
def _merge_kernel(
    means, squares, mean, rstd, groups, per_group, channels, positions, eps, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    group = program % groups
    chunks = tl.cdiv(positions, P)
    parts = chunks * per_group
    lane = tl.arange(0, BLOCK)
    first = sample * chunks * channels + group * per_group
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, parts, BLOCK):
        chunk = (start + lane) // per_group
        place = first + chunk.to(tl.int64) * channels + (start + lane) % per_group
        count = tl.minimum(positions - chunk * P, P)
        total += tl.load(means + place, mask=start + lane < parts, other=0.0) * count
    size = per_group * positions
    middle = tl.sum(total, 0) / size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, parts, BLOCK):
        chunk = (start + lane) // per_group
        place = first + chunk.to(tl.int64) * channels + (start + lane) % per_group
        count = tl.minimum(positions - chunk * P, P)
        apart = tl.load(means + place, mask=start + lane < parts, other=0.0) - middle
        square = tl.load(squares + place, mask=start + lane < parts, other=0.0) + apart * apart * count
        total += tl.where(start + lane < parts, square, 0.0)
    tl.store(mean + program, middle)
    tl.store(rstd + program, 1.0 / tl.sqrt_rn(tl.sum(total, 0) / size + eps))


@triton.jit
def _apply_kernel(
    x, y, mean, rstd, weight, bias, sample_stride, channel_stride, position_stride, y_sample_stride, channels,
    positions, groups, per_group, SILU: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    sample, channel, chunk, inside = place(channels, positions, P, C)
    source = pointers(x, sample, channel, chunk, sample_stride, channel_stride, position_stride, P, C)
    target = pointers(y, sample, channel, chunk, y_sample_stride, channel_stride, position_stride, P, C)
    own = channel + tl.arange(0, C)[None, :]
    present = own < channels
    group = sample * groups + own // per_group
    middle = tl.load(mean + group, mask=present, other=0.0)
    factor = tl.load(rstd + group, mask=present, other=0.0)
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    result = _affine_silu((value - middle) * factor, weight, bias, own, present, SILU)
    tl.store(target, result.to(y.dtype.element_ty), mask=inside)


_whole = Tuned(_whole_kernel, enable_fp_fusion=True)
_statistics = Tuned(_statistics_kernel, enable_fp_fusion=True)
_merge = Tuned(_merge_kernel, Configuration({"BLOCK": 256}), enable_fp_fusion=True)
_apply = Tuned(
    _apply_kernel, Configuration(), Configuration(num_warps=8), Configuration(num_warps=2), enable_fp_fusion=True
)


def kernel(x, num_groups, weight=None, bias=None, eps=1e-5, silu=True):
    cut = Planes.of(x)
    source, strides = cut.place(x)
    y, y_strides = cut.new(x)
    mean, rstd = (torch.empty(cut.samples, num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    weight, bias = (p if p is None else p.contiguous() for p in (weight, bias))
    per_group, size = cut.channels // num_groups, cut.channels // num_groups * cut.positions
    if size == 0:
        return y, mean.zero_(), rstd.fill_(eps).rsqrt_()
    if size <= _WHOLE and not cut.channels_last:
        block = triton.next_power_of_2(size)
        _whole(
            lambda c: mean.numel(), (),
            source, y, mean, rstd, weight, bias, strides[0], num_groups, per_group, cut.positions, eps,
            SILU=silu, BLOCK=block, num_warps=min(max(block // 512, 1), 8),
        )  # fmt: skip
        return y, mean, rstd
    means = torch.empty(cut.samples, cut.chunks, cut.channels, dtype=torch.float32, device=x.device)
    squares = torch.empty_like(means)
    _statistics(
        lambda c: cut.tiles, (),
        source, means, squares, *strides, cut.channels, cut.positions, num_warps=cut.num_warps, **cut.tile,
    )  # fmt: skip
    _merge(
        lambda c: mean.numel(), (),
        means, squares, mean, rstd, num_groups, per_group, cut.channels, cut.positions, eps, P=cut.tile["P"],
    )  # fmt: skip
    _apply(
        lambda c: cut.pieces, (bucket(x.numel()), cut.channels_last, x.dtype),
        source, y, mean, rstd, weight, bias, *strides, y_strides[0], cut.channels, cut.positions, num_groups,
        per_group, SILU=silu, **cut.piece,
    )  # fmt: skip
    return y, mean, rstd

"""group_norm_silu_backward in Triton: sums per channel and tile, added up in a fixed order, then the gradient of x.

SiLU's input is recomputed from x, mean and rstd in both passes; nothing of x's size is stored between them.
"""

import torch
import triton
import triton.language as tl

from lfm_fast.kernels.triton._planes import Planes, place, pointers
from lfm_fast.kernels.triton._tuning import Configuration, Tuned, bucket

SPAN = 256  # rows of sums that a program adds up: one for all rows would keep a few programs busy for long


@triton.jit
def _gradient(
    grad_y, x, mean, rstd, weight, bias, sample, channel, inside, channels, groups, per_group,
    SILU: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient before the affine map, the normalised x, and rstd; of a tile whose pointers are grad_y and x."""
    own = channel + tl.arange(0, C)[None, :]
    present = own < channels
    group = sample * groups + own // per_group
    factor = tl.load(rstd + group, mask=present, other=0.0)
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    normal = (value - tl.load(mean + group, mask=present, other=0.0)) * factor
    g = tl.load(grad_y, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        h = normal
        if weight is not None:
            h = h * tl.load(weight + own, mask=present, other=0.0).to(tl.float32)
        if bias is not None:
            h = h + tl.load(bias + own, mask=present, other=0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-h))
        g = g * (s + h * (s * (1.0 - s)))
    return g, normal, factor


@triton.jit
def _sums_kernel(
    grad_y, x, mean, rstd, weight, bias, sums, products,
    g_sample_stride, x_sample_stride, channel_stride, position_stride, channels, positions, groups, per_group,
    SILU: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    sample, channel, chunk, inside = place(channels, positions, P, C)
    g_place = pointers(grad_y, sample, channel, chunk, g_sample_stride, channel_stride, position_stride, P, C)
    x_place = pointers(x, sample, channel, chunk, x_sample_stride, channel_stride, position_stride, P, C)
    g, normal, _ = _gradient(
        g_place, x_place, mean, rstd, weight, bias, sample, channel, inside, channels, groups, per_group, SILU, C
    )
    out = (sample * tl.cdiv(positions, P) + chunk) * channels + channel + tl.arange(0, C)
    present = channel + tl.arange(0, C) < channels
    tl.store(sums + out, tl.sum(tl.where(inside, g, 0.0), 0), mask=present)
    tl.store(products + out, tl.sum(tl.where(inside, g * normal, 0.0), 0), mask=present)


@triton.jit
def _group_kernel(
    sums, products, weight, mean_sums, mean_products, groups, per_group, channels, positions,
    P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    group = program % groups
    chunks = tl.cdiv(positions, P)
    parts = chunks * per_group
    lane = tl.arange(0, BLOCK)
    first = sample * chunks * channels + group * per_group
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    total_products = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, parts, BLOCK):
        inside = start + lane < parts
        channel = (start + lane) % per_group
        place = first + ((start + lane) // per_group).to(tl.int64) * channels + channel
        part = tl.load(sums + place, mask=inside, other=0.0)
        product = tl.load(products + place, mask=inside, other=0.0)
        if weight is not None:
            w = tl.load(weight + group * per_group + channel, mask=inside, other=0.0).to(tl.float32)
            part = part * w
            product = product * w
        total += part
        total_products += product
    size = per_group * positions
    tl.store(mean_sums + program, tl.sum(total, 0) / size)
    tl.store(mean_products + program, tl.sum(total_products, 0) / size)


@triton.jit
def _channel_kernel(
    sums, products, out_sums, out_products, count, channels, SPAN: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Each channel's SPAN rows of sums into one."""
    blocks = tl.cdiv(channels, C)
    first = tl.program_id(0) % blocks * C
    span = tl.program_id(0) // blocks
    channel = first + tl.arange(0, C)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, C), dtype=tl.float32)
    total_products = tl.zeros((ROWS, C), dtype=tl.float32)
    for start in range(span * SPAN, tl.minimum(count, span * SPAN + SPAN), ROWS):
        inside = (start + row < count) & (channel < channels)
        place = (start + row).to(tl.int64) * channels + channel
        total += tl.load(sums + place, mask=inside, other=0.0)
        total_products += tl.load(products + place, mask=inside, other=0.0)
    own = first + tl.arange(0, C)
    out = span * channels + own
    tl.store(out_sums + out, tl.sum(total, 0).to(out_sums.dtype.element_ty), mask=own < channels)
    tl.store(out_products + out, tl.sum(total_products, 0).to(out_products.dtype.element_ty), mask=own < channels)


@triton.jit
def _apply_kernel(
    grad_y, x, mean, rstd, weight, bias, mean_sums, mean_products, grad_x,
    g_sample_stride, x_sample_stride, out_sample_stride, channel_stride, position_stride, channels, positions, groups,
    per_group, SILU: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    sample, channel, chunk, inside = place(channels, positions, P, C)
    g_place = pointers(grad_y, sample, channel, chunk, g_sample_stride, channel_stride, position_stride, P, C)
    x_place = pointers(x, sample, channel, chunk, x_sample_stride, channel_stride, position_stride, P, C)
    target = pointers(grad_x, sample, channel, chunk, out_sample_stride, channel_stride, position_stride, P, C)
    g, normal, factor = _gradient(
        g_place, x_place, mean, rstd, weight, bias, sample, channel, inside, channels, groups, per_group, SILU, C
    )
    own = channel + tl.arange(0, C)[None, :]
    present = own < channels
    group = sample * groups + own // per_group
    if weight is not None:
        g = g * tl.load(weight + own, mask=present, other=0.0).to(tl.float32)
    g = g - tl.load(mean_sums + group, mask=present, other=0.0)
    g = g - normal * tl.load(mean_products + group, mask=present, other=0.0)
    tl.store(target, (g * factor).to(grad_x.dtype.element_ty), mask=inside)


_sums = Tuned(_sums_kernel, enable_fp_fusion=True)
_group = Tuned(_group_kernel, Configuration({"BLOCK": 256}), enable_fp_fusion=True)
_channel = Tuned(_channel_kernel, Configuration({"SPAN": SPAN, "ROWS": 64, "C": 16}), enable_fp_fusion=True)
_apply = Tuned(
    _apply_kernel, Configuration(), Configuration(num_warps=8), Configuration(num_warps=2), enable_fp_fusion=True
)


def kernel(grad_y, x, mean, rstd, weight, bias, num_groups, silu):
    cut = Planes.of(x)
    (source, (x_stride, *strides)), (g, (g_stride, *_)) = cut.place(x), cut.place(grad_y)
    grad_x, (out_stride, *_) = cut.new(x)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    weight, bias = (p if p is None else p.contiguous() for p in (weight, bias))
    grad_weight, grad_bias = (
        torch.empty(cut.channels, dtype=torch.float32 if p is None else p.dtype, device=x.device)
        for p in (weight, bias)
    )
    sums = torch.empty(cut.samples, cut.chunks, cut.channels, dtype=torch.float32, device=x.device)
    products, mean_sums, mean_products = torch.empty_like(sums), torch.empty_like(mean), torch.empty_like(mean)
    sizes = cut.channels, cut.positions, num_groups, cut.channels // num_groups
    common = g, source, mean, rstd, weight, bias
    _sums(
        lambda c: cut.tiles, (),
        *common, sums, products, g_stride, x_stride, *strides, *sizes, SILU=silu, num_warps=cut.num_warps, **cut.tile,
    )  # fmt: skip
    _add_up(sums, products, grad_bias, grad_weight, cut.samples * cut.chunks)
    if x.numel():
        _group(
            lambda c: mean.numel(), (),
            sums, products, weight, mean_sums, mean_products, num_groups, sizes[3], cut.channels, cut.positions,
            P=cut.tile["P"],
        )  # fmt: skip
    _apply(
        lambda c: cut.pieces, (bucket(x.numel()), cut.channels_last, x.dtype),
        *common, mean_sums, mean_products, grad_x, g_stride, x_stride, out_stride, *strides, *sizes,
        SILU=silu, **cut.piece,
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def _add_up(sums, products, grad_bias, grad_weight, count: int) -> None:
    """Each channel's sums over `count` rows, SPAN of them at a time until one is left."""
    channels = grad_bias.numel()
    while True:
        spans = triton.cdiv(count, SPAN)
        last = spans <= 1
        results = (grad_bias, grad_weight) if last else [sums.new_empty(spans, channels) for _ in range(2)]
        _channel(
            lambda c, spans=spans: max(spans, 1) * triton.cdiv(channels, c["C"]), (),
            sums, products, *results, count, channels,
        )  # fmt: skip
        if last:
            return
        sums, products, count = *results, spans

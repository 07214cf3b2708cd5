"""The same numbers in other memory: every layout in which a tensor can reach an op."""

import math

import torch


def _filled(shape, like):
    """What lies between and before the elements: NaN, so that a kernel which reads it shows."""
    fill = math.nan if like.is_floating_point() or like.is_complex() else 1
    return torch.full(shape, fill, dtype=like.dtype, device=like.device)


def _permuted(x, pick):
    order = list(range(x.dim()))
    if len(order) > 1:
        order = order[1:] + order[:1] if pick % 2 else order[::-1]
    inverse = [order.index(d) for d in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


def _chunk(x, pick):
    """One chunk of a wider row, as the parts of a (B, 6 D) modulation are; pick says which of three."""
    width = x.shape[-1]
    wide = _filled((*x.shape[:-1], 3 * width), x)
    part = wide.narrow(-1, pick % 3 * width, width)
    part.copy_(x)
    return part


def _stepped(x, pick):
    """Every second or third element of the last dimension; the storage ends with the last of them."""
    step = 2 + pick % 2
    wide = _filled((*x.shape[:-1], max(step * (x.shape[-1] - 1) + 1, 0)), x)
    part = wide[..., ::step]
    part.copy_(x)
    return part


def _expanded(x, pick):
    """Stride 0 along one dimension: its first slice again and again."""
    dim = pick % x.dim()
    return x if x.shape[dim] == 0 else x.narrow(dim, 0, 1).expand(x.shape)


def _overlapping(x, pick):
    """A sliding window: neighbouring rows share all but one element."""
    if x.numel() == 0:
        return x
    values = x.flatten()[: sum(x.shape) - x.dim() + 1]
    needed = sum(size - 1 for size in x.shape) + 1
    return values.repeat(-(-needed // max(len(values), 1)))[:needed].as_strided(x.shape, (1,) * x.dim())


def _offset(x, pick):
    """Not at the start of its storage, and at an address that no vector is aligned to."""
    before = 1 + pick % 3
    storage = _filled((before + x.numel(),), x)
    storage[before:] = x.flatten()
    return storage[before:].view(x.shape)


def _channels_last(x, pick):
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x.transpose(1, -1).contiguous().transpose(1, -1) if x.dim() > 1 else x


def _odd_strides(x, pick):
    """Contiguous, but dimensions of size 1 have strides that mean nothing."""
    strides = [7 if size == 1 else stride for size, stride in zip(x.shape, x.contiguous().stride())]
    return x.contiguous().as_strided(x.shape, strides)


def _negated(x, pick):
    """PyTorch's lazy negation: the memory holds -x and a bit says so, as for z.conj().imag."""
    return torch._neg_view(x.neg()) if x.dtype.is_signed else x


LAYOUTS = {
    "permuted": _permuted,
    "chunk": _chunk,
    "stepped": _stepped,
    "expanded": _expanded,
    "overlapping": _overlapping,
    "offset": _offset,
    "channels_last": _channels_last,
    "odd_strides": _odd_strides,
    "negated": _negated,
}


def relayout(x, kind, pick=0):
    """x in another layout, of the same shape and dtype; its values too, but for expanded and overlapping."""
    if x.dim() == 0 and kind not in ("offset", "negated"):
        return x
    return LAYOUTS[kind](x, pick)

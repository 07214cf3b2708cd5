"""Layers of the U-Nets as EDM has them (adm, ddpm++, ncsn++), and the norm of all U-Nets. Maps are (B, C, H, W)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm_fast import ops


class GroupNorm(nn.GroupNorm):
    """Group normalisation of maps x (B, C, H, W) in min(32, C / 4) groups, or as many as given, and SiLU behind it.

        h = weight (x - mean) / sqrt(var + eps) + bias;      modulated: h (1 + scale) + shift;      result: h sigmoid(h)

    On the op `group_norm_silu`, all of it one pass over memory. Raises ValueError for channels that the groups do not
    divide.

    Source: Wu and He 2018, "Group normalization" (arXiv 1803.08494), equations 1 to 3.
    """

    def __init__(self, channels: int, eps: float, num_groups: int | None = None):
        num_groups = max(1, min(32, channels // 4)) if num_groups is None else num_groups
        if channels % num_groups:
            raise ValueError(
                f"maps of {channels} channels do not divide into {num_groups} groups to be normed; choose other "
                "model_channels or channel_mult."
            )
        super().__init__(num_groups, channels, eps)

    def forward(self, x: Tensor, silu: bool = True) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, silu)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """With scale and shift (B, C), each sample its own."""
        scale = 1 + scale.to(self.weight.dtype)
        if torch.compiler.is_compiling() or not x.is_contiguous() or not len(x):
            return F.silu(torch.addcmul(shift.to(x)[..., None, None], self(x, False), scale.to(x)[..., None, None]))
        # samples in the place of channels: then a weight and bias of each sample are weights and biases of channels
        weight, bias = self.weight * scale, torch.addcmul(shift.to(scale), self.bias, scale)
        groups = x.shape[0] * self.num_groups
        return ops.group_norm_silu(x.flatten(0, 1)[None], groups, weight.flatten(), bias.flatten(), self.eps).view_as(x)


def resample(x: Tensor, factor: str, taps: tuple[int, ...], kernel: Tensor) -> Tensor:
    """Maps with half ("down") or twice ("up") the side, filtered by the separable filter of these taps.

    kernel: (1, 1, k, k), the taps' outer product over their squared sum. Each result pixel of "down" lies between two
    pixels of x; "up" is its transpose, times 4 so that a constant stays one. Outside of x there are zeros.

    Taps (1, 1) are the mean of four pixels, or each pixel four times, without a filter. Others hold these two as a
    factor, as (1, 3, 3, 1) is (1, 1) times (1, 2, 1), and then the rest may filter the larger maps. In 16 bits on a CPU
    it does, because PyTorch is there 20 times slower at "up", and at the gradient of "down".
    """
    rest = _without_mean(taps)
    if rest == (1,) or (rest and x.dtype.itemsize == 2 and x.device.type == "cpu"):
        if factor == "down":
            return F.avg_pool2d(_blurred(x, rest), 2)
        return _blurred(F.interpolate(x, scale_factor=2.0, mode="nearest"), rest)
    padding = (len(taps) - 1) // 2
    if factor == "down":
        return filtered(x, kernel, padding, stride=2)
    kernel = 4 * kernel.to(x).expand(x.shape[1], 1, -1, -1)
    return F.conv_transpose2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])


def _without_mean(taps: tuple[int, ...]) -> tuple[int, ...]:
    """The taps without their factor (1, 1), or nothing where they have none."""
    rest = [0]
    for tap in taps:
        rest.append(tap - rest[-1])
    return () if rest[-1] else tuple(rest[1:-1])


def _blurred(x: Tensor, taps: tuple[int, ...]) -> Tensor:
    return x if taps == (1,) else filtered(x, filter_of(taps), len(taps) // 2)


def filtered(x: Tensor, kernel: Tensor, padding: int, stride: int = 1) -> Tensor:
    """Every channel of maps x (B, C, H, W) filtered by the same kernel (1, 1, k, k)."""
    kernel = kernel.to(x).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


def filter_of(taps: tuple[int, ...]) -> Tensor:
    """The outer product of the taps with themselves over their squared sum, (1, 1, k, k) float32."""
    row = torch.tensor(taps, dtype=torch.float32)
    return (row[:, None] * row / row.sum().square())[None, None]


FILTER = "resample_filter"  # its name among the weights


class Filtered(nn.Module):
    """A layer with a filter of its own taps among its buffers, as checkpoints have it."""

    def set_filter(self, taps: tuple[int, ...]) -> None:
        self.taps = taps
        self.register_buffer(FILTER, filter_of(taps))

    def not_its_filter(self, given: Tensor) -> str:
        """What to say of a filter of this shape that is not that of the taps; "" where it is."""
        own = filter_of(self.taps)
        if torch.allclose(given.detach().cpu().float(), own, rtol=1e-2):  # it may have been rounded to bfloat16
            return ""
        return f"is another filter than that of the taps {', '.join(map(str, self.taps))}"

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        """The taps decide how the layer is computed, so weights that bring another filter belong to another network."""
        key = prefix + FILTER
        given = state_dict.get(key)
        if given is not None and given.device.type != "meta" and given.shape == self.resample_filter.shape:
            if another := self.not_its_filter(given):
                errors.append(f"{key} {another}")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class Resampling(Filtered):
    """Maps with half or twice the side."""

    def __init__(self, factor: str, taps: tuple[int, ...]):
        super().__init__()
        self.factor = factor
        self.set_filter(taps)

    def forward(self, x: Tensor) -> Tensor:
        return resample(x, self.factor, self.taps, self.resample_filter)


class ResamplingConv2d(Filtered, nn.Conv2d):
    """Maps with half or twice the side, then a convolution that keeps it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, factor: str, taps: tuple[int, ...]):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.factor = factor
        self.set_filter(taps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(resample(x, self.factor, self.taps, self.resample_filter))


class UNetBlock(nn.Module):
    """Residual block of two convolutions, with attention behind it where there are heads; (B, C, H, W) -> maps.

        x = s (skip(x) + conv1(silu(norm1(conv0(silu(norm0(x))), emb)))),      x = s (x + attention(norm2(x)))

    emb (B, E) enters norm1 as scale and shift of its result, or, with `modulates=False`, is added to what it norms.
    `factor` ("up", "down") resamples before conv0 and on the skip way, whose 1x1 convolution is there where channels
    change or `resampling_skip` asks for it. s is `sum_scale`.

    Source: Dhariwal and Nichol 2021 (arXiv 2105.05233), section 3 and appendix A; Song et al. 2021 (arXiv 2011.13456),
    appendix H; Karras et al. 2022 (arXiv 2206.00364), appendix F.
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, *, eps: float, factor: str | None = None,
        taps: tuple[int, ...] = (1, 1), num_heads: int = 0, dropout: float = 0.0, modulates: bool = True,
        sum_scale: float = 1.0, resampling_skip: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.num_heads, self.dropout, self.modulates, self.sum_scale = num_heads, dropout, modulates, sum_scale
        self.in_channels, self.out_channels, self.factor = in_channels, out_channels, factor
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = _conv(in_channels, out_channels, 3, factor, taps)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if modulates else 1))
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels or (factor and resampling_skip):
            self.skip = _conv(in_channels, out_channels, 1, factor, taps)
        else:
            self.skip = Resampling(factor, taps) if factor else None
        if num_heads:
            if out_channels % num_heads:
                raise ValueError(f"{out_channels} channels do not divide into {num_heads} heads of attention.")
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self.norm0(x))
        if self.modulates:
            scale, shift = self.affine(emb).chunk(2, dim=1)
            h = self.norm1.modulated(h, scale, shift)
        else:
            h = self.norm1(h + self.affine(emb)[..., None, None].to(h))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = self._sum(x if self.skip is None else self.skip(x), h)
        return self._sum(x, self._attention(self.norm2(x, silu=False))) if self.num_heads else x

    def last_layers(self) -> list[nn.Conv2d]:
        """The last layer of either branch, which a fresh network has at or near zero."""
        return [self.conv1, *([self.proj] if self.num_heads else [])]

    def _sum(self, x: Tensor, h: Tensor) -> Tensor:
        return x + h if self.sum_scale == 1 else (x + h).mul_(self.sum_scale)

    def _attention(self, x: Tensor) -> Tensor:
        tokens, width = x.flatten(2).transpose(1, 2), self.out_channels  # (B, T, C)
        qkv = ops.linear(tokens, self.qkv.weight.view(3 * width, width), self.qkv.bias)
        # q, k and v lie innermost, a copy puts them outermost of the channels: in order for the kernels of attention
        qkv = qkv.unflatten(2, (self.num_heads, -1, 3)).movedim(4, 2).contiguous()
        y = ops.self_attention(qkv).transpose(1, 2).flatten(2)  # (B, T, C)
        y = ops.linear(y, self.proj.weight.view(width, width), self.proj.bias)
        return y.transpose(1, 2).unflatten(2, x.shape[2:])


def _conv(in_channels: int, out_channels: int, kernel_size: int, factor: str | None, taps) -> nn.Conv2d:
    if factor:
        return ResamplingConv2d(in_channels, out_channels, kernel_size, factor, taps)
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

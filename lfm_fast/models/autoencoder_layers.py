"""Layers of the autoencoders: SmallVAE, and the one that diffusers calls AutoencoderKL. Maps are (B, C, H, W).

In inference the maps have their channels innermost, group norm and SiLU are one op, and on a CPU what a convolution
gives is added to the skip while it is written.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm_fast import ops
from lfm_fast.models.edm_layers import GroupNorm as _GroupNorm
from lfm_fast.models.guided_layers import to_planes, to_tokens
from lfm_fast.models.packed_convolution import added_to as packed_added_to
from lfm_fast.models.winograd import Winograd
from lfm_fast.ops import _registry


class GroupNorm(_GroupNorm):
    """Group normalisation and the SiLU behind it."""

    def __init__(self, channels: int, num_groups: int, eps: float):
        super().__init__(channels, eps, num_groups)

    def forward(self, x: Tensor, silu: bool = True) -> Tensor:
        if x.device.type == "cuda" and self._is_pytorchs(x, silu):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            h = F.group_norm(x, self.num_groups, weight, bias, self.eps)
            return F.silu(h) if silu else h
        return super().forward(x, silu)

    def _is_pytorchs(self, x: Tensor, silu: bool) -> bool:
        """Where the op would run its reference, PyTorch's own kernels are faster, and Inductor sees into them."""
        if torch.compiler.is_compiling():
            return True
        row = _registry.row("group_norm_silu")
        return row.choose((x, self.num_groups, self.weight, self.bias, self.eps, silu)) == "reference"


def added_to(skip: Tensor, convolution: nn.Module, x: Tensor) -> Tensor:
    """skip + convolution(x), written over `skip` where the convolution is one that is only computed with any more."""
    if isinstance(convolution, Winograd):
        return convolution.added_to(skip, x)
    return packed_added_to(skip, convolution, x)


class ResidualBlock(nn.Module):
    """skip(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))), where skip is a 1x1 convolution if the width changes.

    A fresh one adds conv2's bias alone to x, or to that convolution. In inference x is written over.
    """

    def __init__(self, channels: int, out_channels: int, num_groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNorm(channels, num_groups, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, num_groups, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        if channels != out_channels:
            self.conv_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv1(self.norm1(x)))
        return added_to(self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x, self.conv2, h)


class Attention(nn.Module):
    """x + self-attention over all positions, of one head."""

    def __init__(self, channels: int, num_groups: int, eps: float):
        super().__init__()
        self.group_norm = GroupNorm(channels, num_groups, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(self.group_norm(x, silu=False))
        q, k, v = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))  # (B, 1, T, C)
        return x + to_planes(self.to_out[0](ops.attention(q, k, v)[:, 0]), x)


class Downsample(nn.Module):
    """Half the sides by a convolution of stride 2, with zeros beyond the last row and column alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        padded = x.new_empty(batch, height + 1, width + 1, channels).permute(0, 3, 1, 2)
        padded[:, :, height] = 0  # F.pad writes zeros everywhere first
        padded[:, :, :, width] = 0
        padded[:, :, :height, :width] = x
        return self.conv(padded)


class Upsample(nn.Module):
    """Twice the sides by repetition, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Subpixel(nn.Module):
    """What a 3x3 convolution with zeros around makes of maps with every pixel repeated to 2x2, made of the maps as they
    were, with 4 products in place of 9.

    Each pixel of the result sees three rows, of which two are the same row of x: an even one sees row i - 1 by the
    weight's first row and row i by the sum of the others, an odd one row i by the sum of the first two and i + 1 by the
    last; columns likewise. So the four pixels that one of x becomes are four 2x2 convolutions of x. Two are done as
    one, of twice as many channels, with a row and a column more than needed: all four as one would need a block of
    memory that the system hands out anew each time, which takes longer than to fill it.
    """

    def __init__(self, conv: nn.Conv2d, weight: Tensor):
        """weight: the convolution's before it was rounded, for it is sums of it that are rounded here."""
        super().__init__()
        self.out_channels = conv.out_channels
        self.rows = nn.ModuleList(self._of_rows(conv, _halves(weight, dim=2, odd=odd)) for odd in (False, True))

    def _of_rows(self, conv: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
        """What makes the two pixels side by side; weight: (N, C, 2, 3)."""
        phases = torch.cat([_halves(weight, dim=3, odd=odd) for odd in (False, True)]).to(conv.weight.dtype)
        both = nn.Conv2d(conv.in_channels, 2 * self.out_channels, 2, padding=1, device="meta")
        both.weight = nn.Parameter(phases.contiguous(memory_format=torch.channels_last), requires_grad=False)
        both.bias = nn.Parameter(conv.bias.detach().repeat(2), requires_grad=False)
        return both

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        y = torch.empty(batch, height, 2, width, 2, self.out_channels, dtype=x.dtype, device=x.device)
        for row, conv in enumerate(self.rows):
            phases = conv(x).permute(0, 2, 3, 1).contiguous()[:, row:]  # (B, H or H + 1, W + 1, 2 N)
            sample, down, right, _ = phases.stride()
            # an odd column is the second half of the channels, seen from one pixel further to the right
            strides = sample, down, right, right + self.out_channels, 1
            y[:, :, row] = phases.as_strided((batch, height, width, 2, self.out_channels), strides)
        return y.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _halves(weight: Tensor, dim: int, odd: bool) -> Tensor:
    """The two numbers along `dim` by which a pixel of the result sees x, of the three by which it sees x repeated."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((first + middle, last) if odd else (first, middle + last), dim)

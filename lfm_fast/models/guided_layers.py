"""Layers of the U-Nets of guided diffusion (adm-original, adm-layout): arXiv 2105.05233.

Shapes: B batch, C channels, H and W sides, T = H W positions.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lfm_fast import ops
from lfm_fast.models import edm_layers


class GroupNorm(edm_layers.GroupNorm):
    """32 groups."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(channels, eps, 32)


def up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def down(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Twice the sides by repetition, then, where there is one, a convolution."""

    def __init__(self, channels: int, convolve: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if convolve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(up(x))


class Downsample(nn.Module):
    """Half the sides, by a convolution of stride 2 or by means."""

    def __init__(self, channels: int, convolve: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if convolve else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip, under the embedding (B, E) of time and label, which SiLU has gone over already.

    modulated: the embedding gives scale and shift of the second norm, else it is added before that norm. resample: `up`
    or `down`, done behind the first SiLU and on the skip.
    """

    def __init__(self, channels: int, out_channels: int, width: int, dropout: float, modulated: bool, resample=None):
        super().__init__()
        self.modulated, self.resample = modulated, resample or nn.Identity()
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )  # the SiLU is the norm's; it stands here for the names of the weights
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, (1 + modulated) * out_channels))
        convolution = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.out_layers = nn.Sequential(GroupNorm(out_channels), nn.SiLU(), nn.Dropout(dropout), convolution)
        widens = channels != out_channels
        self.skip_connection = nn.Conv2d(channels, out_channels, 1) if widens else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[0](x)))
        emb, norm = self.emb_layers[1](emb), self.out_layers[0]
        h = norm.modulated(h, *emb.chunk(2, dim=1)) if self.modulated else norm(h + emb[..., None, None])
        return self.skip_connection(self.resample(x)) + self.out_layers[3](self.out_layers[2](h))


class AttentionBlock(nn.Module):
    """Self-attention over all positions, added to x; channels of qkv in order (head, 3, d), or (3, head, d)."""

    def __init__(self, channels: int, num_heads: int, thirds_first: bool = False):
        super().__init__()
        self.order = (3, num_heads, -1) if thirds_first else (num_heads, 3, -1)
        self.thirds = 2 if thirds_first else 3  # the dimension of (B, T, *order) that tells q, k and v
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(self.norm(x, silu=False))
        qkv = ops.linear(tokens, self.qkv.weight[..., 0], self.qkv.bias)
        q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, self.order).unbind(self.thirds))
        y = ops.attention(q, k, v).transpose(1, 2).flatten(2)
        return x + to_planes(ops.linear(y, self.proj_out.weight[..., 0], self.proj_out.bias), x)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, T, C), positions row by row."""
    return x.flatten(2).transpose(1, 2)


def to_planes(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, T, C) -> (B, C, H, W) with the sides of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])

"""Layers that more than one network uses. Shapes: B batch, T tokens, D hidden size, C channels, H and W sides."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm_fast import ops


def time_features(t: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sinusoidal features of raw times: [cos(t f_i), sin(t f_i)], f_i = 10000^(-i / (width / 2)).

    t (B,) in [0, 1], never scaled by 1000; returns (B, width) in `dtype`. Keep `dtype` at float32 or above:
    bfloat16 has 8 bits, so neighbouring times of a 250-step sampler would get one and the same embedding.
    """
    half = width // 2
    index = torch.arange(half, device=t.device, dtype=dtype)
    angles = t.to(dtype)[:, None] * torch.exp(index * (-math.log(10000.0) / half))  # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Times (B,) -> (B, D): sinusoidal features, computed in float32 or above, through a two-layer MLP."""

    def __init__(self, hidden_size: int, width: int = 256):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.mlp[0].bias.dtype  # packed weights are bfloat16 whatever they compute in
        features = time_features(t, self.width, torch.promote_types(dtype, torch.float32))
        return self.mlp(features.to(dtype))


class LabelEmbedding(nn.Module):
    """Labels (B,) -> (B, D): one row per class, and one more for "no label" where the network was given one."""

    def __init__(self, num_rows: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PatchEmbedding(nn.Module):
    """Latents (B, C, H, W) -> tokens (B, T, D), row-major, by a convolution whose stride is its kernel, plus positions.

    The convolution only holds the weights (checkpoints store them 4-D). It is evaluated as one matrix product, because
    its own output would be channels-first: every later pass over the tokens would then run against the grain. Bias and
    positions (1, T, D) are the same for all samples: their sum is taken first, so that one pass adds both.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, z: Tensor, positions: Tensor) -> Tensor:
        p, weight = self.patch_size, self.proj.weight
        batch, channels, height, width = z.shape
        patches = z.to(weight.dtype).reshape(batch, channels, height // p, p, width // p, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, C p p)
        return F.linear(patches, weight.flatten(1)) + (positions + self.proj.bias)


class Linear(nn.Linear):
    """PyTorch's layer on the op `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class HeadNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) w over the channels of a head, (..., d) -> (..., d); computed in float32 or above.

    Source: Zhang and Sennrich 2019, "Root mean square layer normalization" (arXiv 1910.07467), equation 4.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), 1e-6).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, D); qkv channels in the order (3, head, D / heads).

    qk_norm: queries and keys are normed first, so that no score grows with their lengths (Dehghani et al. 2023, arXiv
    2302.05442, section 2).
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.q_norm = HeadNorm(hidden_size // num_heads) if qk_norm else None
        self.k_norm = HeadNorm(hidden_size // num_heads) if qk_norm else None
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, d)
        if self.q_norm is None:
            y = ops.self_attention(qkv)  # (B, heads, T, d)
        else:
            q, k, v = qkv.unbind(2)
            y = ops.attention(*(x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v)))
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them, (B, T, D) -> (B, T, D)."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = Linear(hidden_size, mlp_size)
        self.fc2 = Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(self.fc1) and is_plain(self.fc2):
            return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return self.fc2(ops.gelu_tanh(self.fc1(x)))


def is_plain(layer: nn.Module) -> bool:
    """Whether a `Linear` may be computed from its weights: not where another was put in its place, or hooks wait."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is Linear and not hooks and layer.bias is not None


def sincos_table(side: int, hidden_size: int) -> Tensor:
    """Fixed 2-D position table (1, side * side, D), float32, computed in float64.

    The first half of the channels tells the column, the second half the row; each half holds all sines, then all
    cosines, with frequencies 10000^(-i / (D / 4)). Positions are row-major.
    """
    quarter = hidden_size // 4
    frequencies = torch.exp(torch.arange(quarter, dtype=torch.float64) * (-math.log(10000.0) / quarter))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, D / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    columns = axis[None, :, :].expand(side, -1, -1)
    rows = axis[:, None, :].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, hidden_size).float()

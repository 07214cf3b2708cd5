"""A transformer over the positions of a feature map that looks at a context: arXiv 2112.10752, section 3.3."""

import torch.nn.functional as F
from torch import Tensor, nn

from lfm_fast import ops
from lfm_fast.models.guided_layers import GroupNorm, to_planes, to_tokens
from lfm_fast.models.layers import Linear


class CrossAttention(nn.Module):
    """Attention of tokens (B, T, C) to a context (B, L, D)."""

    def __init__(self, channels: int, context_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_dim, channels, bias=False)
        self.to_v = Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        made = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in made)
        return self.to_out(ops.attention(q, k, v).transpose(1, 2).flatten(2))


class GatedGelu(nn.Module):
    """(..., C) -> (..., width): the first half of a linear layer times the exact GELU of the second.

    Source: Shazeer 2020, "GLU variants improve transformer" (arXiv 2002.05202), equation 6.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.proj = Linear(channels, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated GELU four times as wide, and back."""

    def __init__(self, channels: int):
        super().__init__()
        # nothing is done between the two; the names of the weights are the format of checkpoints
        self.net = nn.Sequential(GatedGelu(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context and the feed-forward, each on normed tokens and added to them."""

    def __init__(self, channels: int, context_dim: int, num_heads: int):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, num_heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim, num_heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a map (B, C, H, W) under a context (B, L, D), added to the map.

    Source: arXiv 2112.10752, section 3.3 and appendix E.2.1 (table 15: the blocks' layers).
    """

    takes_context = True

    def __init__(self, channels: int, context_dim: int, num_heads: int, depth: int):
        super().__init__()
        self.norm = GroupNorm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        blocks = (TransformerBlock(channels, context_dim, num_heads) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = ops.linear(to_tokens(self.norm(x, silu=False)), self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + to_planes(ops.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias), x)

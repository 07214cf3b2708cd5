"""A DiT in plain PyTorch, written from the paper's figure 3 and the checkpoint format's names alone, as an oracle.

`order` is that of its call: "x, t, y" as DiT's and SiT's networks have it, "t, x, y" as LFM's. sigmas: it returns twice
the channels. Time frequencies, position table and norms are those of the published networks.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_a) + shift_a
        q, k, v = self.attn["qkv"](h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        x = x + gate_a * self.attn["proj"]((weights @ v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_m) + shift_m
        return x + gate_m * self.mlp["fc2"](F.gelu(self.mlp["fc1"](h), approximate="tanh"))


class PlainDiT(nn.Module):
    def __init__(self, side=8, patch=2, channels=4, width=32, depth=2, heads=2, rows=4, sigmas=True, order="x, t, y"):
        super().__init__()
        self.patch, self.channels, self.num_heads, self.order = patch, channels * (1 + sigmas), heads, order
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(rows, width)})
        self.pos_embed = nn.Parameter(torch.randn(1, (side // patch) ** 2, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(width, patch * patch * self.channels),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )

    def forward(self, first, second, y):
        x, t = (first, second) if self.order == "x, t, y" else (second, first)
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        angles = t.double()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype)
        c = self.t_embedder["mlp"](features) + self.y_embedder["embedding_table"](y)
        tokens = self.x_embedder["proj"](x)
        side = tokens.shape[-1]
        h = tokens.flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, dim=-1)
        h = self.final_layer["linear"](F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        h = h.reshape(len(x), side, side, self.patch, self.patch, self.channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), self.channels, *x.shape[2:])


def plain_dit(seed=0, dtype=torch.float64, **arguments):
    torch.manual_seed(seed)
    model = PlainDiT(**arguments)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()

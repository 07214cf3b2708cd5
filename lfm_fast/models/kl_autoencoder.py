"""The autoencoder behind stable diffusion, which diffusers calls AutoencoderKL: our network for its weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lfm_fast.models.autoencoder_layers import Attention, Downsample, GroupNorm, ResidualBlock, Upsample
from lfm_fast.models.small_vae import Decoded, Encoded, Gaussian

_EPS = 1e-6  # of all its norms


class KLAutoencoder(nn.Module):
    """encode(images (B, 3, H, W)) and decode(latents) of an AutoencoderKL with this configuration, for inference.

    Its state dict has the names and shapes that diffusers' has. Raises ValueError for parts that are not known here.

    Source: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models" (arXiv 2112.10752),
    section 3.1 and appendix G; the names are those of the published weights.
    """

    def __init__(self, config: Mapping):
        super().__init__()
        if untold := unknown_part(config):
            raise ValueError(f"{untold}.")
        widths, depth = list(config["block_out_channels"]), config["layers_per_block"]
        groups, attends = config["norm_num_groups"], config.get("mid_block_add_attention", True)
        latent = config["latent_channels"]
        self.encoder = _Encoder(config.get("in_channels", 3), widths, depth, groups, 2 * latent, attends)
        self.decoder = _Decoder(config.get("out_channels", 3), widths, depth, groups, latent, attends)
        quantises, restores = (config.get(name, True) for name in ("use_quant_conv", "use_post_quant_conv"))
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if quantises else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if restores else nn.Identity()

    def encode(self, x: Tensor) -> Encoded:
        """Mean and log-variance of the latents, in the autoencoder's own units."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Encoded(Gaussian(mean, log_variance.clamp(-30, 20)))

    def decode(self, z: Tensor) -> Decoded:
        return Decoded(self.decoder(self.post_quant_conv(z)))


def unknown_part(config: Mapping) -> str | None:
    """What of an AutoencoderKL's configuration is not built here, as a sentence without full stop, or None."""
    for name, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if others := sorted(set(config[name]) - {known}):
            return f"the autoencoder has blocks of type {others[0]}, of which {known} alone is known; use it as it is"
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        return f"the autoencoder's activation is {config['act_fn']}, and silu alone is known; use it as it is"
    return None


class _Encoder(nn.Module):
    def __init__(self, in_channels: int, widths: list[int], depth: int, groups: int, out_channels: int, attends: bool):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        before = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            _Level(narrow, wide, depth, groups, down=wide_at < len(widths) - 1)
            for wide_at, (narrow, wide) in enumerate(zip(before, widths))
        )
        self.mid_block = _Middle(widths[-1], groups, attends)
        self.conv_norm_out = GroupNorm(widths[-1], groups, _EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class _Decoder(nn.Module):
    def __init__(self, out_channels: int, widths: list[int], depth: int, groups: int, in_channels: int, attends: bool):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0], groups, attends)
        before = [widths[0], *widths[:-1]]
        self.up_blocks = nn.ModuleList(
            _Level(wide, narrow, depth + 1, groups, up=narrow_at < len(widths) - 1)
            for narrow_at, (wide, narrow) in enumerate(zip(before, widths))
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups, _EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x))


class _Level(nn.Module):
    """Residual blocks of one width, and what changes the sides behind them."""

    def __init__(self, channels: int, out_channels: int, depth: int, groups: int, *, down=False, up=False):
        super().__init__()
        inner = [channels] + [out_channels] * (depth - 1)
        self.resnets = nn.ModuleList(ResidualBlock(c, out_channels, groups, _EPS) for c in inner)
        if down:
            self.downsamplers = nn.ModuleList([Downsample(out_channels)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for layers in self.children():
            for layer in layers:
                x = layer(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int, attends: bool):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups, _EPS)] if attends else [])
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups, _EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for layer in self.attentions:
            x = layer(x)
        return self.resnets[1](x)


@torch.no_grad()
def apart(network: nn.Module, other: nn.Module, image: Tensor) -> float:
    """How far two autoencoders are apart on an image: the largest of the relative errors of mean, log-variance and
    reconstruction."""
    found = []
    for one in (network, other):
        gaussian = one.encode(image).latent_dist
        found.append((gaussian.mean, gaussian.logvar, one.decode(gaussian.mean).sample))
    return max(float((a - b).norm() / (b.norm() + 1e-12)) for a, b in zip(*found))

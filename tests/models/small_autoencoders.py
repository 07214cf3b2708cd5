"""Autoencoders of a few channels with weights that count, and what tests ask of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lfm_fast.autoencoder import SmallVAE
from lfm_fast.models.packed_convolution import why_not

WIDTHS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
SHAPES = {
    "four levels": {"block_out_channels": (16, 32, 32, 64), "norm_num_groups": 8},
    "deep": {"block_out_channels": (16, 32), "layers_per_block": 2, "norm_num_groups": 16},
    "bare": {
        "block_out_channels": (32, 32),
        "norm_num_groups": 32,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
    "one level": {"block_out_channels": (24,), "norm_num_groups": 8, "latent_channels": 3},
}
with_onednn = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def kl(shape="deep", **changes):
    """diffusers' autoencoder with random weights, norms that scale and shift among them."""
    from diffusers import AutoencoderKL

    config = {"latent_channels": 4, **SHAPES[shape], **changes}
    levels = len(config["block_out_channels"])
    config = {**{name: (block,) * levels for name, block in WIDTHS.items()}, **config}
    torch.manual_seed(0)
    return disturbed(AutoencoderKL(**config))


def small(**sizes):
    torch.manual_seed(0)
    return disturbed(SmallVAE(**{"block_out_channels": (16, 32, 32), **sizes}))


@torch.no_grad()
def disturbed(network):
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
    for parameter in network.parameters():
        if not parameter.any():  # what ends a branch that starts as nothing
            parameter.normal_(std=0.1)
    return network.eval()


def pictures(batch=2, height=32, width=48, seed=1):
    """Smooth and of full range; each its own."""
    coarse = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def ways(network, images, latents, dtype=torch.float32):
    """Mean, log-variance and reconstruction by a network itself, in a dtype."""
    network = copy.deepcopy(network).to(dtype)
    gaussian = network.encode(images.to(dtype)).latent_dist
    return gaussian.mean, gaussian.logvar, network.decode(latents.to(dtype)).sample


def fast_ways(autoencoder, images, latents):
    """The same by an Autoencoder with a scaling factor of 1, but for the clamp of images."""
    assert autoencoder._network()[0] is not autoencoder.network
    gaussian = autoencoder._run("encode", images).latent_dist
    return gaussian.mean, gaussian.logvar, autoencoder._run("decode", latents).sample


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def inputs(network, **sizes):
    images = pictures(**sizes)
    factor = 2 ** (len(network.config["block_out_channels"]) - 1)
    shape = len(images), network.config["latent_channels"], images.shape[2] // factor, images.shape[3] // factor
    return images, torch.randn(shape, generator=torch.Generator().manual_seed(2))

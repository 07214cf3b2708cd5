"""Networks of which no faster form is known, and arguments that make no sense."""

import warnings

import pytest
import torch
from small_autoencoders import kl, pictures, small
from torch import nn

import lfm_fast
from lfm_fast.autoencoder import Autoencoder


class Other(nn.Module):
    config = {"scaling_factor": 1.0, "latent_channels": 3, "block_out_channels": (8, 8)}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2, stride=2)


def another_activation(network):
    network.register_to_config(act_fn="relu")


def another_block(network):
    network.register_to_config(down_block_types=("AttnDownEncoderBlock2D", "DownEncoderBlock2D"))


def scaled_inside(network):
    network.decoder.mid_block.resnets[0].output_scale_factor = 2.0


def in_tiles(network):
    network.enable_tiling()


def in_half(network):
    network.bfloat16()


REFUSED = {
    another_activation: "activation is relu, and silu alone is known",
    another_block: "blocks of type AttnDownEncoderBlock2D",
    scaled_inside: "computes another thing than its configuration describes",
    in_tiles: "told to work in tiles",
    in_half: "weights are bfloat16; load them in float32",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_not_known_is_refused_and_computes_as_it_is(change):
    network, images = kl(), pictures()
    change(network)
    autoencoder = Autoencoder(network, "test")
    with pytest.raises(ValueError, match=REFUSED[change]):
        lfm_fast.optimize(autoencoder, "fp32")
    with torch.no_grad():
        expected = network.encode(images.to(autoencoder.dtype)).latent_dist.mean.float() * autoencoder.scaling_factor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(autoencoder.encode(images).mean, expected)


@pytest.mark.parametrize(
    ("network", "arguments", "says"),
    [
        (Other(), ("fp32",), "is a Other, neither AutoencoderKL nor SmallVAE"),
        (small(), ("fp8",), "precision is 'fp8', expected fp32, tf32, bf16, fp16"),
        (small(), ("tf32",), "tf32 exists on CUDA devices only"),
        (small(), ("fp16",), "use bf16 or fp32 on a CPU"),
        (small(), ("bf16", "training"), "mode is 'training', and an autoencoder is for inference"),
    ],
)
def test_refusals(network, arguments, says):
    with pytest.raises(ValueError, match=says):
        lfm_fast.optimize(Autoencoder(network, "test"), *arguments)

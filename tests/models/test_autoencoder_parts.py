"""The autoencoder's configuration, part by part, against diffusers' own; and the measure of two that should be one."""

import pytest
import torch

from lfm_fast.models.autoencoder_layers import ResidualBlock
from lfm_fast.models.kl_autoencoder import KLAutoencoder, apart, unknown_part
from lfm_fast.models.small_vae import Decoded, Encoded, Gaussian, SmallVAE

CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"in_channels": 1},
        {"out_channels": 5},
        {"layers_per_block": 1},
        {"latent_channels": 7},
        {"use_quant_conv": False},
        {"use_post_quant_conv": False},
        {"mid_block_add_attention": False},
        {"act_fn": "swish"},
    ],
    ids=str,
)
def test_weights_have_the_names_and_shapes_that_diffusers_has(change):
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        ours, theirs = KLAutoencoder(CONFIG | change), AutoencoderKL(**CONFIG | change)
    shapes = [{name: tuple(value.shape) for name, value in n.state_dict().items()} for n in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("function", ["relu", "gelu", "mish"])
def test_other_activations_are_told(function):
    assert f"the autoencoder's activation is {function}" in unknown_part(CONFIG | {"act_fn": function})


@pytest.mark.parametrize("part", ["down_block_types", "up_block_types"])
def test_other_blocks_are_told(part):
    assert "blocks of type Another" in unknown_part(CONFIG | {part: (CONFIG[part][0], "Another")})


class Constant:
    """An autoencoder of three numbers."""

    def __init__(self, mean, log_variance, picture):
        self.mean, self.log_variance, self.picture = (torch.tensor([float(x)]) for x in (mean, log_variance, picture))

    def encode(self, image):
        return Encoded(Gaussian(self.mean, self.log_variance))

    def decode(self, z):
        return Decoded(self.picture)


def test_the_largest_of_the_errors_of_all_that_it_gives():
    ours = Constant(1, 2, 4)
    assert apart(ours, ours, None) == 0
    for other, error in ((Constant(2, 2, 4), 0.5), (Constant(1, 8, 4), 0.75), (Constant(1, 2, 16), 0.75)):
        assert apart(ours, other, None) == pytest.approx(error, rel=1e-6)
    assert apart(ours, Constant(2, 8, 4), None) == pytest.approx(0.75, rel=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_small_autoencoder_has_as_many_blocks_at_each_side(depth):
    """So many where the map has each of the smaller sizes, and one more at either end of the decoder, one of the
    encoder."""
    network = SmallVAE(block_out_channels=(16, 32, 48), layers_per_block=depth)
    blocks = [sum(isinstance(layer, ResidualBlock) for layer in part) for part in (network.encoder, network.decoder)]
    assert blocks == [2 * depth + 1, 2 * depth + 2]


def test_the_small_autoencoder_repeats_pixels():
    (double,) = (layer for layer in SmallVAE(block_out_channels=(16, 16)).decoder if hasattr(layer, "scale_factor"))
    assert double(torch.tensor([[[[1.0, 5.0]]]])).tolist() == [[[[1, 1, 5, 5], [1, 1, 5, 5]]]]


def test_weights_read_back_are_float32(tmp_path):
    network = SmallVAE(block_out_channels=(16, 16))
    network.save_pretrained(tmp_path)
    again = SmallVAE.from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, network.state_dict()[name].half().float())

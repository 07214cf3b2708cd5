"""SmallVAE, the architecture of the embedded autoencoder."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from lfm_fast.models.autoencoder_layers import GroupNorm, ResidualBlock

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # diffusers' name, so that one folder format serves both
_EPS = 1e-5  # of all its norms


@dataclass
class Gaussian:
    """What `encode` of an autoencoder's network gives, in the words of diffusers."""

    mean: torch.Tensor
    logvar: torch.Tensor


@dataclass
class Encoded:
    """The same, in diffusers' wrapping."""

    latent_dist: Gaussian


@dataclass
class Decoded:
    """What `decode` gives, in diffusers' wrapping."""

    sample: torch.Tensor


class SmallVAE(nn.Module):
    """The embedded VAE: a small convolutional autoencoder with diffusers' calling convention and folder format.

    ``block_out_channels`` are the widths from full resolution down; each further level halves the side.
    """

    def __init__(self, *, block_out_channels=(32, 64, 128), layers_per_block=1, latent_channels=4, scaling_factor=1.0):
        super().__init__()
        self.config = {
            "_class_name": "SmallVAE",
            "block_out_channels": list(block_out_channels),
            "layers_per_block": layers_per_block,
            "latent_channels": latent_channels,
            "scaling_factor": scaling_factor,
        }
        widths = list(block_out_channels)
        self.encoder = nn.Sequential(*_encoder_layers(widths, layers_per_block, latent_channels))
        self.decoder = nn.Sequential(*_decoder_layers(widths, layers_per_block, latent_channels))
        self.to(memory_format=torch.channels_last)  # convolutions run twice as fast on CPUs

    def encode(self, x):
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return Encoded(Gaussian(mean, log_variance.clamp(-20, 10)))

    def decode(self, z):
        return Decoded(self.decoder(z))

    def save_pretrained(self, folder):
        """Write config.json and float16 weights: half the size, and far below the reconstruction error."""
        from safetensors.torch import save_file

        folder = Path(folder)
        half = {key: value.detach().to(torch.float16).contiguous() for key, value in self.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{WEIGHTS_FILE}.partial"
        save_file(half, partial)
        partial.replace(folder / WEIGHTS_FILE)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")  # last: then it is whole

    @classmethod
    def from_pretrained(cls, folder):
        """Read what ``save_pretrained`` wrote; weights become float32. Raises ValueError for a damaged folder."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if not k.startswith("_")}
        network = cls(**config)
        try:
            weights = load((folder / WEIGHTS_FILE).read_bytes())
        except OSError as error:
            raise ValueError(f"{folder} holds a config.json but no {WEIGHTS_FILE}") from error
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} is truncated or no safetensors file ({error})") from error
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} does not fit the config.json beside it") from error
        return network


def _residual(channels):
    return ResidualBlock(channels, channels, channels // 16, _EPS)


def _read_out(channels, out_channels):
    yield GroupNorm(channels, channels // 16, _EPS)
    yield nn.Identity()  # where the SiLU was that the norm has by now: the weights are named by places
    yield nn.Conv2d(channels, out_channels, 3, padding=1)


def _encoder_layers(widths, layers_per_block, latent_channels):
    yield nn.Conv2d(3, widths[0], 3, padding=1)
    for narrow, wide in pairwise(widths):
        yield nn.Conv2d(narrow, wide, 4, stride=2, padding=1)
        yield from (_residual(wide) for _ in range(layers_per_block))
    yield _residual(widths[-1])
    yield from _read_out(widths[-1], 2 * latent_channels)


def _decoder_layers(widths, layers_per_block, latent_channels):
    yield nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
    yield _residual(widths[-1])
    for wide, narrow in pairwise(reversed(widths)):
        yield from (_residual(wide) for _ in range(layers_per_block))
        yield nn.Upsample(scale_factor=2, mode="nearest")
        yield nn.Conv2d(wide, narrow, 3, padding=1)
    yield _residual(widths[0])
    yield from _read_out(widths[0], 3)

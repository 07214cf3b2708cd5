"""Images and an autoencoder of no weight, for tests of latents. Imported by tests."""

import torch
from torch import nn

from lfm_fast.autoencoder import Posterior
from lfm_fast.data.encoding import to_model_range
from lfm_fast.data.source import ImageSource


class Pixels(ImageSource):
    """13 random 8-pixel images in 3 classes."""

    name = "pixels"

    def __init__(self, count=13, image_size=8, flip=False, shift=0, first=0, classes="abc"):
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.randint(0, 256, (count, 3, image_size, image_size), generator=generator).to(torch.uint8)
        names = [f"{k + shift}.png" for k in range(count)]
        super().__init__(image_size, (torch.arange(count) + first) % 3, list(classes), names)
        self.flip = flip

    def load(self, position):
        return self.pixels[position]


class Pooling(nn.Module):
    """An autoencoder in name: averages 2 x 2 pixels, scaled to about unit variance; log-variance -4 in every place."""

    name, fingerprint, downsampling, latent_channels, scaling_factor = "pooling", "0123456789ab", 2, 3, 3.5

    def __init__(self):
        super().__init__()
        self.calls = 0

    def encode(self, images):
        self.calls += 1
        mean = nn.functional.avg_pool2d(images, 2) * self.scaling_factor
        return Posterior(mean, torch.full_like(mean, -4.0))


def expected_mean(source, items, flips=None):
    images = to_model_range(source.pixels[items])
    if flips is not None:
        images[flips] = images[flips].flip(-1)
    return Pooling().encode(images).mean


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

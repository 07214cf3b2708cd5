"""A training problem of seconds: a small network on latents in memory. Imported by tests, and run by them."""

import sys

import torch

from lfm_fast.models import NETWORKS, DiT
from lfm_fast.train.config import parse_args
from lfm_fast.train.loop import main, train

NETWORKS["DiT-Tiny"] = (DiT, {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2})

SETTINGS = {
    "data": "tiny",
    "model": "DiT-Tiny",
    "batch_size": 8,
    "steps": 12,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "log_every": 1,
    "checkpoint_every": 4,
    "sample_every": 0,
    "seed": 3,
    "device": "cpu",
}


def flags(**settings):
    """SETTINGS with `settings` over them, as command-line flags."""
    merged = {**SETTINGS, **settings}
    return [part for name, value in merged.items() for part in (f"--{name.replace('_', '-')}", str(value))]


class TinySource:
    """20 latents (4, 8, 8) in 3 classes: a pattern of each class and a little of each item's own."""

    num_items, num_classes, latent_shape = 20, 3, (4, 8, 8)
    class_names = ["a", "b", "c"]

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(3, 4, 8, 8, generator=generator)
        self.labels = torch.arange(20) % 3
        self.latents = patterns[self.labels] + 0.1 * torch.randn(20, 4, 8, 8, generator=generator)
        self.asked = []

    def batch(self, sample_numbers, seed):
        self.asked.append(sample_numbers.clone())
        items = sample_numbers * 7 % self.num_items
        return self.latents[items], self.labels[items]


class TinyAutoencoder:
    """Pictures at twice the latent's side: the first three channels, each value four times."""

    downsampling, latent_channels = 2, 4

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).clamp(-1, 1)


if __name__ == "__main__":
    import lfm_fast.train.loop as loop

    loop.train = lambda config: train(config, TinySource(), TinyAutoencoder())
    sys.exit(main(parse_args()))

"""What every task says: which images it reads, what it conditions the network on, and how that is shown."""

from importlib import import_module

import torch
from torch import Tensor, nn

from lfm_fast.data import ImageSource, open_images
from lfm_fast.data.latents import ReadAhead, drawn_images, flips_of
from lfm_fast.models import create_model

# name -> "module:class"; a task is imported when it is asked for
TASKS = {
    "unconditional": "lfm_fast.tasks.base:Task",
    "labelled": "lfm_fast.tasks.base:Task",
    "inpainting": "lfm_fast.tasks.inpainting:Inpainting",
    "semantic": "lfm_fast.tasks.semantic:Semantic",
    "layout": "lfm_fast.tasks.layout:Layout",
}
CONDITIONED = tuple(name for name in TASKS if name not in ("unconditional", "labelled"))  # labels only when asked for


def task_named(name: str | None) -> "Task":
    """The task of this name; None is what labels alone decide. Raises ValueError for one that there is not."""
    name = "unconditional" if name is None else name
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there is {', '.join(TASKS)}.")
    module, _, kind = TASKS[name].partition(":")
    return getattr(import_module(module), kind)()


class Task:
    """Images of their own accord, with labels or without. Tasks that condition the network on more derive from it.

    `config` is a `TrainConfig` throughout; `latent_shape` is (C, h, w).
    """

    def images(self, config, split: str = "train") -> ImageSource:
        """The images to learn from."""
        device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
        choices = {"layout": config.layout or "auto", "compat": config.compat}
        choices |= {"check": config.check_images, "decoder": config.decoder, "device": device}
        return open_images(config.data, config.image_size, split=split, flip=config.flip, **choices)

    def source(self, config, source, images: ImageSource, autoencoder):
        """What training reads, made of `source` (see `lfm_fast.data.latents`), which gives latents and labels.

        A task that conditions gives it a method condition(sample_numbers, seed) -> (B, ...), what the network is to be
        conditioned on, a function of nothing else. Raises ValueError where the images tell no such thing.
        """
        return source

    def network(self, config, latent_shape) -> nn.Module:
        """The network to train, with fresh weights."""
        return _named(config, latent_shape, latent_shape[0])

    def example(self, config, count: int, latent_shape) -> Tensor | None:
        """A condition for `count` samples, of the shape and type that training will bring; None without one."""
        return None

    def settings(self, config) -> dict:
        """What sampling from the trained flow has to know beside its weights, as JSON."""
        return {}

    def shown(self, source, sample_numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(inputs, truths), each (B, 3, H, W) in [0, 1]: what is shown left and right of the pictures that a sample
        grid of training has for each of these samples."""
        raise TypeError(f"{type(self).__name__} conditions on nothing that could be shown")

    def finished(self, source, sample_numbers: Tensor, seed: int, drawn: Tensor) -> Tensor:
        """The pictures (B, 3, H, W) in [0, 1] drawn for these samples, as the task hands them over."""
        return drawn

    def generated(self, flow, args, **sampling) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] for the flags of `lfm-fast sample` (`_CONDITIONS` of its file names them).

        `sampling` is of `LatentFlow.sample`, num_images, y, seed and batch_size among it.
        """
        raise TypeError(f"{type(self).__name__} conditions on nothing that could be given")

    def evaluate(self, flow, *, num_images: int, seed: int, data: str, **sampling) -> dict[str, float]:
        """Figures of merit, by name, of samples for held-out conditions."""
        raise ValueError(
            "a flow that is conditioned on nothing is not measured here; give --task inpainting, which any flow does, "
            f"or a flow of task {' or '.join(CONDITIONED)}."
        )


class ConditionedSource:
    """A training source whose samples have conditions too: latents, labels and all else are those of `source`, which it
    stands for. What the conditions of the batch that is likely to come next need is read in a thread.

    Args:
        source: `ResidentLatents`, `CachedLatents` or `EncodedImages` of `images`, an `ImageSource`.
    """

    def __init__(self, source, images: ImageSource):
        self._source, self._images = source, images
        self._ahead = ReadAhead(self._read)

    def __getattr__(self, name):  # batch, posteriors, num_items, latent_shape, class_names, labels, ...
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def condition(self, sample_numbers: Tensor, seed: int) -> Tensor:
        """What each sample is conditioned on, (B, ...)."""
        return self._ahead.get(sample_numbers, seed)

    def pictures(self, sample_numbers: Tensor, seed: int) -> Tensor:
        """(B, 3, H, W) uint8 on the CPU: the images themselves, mirrored where training sees them so."""
        return drawn_images(self._images, sample_numbers, seed, self._source.flip)[0].cpu()

    def _flips(self, sample_numbers: Tensor, seed: int) -> Tensor:
        """Whether each sample is mirrored, (B,) bool."""
        mirrors = flips_of(sample_numbers, seed)
        return mirrors if self._source.flip else torch.zeros_like(mirrors)

    def _read(self, sample_numbers: Tensor, seed: int):
        """What `condition` gives, in the thread."""
        raise TypeError(f"{type(self).__name__} must implement _read(sample_numbers, seed)")


def concatenated(config, latent_shape, more_channels: int) -> nn.Module:
    """The network that the settings name, taking `more_channels` of a condition behind the latent's own."""
    return _named(config, latent_shape, latent_shape[0] + more_channels, out_channels=latent_shape[0])


def _named(config, latent_shape, in_channels: int, **overrides) -> nn.Module:
    return create_model(
        config.model,
        image_size=latent_shape[1],
        downsampling=1,
        in_channels=in_channels,
        num_classes=config.num_classes or 0,
        label_dropout=config.label_dropout,
        **overrides,
    )

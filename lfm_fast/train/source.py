"""From the settings to the latents that training reads, and the checks that the two fit together."""

import dataclasses
import json
from pathlib import Path

from lfm_fast.autoencoder import load_autoencoder
from lfm_fast.data import open_images
from lfm_fast.data.latents import CachedLatents, EncodedImages, LatentCache, encode_images
from lfm_fast.data.source import ImageSource

LARGEST_IN_MEMORY = 64 * 1024 * 1024  # pixels: a smaller set is encoded at the start and kept in memory


def open_source(config, world, say=print):
    """(what training reads, the autoencoder) as the settings name them. Raises ValueError with one sentence."""
    if config.data is None:
        raise ValueError(f"preset {config.preset} comes without data; give --data FOLDER (images or cached latents)")
    if is_latent_cache(config.data):
        autoencoder = load_autoencoder(config.autoencoder, device=world.device)
        cache = LatentCache.open(config.data, fingerprint=autoencoder.fingerprint, image_size=config.image_size)
        if config.max_items is not None and config.max_items < cache.num_items:
            raise ValueError(
                f"max_items is {config.max_items}, but a latent cache is used whole ({cache.num_items} items); "
                "limit the images when encoding them"
            )
        return CachedLatents(cache, flip=config.flip), autoencoder
    images = open_images(config.data, config.image_size, flip=config.flip)
    if world.is_main and images.report.skipped:
        say(images.report.summary())
    if config.max_items is not None and config.max_items < len(images):
        images = FirstImages(images, config.max_items)
    autoencoder = load_autoencoder(config.autoencoder, device=world.device)
    if config.cache_latents is not None:
        world.from_main(lambda: encode_images(images, autoencoder, config.cache_latents, flip=config.flip) and None)
        cache = LatentCache.open(config.cache_latents, fingerprint=autoencoder.fingerprint)
        return CachedLatents(cache, flip=config.flip), autoencoder
    if len(images) * config.image_size**2 <= LARGEST_IN_MEMORY:
        return CachedLatents.from_images(images, autoencoder, flip=config.flip), autoencoder
    return EncodedImages(images, autoencoder, flip=config.flip), autoencoder


def is_latent_cache(data):
    return (Path(data).expanduser() / "stats.json").is_file()


def facts(config):
    """(num_items or None, num_classes, latent_shape) for a dry run, without encoding anything."""
    if config.data is not None and is_latent_cache(config.data):
        cache = LatentCache.open(config.data)
        return cache.num_items, len(cache.class_names), cache.latent_shape
    channels, downsampling = 4, 8  # the usual VAE's, where the one named is on the hub and not to be downloaded now
    if config.autoencoder == "embedded":
        autoencoder = load_autoencoder("embedded")
        channels, downsampling = autoencoder.latent_channels, autoencoder.downsampling
    elif (Path(config.autoencoder) / "config.json").is_file():
        settings = json.loads((Path(config.autoencoder) / "config.json").read_text())
        channels, downsampling = settings["latent_channels"], 2 ** (len(settings["block_out_channels"]) - 1)
    shape = (channels, config.image_size // downsampling, config.image_size // downsampling)
    if config.data is None:
        return None, config.num_classes or 0, shape
    images = open_images(config.data, config.image_size)
    return min(len(images), config.max_items or len(images)), images.num_classes, shape


class FirstImages(ImageSource):
    """The first `count` images of a source."""

    def __init__(self, source, count):
        super().__init__(
            source.image_size, source.labels[:count], source.class_names, source.names[:count], source.report
        )
        self.name, self.flip, self._source = f"{source.name}, first {count}", source.flip, source

    def load(self, position):
        return self._source.load(position)


def resolve_labels(config, data_classes):
    """`config` with task, num_classes and label_dropout as the data has them. Raises ValueError where they disagree."""
    classes = data_classes if config.num_classes is None else config.num_classes
    task = config.task or ("labelled" if classes >= 2 else "unconditional")
    if task == "unconditional":
        return dataclasses.replace(config, task=task, num_classes=0, label_dropout=0.0, guidance_scale=1.0)
    if data_classes < 1:
        raise ValueError(f"task is labelled, but {config.data} has no labels; use --task unconditional")
    if classes < data_classes:
        raise ValueError(
            f"num_classes is {classes}, but {config.data} has {data_classes} classes; give that number or more"
        )
    return dataclasses.replace(config, task=task, num_classes=classes)


def check_source(config, source, world):
    """Raise ValueError where the settings cannot work with this data."""
    if source.num_items < 1:
        raise ValueError(f"{config.data} holds no items to train on")
    if config.batch_size < world.size:
        raise ValueError(f"batch_size is {config.batch_size} for {world.size} ranks; it must be at least one each")
    if len(source.latent_shape) != 3 or source.latent_shape[1] != source.latent_shape[2]:
        raise ValueError(f"latents have shape {tuple(source.latent_shape)}; the networks take square ones, (C, h, h)")
    if config.guidance_scale != 1.0 and not config.label_dropout:
        raise ValueError(
            f"guidance_scale is {config.guidance_scale}, but without label dropout there is no unconditional velocity; "
            "give --label-dropout 0.1 or --guidance-scale 1"
        )

"""From the settings to the latents that training reads, and the checks that the two fit together."""

import dataclasses
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from lfm_fast import _graphs
from lfm_fast.autoencoder import DEFAULT_HUB_NAME, load_autoencoder
from lfm_fast.data import resident
from lfm_fast.data.encoding import encode_images
from lfm_fast.data.foreign_latents import OURS, latent_layout, open_latents
from lfm_fast.data.latents import EncodedImages, check_flip
from lfm_fast.data.resident import ResidentLatents
from lfm_fast.data.source import ImageSource
from lfm_fast.tasks import CONDITIONED, task_named

LARGEST_IN_MEMORY = 64 * 1024 * 1024  # pixels: a smaller set is encoded at the start and kept in memory


def open_source(config, world, say=print):
    """(what training reads, the autoencoder) as the settings name them. Raises ValueError with one sentence."""
    if config.data is None:
        raise ValueError(f"preset {config.preset} comes without data; give --data FOLDER (images or cached latents)")
    latent_format(config.autoencoder)  # its complaints, before anything is read or loaded
    if latent_layout(config.data) is not None:
        _refuse_second_cache(config)
        _refuse_cache(config)
        autoencoder = load_autoencoder(config.autoencoder, device=world.device)
        cache = world.main_first(
            lambda: open_latents(config.data, autoencoder=autoencoder, image_size=config.image_size)
        )
        if world.is_main and latent_layout(config.data) != OURS:
            say(f"The latents in {config.data} do not say what made them; they fit {autoencoder.name}, and are its.")
        _require_whole(config, cache)
        return _of_cache(cache, config, world, say), autoencoder
    _refuse_mapped(config)
    if config.data != "embedded":  # which is read in seconds; the check imports for one
        _require_network(config)
    task = task_named(config.task)
    images = world.main_first(lambda: task.images(config))
    if world.is_main and images.report.skipped:
        say(images.report.summary())
    if world.is_main and config.autoencoder == "embedded" and config.data != "embedded":
        say(f"The embedded autoencoder knows emoji alone; for photographs give --autoencoder {DEFAULT_HUB_NAME}.")
    if config.max_items is not None and config.max_items < len(images):
        images = FirstImages(images, config.max_items)
    autoencoder = load_autoencoder(config.autoencoder, device=world.device)
    with warnings.catch_warnings():
        if not world.is_main:  # every rank encodes the same images
            warnings.simplefilter("ignore")
        latents = _latents_of(images, autoencoder, config, world, say)
    return task.source(config, latents, images, autoencoder), autoencoder


def _latents_of(images, autoencoder, config, world, say):
    """Latents and labels of images: in shards on the disk, in memory where they are few, or encoded as they come."""
    if config.cache_latents is not None:
        cache = encode_images(images, autoencoder, config.cache_latents, flip=config.flip, world=world)
        return _of_cache(cache, config, world, say)
    if _encoded_at_start(config, len(images)):
        if world.is_main:
            say(f"Encoding {len(images)} images once, into memory.")
        return ResidentLatents.from_images(images, autoencoder, flip=config.flip, device=world.device)
    return EncodedImages(images, autoencoder, flip=config.flip)


def _encoded_at_start(config, count) -> bool:
    """Whether so many images become a table in memory. Raises ValueError for too many of which one is wanted."""
    if count * config.image_size**2 <= LARGEST_IN_MEMORY:
        return True
    if config.keep_latents == "device":
        raise ValueError(
            f"keep_latents is device, but {count} images of {config.image_size} pixels are encoded as they are asked "
            "for; give --cache-latents FOLDER, which encodes them once, or leave --keep-latents out"
        )
    return False


def _of_cache(cache, config, world, say):
    where = {"device": world.device, "keep": config.keep_latents, "sharing": world.local_size}
    source = resident.of_cache(cache, flip=config.flip, **where)
    if world.is_main and isinstance(source, ResidentLatents):
        say(f"The cached latents are a table of {resident.size_text(source.nbytes)} in the memory of {world.device}.")
    return source


def facts(config, world):
    """(num_items or None, num_classes, latent_shape, bytes of latents kept in the device's memory) for a dry run,
    without encoding anything.

    Raises ValueError for what `open_source` would refuse and for an image size that does not divide.
    """
    channels, downsampling = latent_format(config.autoencoder)
    layout = None if config.data is None else latent_layout(config.data)
    if layout is not None:
        _refuse_second_cache(config)
        _refuse_cache(config)
        if layout == OURS:
            cache = open_latents(config.data, image_size=config.image_size)
        else:
            known = _is_here(config.autoencoder)  # one on the hub may be any
            shape = SimpleNamespace(name=config.autoencoder, latent_channels=channels, downsampling=downsampling)
            fits = {"autoencoder": shape, "image_size": config.image_size} if known else {}
            cache = open_latents(config.data, scaling=1.0, **fits)  # in whatever unit: no latent is looked at
        _require_whole(config, cache)
        check_flip(cache, config.flip)
        size = resident.bytes_of(cache, config.flip)
        if layout != OURS:  # brought to the flow's unit, they are in float32
            size = size * 4 // cache.dtype.itemsize
        table = _table_bytes(config, world, size)
        return cache.num_items, len(cache.class_names), cache.latent_shape, table
    shape = _shape(config, channels, downsampling)
    if config.data is None:
        return None, config.num_classes or 0, shape, 0
    _refuse_mapped(config)
    images = task_named(config.task).images(config)
    count = min(len(images), config.max_items or len(images))
    table = resident.table_bytes(count, shape, flip=config.flip)
    if config.cache_latents is not None:
        table = _table_bytes(config, world, table)
    elif not _encoded_at_start(config, count):
        table = 0
    return count, images.num_classes, shape, table


def _table_bytes(config, world, size) -> int:
    """What of a cache of `size` bytes is kept in memory: all of it, or nothing."""
    is_table = resident.is_table(size, device=world.device, keep=config.keep_latents, sharing=world.local_size)
    return size if is_table else 0


def _refuse_mapped(config):
    if config.keep_latents == "mapped" and config.cache_latents is None:
        raise ValueError(
            f"keep_latents is mapped, but {config.data} holds images, of which there are no files of latents; give "
            "--cache-latents FOLDER, which encodes them once, or leave --keep-latents out"
        )


def _shape(config, channels, downsampling):
    """(C, h, h) of the latents of the images asked for. Raises ValueError for a size that does not divide."""
    if config.image_size % downsampling:
        raise ValueError(
            f"image_size {config.image_size} is not a multiple of {downsampling}, the autoencoder's factor"
        )
    return channels, config.image_size // downsampling, config.image_size // downsampling


def _is_here(autoencoder):
    return autoencoder == "embedded" or Path(autoencoder).expanduser().is_dir()


def _require_network(config):
    """Raise ValueError for a network that does not take the latents, before hours may go into reading images."""
    if config.task in CONDITIONED or not _is_here(config.autoencoder):
        return  # these look at the images first; and an autoencoder on the hub may be of any shape
    shape = _shape(config, *latent_format(config.autoencoder))
    with torch.device("meta"):  # no memory, whatever the size
        task_named(config.task).network(dataclasses.replace(config, label_dropout=0.0), shape)


def _refuse_cache(config):
    if config.layout is not None:
        raise ValueError(
            f"{config.data} is a latent cache, which has no images to read as {config.layout}; leave --from out"
        )
    if config.task in CONDITIONED:
        raise ValueError(
            f"{config.data} is a latent cache, but task {config.task} conditions on the images; give the images as "
            "--data, with --cache-latents to encode them once"
        )


def _refuse_second_cache(config):
    if config.cache_latents is None or Path(config.cache_latents).expanduser() == Path(config.data).expanduser():
        return
    raise ValueError(
        f"cache_latents is {config.cache_latents}, but the data in {config.data} is a latent cache already; "
        "leave --cache-latents out, or give the images as --data"
    )


def latent_format(autoencoder):
    """(channels, downsampling) of a named autoencoder, from its config.json alone; the usual VAE's for a hub name.

    Raises ValueError for a folder that is not there or whose config.json is not a VAE's.
    """
    if autoencoder == "embedded":
        network = load_autoencoder("embedded")
        return network.latent_channels, network.downsampling
    folder = Path(autoencoder).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or autoencoder.startswith(".") or autoencoder.count("/") != 1:
            raise ValueError(f"autoencoder folder {autoencoder!r} does not exist")
        return 4, 8  # it is on the hub, and not to be downloaded for this
    file = next((f for f in (folder / "config.json", folder / "vae" / "config.json") if f.is_file()), None)
    if file is None:
        raise ValueError(f"{folder} holds no config.json; expected a VAE in diffusers' layout")
    try:
        settings = json.loads(file.read_text())
        channels, widths = settings["latent_channels"], settings["block_out_channels"]
        if not (isinstance(channels, int) and channels > 0 and isinstance(widths, list) and widths):
            raise ValueError("its channels are of another kind")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no VAE's config.json with latent_channels and block_out_channels") from error
    return channels, 2 ** (len(widths) - 1)


def _require_whole(config, cache):
    if config.max_items is not None and config.max_items < cache.num_items:
        raise ValueError(
            f"max_items is {config.max_items}, but a latent cache is used whole ({cache.num_items} items); "
            "limit the images when encoding them"
        )


class FirstImages(ImageSource):
    """The first `count` images of a source."""

    def __init__(self, source, count):
        super().__init__(
            source.image_size, source.labels[:count], source.class_names, source.names[:count], source.report
        )
        self.name, self._source = f"{source.name}, first {count}", source
        self.flip, self.crop, self.decoded_by = source.flip, source.crop, source.decoded_by

    def load(self, position):
        return self._source.load(position)

    def batch(self, positions):
        return self._source.batch(positions)

    def __getattr__(self, name):  # what else a source knows of its images, for a task: masks, boxes
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)


def resolve_labels(config, data_classes):
    """`config` with task, num_classes and label_dropout as the data has them. Raises ValueError where they disagree."""
    if config.task in CONDITIONED and not config.num_classes:  # labels beside the condition only when asked for
        return dataclasses.replace(config, num_classes=0, label_dropout=0.0, guidance_scale=1.0)
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
    check_settings(config, source.latent_shape, world)


def check_settings(config, latent_shape, world):
    """Raise ValueError where the settings cannot work with latents of this shape, a dry run's or a real one's."""
    if config.batch_size < world.size:
        raise ValueError(f"batch_size is {config.batch_size} for {world.size} ranks; it must be at least one each")
    if config.cuda_graph:
        reason = _graphs.why_not(world.device)
        if world.size > 1:
            reason = f"gradients are exchanged between {world.size} ranks while the backward pass still runs"
        if reason is not None:
            raise ValueError(f"--cuda-graph cannot be: {reason}; leave it out")
    if len(latent_shape) != 3 or latent_shape[1] != latent_shape[2]:
        raise ValueError(f"latents have shape {tuple(latent_shape)}; the networks take square ones, (C, h, h)")
    if config.guidance_scale != 1.0 and not config.label_dropout:
        raise ValueError(
            f"guidance_scale is {config.guidance_scale}, but without label dropout there is no unconditional velocity; "
            "give --label-dropout 0.1 or --guidance-scale 1"
        )

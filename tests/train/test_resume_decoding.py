"""A run that reads image files goes on where it stopped: the same files in the same order, whoever decodes them."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import SETTINGS, TinyAutoencoder

from lfm_fast.autoencoder import Posterior
from lfm_fast.data.decoders import dali_is_there
from lfm_fast.data.folder import FolderImages
from lfm_fast.data.latents import EncodedImages
from lfm_fast.tasks import task_named
from lfm_fast.train import resume
from lfm_fast.train.config import from_preset
from lfm_fast.train.loop import train

STEPS, STOP_AT, BATCH = 7, 3, 8
DECODERS = ("pil", "dali") if dali_is_there() else ("pil",)


class Averages(TinyAutoencoder, torch.nn.Module):
    """Latents of a quarter of the pixels: the means of their channels and of all."""

    name = "averages"

    def encode(self, images):
        means = torch.nn.functional.avg_pool2d(images, 2)
        mean = torch.cat([means, means.mean(1, keepdim=True)], 1)
        return Posterior(mean, torch.full_like(mean, -4.0))


class Watched(EncodedImages):
    """Remembers which items training was given, and may be stopped while it waits for a step's."""

    def __init__(self, images, stop_at=None):
        super().__init__(images, Averages(), flip=True)
        self.stop_at, self.given = stop_at, []

    def of_images(self, images, items, sample_numbers, seed):
        self.given.append((sample_numbers.tolist(), items.tolist(), images.clone()))
        if self.stop_at is not None and int(sample_numbers[0]) // BATCH == self.stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().of_images(images, items, sample_numbers, seed)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for k in range(13):  # no multiple of the batch: epochs end within one
        pixels = np.random.default_rng(k).integers(0, 256, (40, 33 + k, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:02d}.jpg")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, photos):
    """The run that nobody stopped, by each decoder: (source, checkpoint)."""
    found = {}
    for decoder in DECODERS:
        source = Watched(FolderImages(photos, 16, decoder=decoder))
        folder = train(settings(tmp_path_factory.mktemp(decoder)), source, source.autoencoder)
        found[decoder] = source, resume.run_checkpoints(folder)[0]
    return found


def settings(folder):
    return from_preset(**{**SETTINGS, "output": str(folder), "steps": STEPS, "batch_size": BATCH, "flip": True})


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stopped_run_reads_on_where_it_stopped(tmp_path, photos, whole, decoder):
    stopped = Watched(FolderImages(photos, 16, decoder=decoder), stop_at=STOP_AT)
    train(settings(tmp_path), stopped, stopped.autoencoder)
    resumed = Watched(FolderImages(photos, 16, decoder=decoder))
    folder = train(settings(tmp_path), resumed, resumed.autoencoder)
    source, checkpoint = whole[decoder]
    assert len(stopped.given) == STOP_AT
    assert len(source.given) == STEPS
    for (numbers, items, images), (others, other_items, expected) in zip(stopped.given + resumed.given, source.given):
        assert (numbers, items) == (others, other_items)
        assert torch.equal(images, expected)
    weights, others = (resume.read_verified(path)[0] for path in (resume.run_checkpoints(folder)[0], checkpoint))
    assert [name for name in others if not torch.equal(weights[name], others[name])] == []


@pytest.mark.skipif(len(DECODERS) < 2, reason="DALI is not installed")
def test_either_decoder_is_given_the_same_items_in_the_same_order(whole):
    (pil, _), (dali, _) = (whole[name] for name in DECODERS)
    assert [given[:2] for given in pil.given] == [given[:2] for given in dali.given]
    for (*_, images), (*_, others) in zip(pil.given, dali.given):
        assert (images.int() - others.int()).abs().float().mean() <= 2.0  # of 255; mirrored alike, then


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_flag_says_who_decodes(tmp_path, photos, decoder):
    config = from_preset(
        **{**SETTINGS, "output": str(tmp_path), "data": str(photos), "image_size": 16, "device": "auto"}
    )
    images = task_named(None).images(dataclasses.replace(config, decoder=decoder))
    assert images.decoder.name == decoder
    assert images.batch([0, 5]).device.type == ("cuda" if decoder == "dali" and torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="decoder is 'opencv'; there is auto, pil and dali"):
        dataclasses.replace(config, decoder="opencv")

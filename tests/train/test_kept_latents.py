"""Where a run keeps its latents: what is asked for or refused, and what a dry run says of the memory they take."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import SETTINGS

from lfm_fast.autoencoder import Autoencoder, SmallVAE
from lfm_fast.data import resident
from lfm_fast.data.latents import CachedLatents, EncodedImages
from lfm_fast.data.resident import ResidentLatents
from lfm_fast.distributed import World
from lfm_fast.train import source
from lfm_fast.train.config import from_preset
from lfm_fast.train.loop import train
from lfm_fast.train.source import facts, open_source

TABLE = 6 * 2 * 4 * 4 * 4 * 4  # bytes: six images, mean and log-variance of 4 x 4 x 4 in float32


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Settings of a run on six 8-pixel images, through an untrained VAE of 4 x 4 x 4 latents."""
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    Autoencoder(SmallVAE(block_out_channels=(16, 16)), "tiny").save_pretrained(tmp_path / "vae")
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        pixels = generator.integers(0, 255, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    places = {"data": str(tmp_path / "photos"), "autoencoder": str(tmp_path / "vae"), "output": str(tmp_path / "runs")}
    return lambda **changes: from_preset(**{**SETTINGS, **places, "image_size": 8, **changes})


@pytest.mark.parametrize("read", [facts, open_source])
@pytest.mark.parametrize(("keep", "words"), [("mapped", "holds images, of which"), ("device", "6 images of 8 pixels")])
def test_what_images_without_a_cache_cannot_do_is_refused(settings, monkeypatch, read, keep, words):
    monkeypatch.setattr(source, "LARGEST_IN_MEMORY", 6 * 8 * 8 - 1)
    with pytest.raises(ValueError, match=f"keep_latents is {keep}, but .*{words}.*give --cache-latents FOLDER"):
        read(settings(keep_latents=keep), World())


def test_what_they_can_do_is_done(settings, tmp_path):
    for changes, kind in (
        ({}, ResidentLatents),
        ({"keep_latents": "device"}, ResidentLatents),
        ({"keep_latents": "mapped", "cache_latents": str(tmp_path / "latents")}, CachedLatents),
    ):
        assert type(open_source(settings(**changes), World())[0]) is kind


def test_a_dry_run_counts_the_table_that_the_run_makes(settings, tmp_path, monkeypatch):
    """By what the run itself holds, in every way that latents come."""
    given = {"data": str(tmp_path / "latents")}
    cached = {"cache_latents": str(tmp_path / "latents"), "flip": True}
    ways = [{}, {"max_items": 4}, cached, cached | {"keep_latents": "mapped"}, given, given | {"flip": True}]
    seen = []
    for changes in ways:
        config = settings(**changes)
        expected = facts(config, World())
        found, _ = open_source(config, World())
        held = found.nbytes if isinstance(found, ResidentLatents) else 0
        assert expected == (found.num_items, found.num_classes, found.latent_shape, held)
        seen.append(held)
    assert seen == [TABLE, TABLE * 4 // 6, 2 * TABLE, 0, TABLE, 2 * TABLE]
    monkeypatch.setattr(resident, "_free_bytes", lambda device, sharing: 8 * TABLE // sharing)
    assert [facts(settings(**given), World(local_size=n))[3] for n in (1, 2)] == [TABLE, 0]
    monkeypatch.setattr(source, "LARGEST_IN_MEMORY", 6 * 8 * 8 - 1)
    assert facts(settings(), World())[3] == 0
    assert type(open_source(settings(), World())[0]) is EncodedImages


def test_a_dry_run_says_what_the_table_takes(settings, capfd, monkeypatch):
    monkeypatch.setattr(source.resident, "table_bytes", lambda *_, **__: 3_000_000_000)
    assert train(settings(dry_run=True)) is None
    said = re.search(r"memory per rank: ([0-9.]+) GB [^(]*\(([^)]*)\)", capfd.readouterr().out)
    assert said[2].endswith(", latents 3.00")
    assert float(said[1]) == pytest.approx(3, abs=0.05)  # the rest of so small a run is a few MB


def test_mirrors_that_a_cache_does_not_hold_are_refused_by_a_dry_run_too(settings, tmp_path):
    open_source(settings(cache_latents=str(tmp_path / "latents")), World())
    for read in (facts, open_source):
        with pytest.raises(ValueError, match="flip=True needs a cache of mirrored images"):
            read(settings(data=str(tmp_path / "latents"), flip=True), World())

"""What a run learned from: one that is resumed must find it again, and all ranks must see the same."""

import json
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import StoppingSource, assert_same_checkpoint, curve, settings
from tiny_run import SETTINGS, TinyAutoencoder, TinySource, flags, two_ranks

from lfm_fast.data.encoding import encode_images
from lfm_fast.data.folder import FolderImages
from lfm_fast.distributed import World
from lfm_fast.train import loop, resume
from lfm_fast.train.config import from_preset
from lfm_fast.train.loop import train
from lfm_fast.train.origin import difference, origin_of
from lfm_fast.train.source import open_source

OWN = {"items": 20, "images": "aa", "autoencoder": "bb"}


def said(source, images="aa", autoencoder="bb"):
    """The source with its 20 items said to be of these images and this autoencoder."""
    source.provenance = {"images_digest": images, "fingerprint": autoencoder}
    return source


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "user"))


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for k in range(6):
        path = tmp_path / "photos" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("images", "autoencoder", "why"),
    [
        ("cc", "bb", "some of the 20 items of tiny have other names or labels now"),
        ("aa", "cc", "the autoencoder embedded has other weights now"),
    ],
)
def test_a_run_of_other_data_is_not_gone_on_with(tmp_path, capfd, images, autoencoder, why):
    first = train(settings(tmp_path), said(StoppingSource(6)))
    for path in (first, resume.checkpoint_path(first, 4)):
        sentence = f"--resume {path}: {why}; put that back, or begin anew with its weights by --start-from"
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            train(settings(tmp_path, resume=str(path)), said(TinySource(), images, autoencoder))
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "0"] == [first.name]
    capfd.readouterr()
    second = train(settings(tmp_path), said(TinySource(), images, autoencoder))
    assert second.name == "001-DiT-Tiny"
    assert f"Not going on with {first}: {why}. A new run begins." in capfd.readouterr().out
    assert resume.newest_step(first) == 6
    assert train(settings(tmp_path), said(TinySource())) == first, "what it was is there again"
    whole = train(settings(tmp_path / "whole"), said(TinySource()))
    assert_same_checkpoint(*(resume.run_checkpoints(folder)[0] for folder in (first, whole)))


def test_fewer_items_are_other_data():
    now = {**OWN, "items": 19, "images": "cc"}
    config = from_preset(**SETTINGS)
    assert difference(OWN, now, config) == "it learned from 20 items, and tiny has 19 now"
    assert difference(OWN, dict(OWN), config) is None


def test_what_one_of_them_does_not_say_is_no_difference(tmp_path):
    """Checkpoints of before there was an origin, and sources that have none."""
    config = from_preset(**SETTINGS)
    assert difference({}, OWN, config) is None
    assert difference(OWN, origin_of(TinySource()), config) is None


def test_a_source_of_ones_own_may_count_in_numpys_numbers():
    source = SimpleNamespace(num_items=np.int64(8), provenance=None)
    assert json.loads(json.dumps(origin_of(source))) == {"items": 8, "images": None, "autoencoder": None}


@pytest.mark.parametrize(("deviations", "origin", "warned"), [([2.0], None, 1), (None, None, 0), ([2.0], OWN, 0)])
def test_a_run_of_before_latents_had_deviations_is_warned_of(tmp_path, monkeypatch, deviations, origin, warned):
    """Which it ignored: its latents had another unit."""
    first = train(settings(tmp_path), said(StoppingSource(6)))
    read = resume.read_metadata
    monkeypatch.setattr(resume, "read_metadata", lambda path: {**read(path), "origin": origin})
    autoencoder = TinyAutoencoder()
    autoencoder.name, autoencoder.latents_std = "moon-vae", deviations
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert train(settings(tmp_path), said(TinySource()), autoencoder) == first
    sentence = f"{resume.checkpoint_path(first, 6)} is of an older version, which ignored the latents_mean and latents"
    assert sum(str(each.message).startswith(sentence) for each in heard) == warned


def test_images_and_their_cache_are_one_origin(tmp_path, photos):
    """Encoded as they come, into memory, or into a folder: a run may go on with either."""
    from lfm_fast.autoencoder import load_autoencoder
    from lfm_fast.data.latents import CachedLatents, EncodedImages
    from lfm_fast.data.resident import ResidentLatents

    images, autoencoder = FolderImages(photos, 16), load_autoencoder("embedded")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = encode_images(images, autoencoder, tmp_path / "cache", progress=False)
        resident = ResidentLatents.from_images(images, autoencoder)
    origins = [origin_of(each) for each in (EncodedImages(images, autoencoder), CachedLatents(cache), resident)]
    assert origins[0] == origins[1] == origins[2]
    assert None not in origins[0].values()
    (photos / "a").rename(photos / "c")  # the labels of all change, and nothing else
    other = origin_of(EncodedImages(FolderImages(photos, 16), autoencoder))
    assert [name for name in other if other[name] != origins[0][name]] == ["images"]


def test_ranks_that_see_other_data_are_refused(tmp_path):
    runs, statuses = two_ranks(flags(output=tmp_path / "runs"), tmp_path, {"TINY_FEWER": "1"})
    assert statuses == [2, 2]
    for run in runs:
        assert run.text() == (
            "error: rank 1 sees other data in tiny than rank 0 (items 19 and not 20); give all ranks the same\n"
        )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_images_are_looked_at_by_rank_0_first_and_warned_of_once(photos, rank):
    class Recording(World):
        made = 0

        def main_first(self, make):
            self.made += 1
            return make()

    world = Recording(rank=rank)
    config = from_preset(**{**SETTINGS, "data": str(photos), "image_size": 16, "autoencoder": "embedded"})
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        source, _ = open_source(config, world, say=lambda sentence: None)
    assert (source.num_items, world.made) == (6, 1)
    assert sum("unit variance" in str(each.message) for each in heard) == (1 if rank == 0 else 0)


def test_the_curve_before_a_fault_of_the_data_is_kept(tmp_path, capfd):
    """The second part of step 7 cannot be read: steps 5 and 6 are saved, and none of step 7."""

    class Failing(TinySource):
        def batch(self, sample_numbers, seed):
            if int(sample_numbers[0]) == 6 * 8 + 4:
                raise ValueError("7.png cannot be read")
            return super().batch(sample_numbers, seed)

    parts = {"accumulation_steps": 2, "log_every": 5}
    with pytest.raises(ValueError, match=r"7\.png cannot be read"):
        train(settings(tmp_path, **parts), Failing())
    folder = tmp_path / "000-DiT-Tiny"
    assert [path.stem for path in resume.run_checkpoints(folder)] == ["0000006", "0000004"]
    saved = resume.checkpoint_path(folder, 6)
    assert f"Saved {saved}, the state before what fails." in capfd.readouterr().out
    assert train(settings(tmp_path, **parts), TinySource()) == folder
    whole = train(settings(tmp_path / "whole", **parts), TinySource())
    assert curve(folder) == curve(whole)
    assert_same_checkpoint(*(resume.run_checkpoints(each)[0] for each in (folder, whole)))
    with pytest.raises(ValueError, match=r"7\.png"):  # one that has made no step has nothing to save
        train(settings(tmp_path / "resumed", resume=str(resume.checkpoint_path(whole, 8)), steps=13), Nothing())
    assert not list((tmp_path / "resumed").glob("*/checkpoints/*"))


def test_the_curve_before_a_grid_that_cannot_be_drawn_is_kept(tmp_path, monkeypatch, capfd):
    """A picture that it should stand beside is gone."""

    def gone(state, *_):
        if state.step == 6:
            raise ValueError("7.png cannot be read")
        return torch.zeros(1, 3, 16, 16), None

    monkeypatch.setattr(loop, "sample_grid", gone)
    with pytest.raises(ValueError, match=r"7\.png cannot be read"):
        train(settings(tmp_path, sample_every=6), TinySource(), TinyAutoencoder())
    saved = resume.checkpoint_path(tmp_path / "000-DiT-Tiny", 6)
    assert resume.run_checkpoints(tmp_path / "000-DiT-Tiny")[0] == saved
    assert f"Saved {saved}, the state before what fails." in capfd.readouterr().out


class Nothing(TinySource):
    def batch(self, sample_numbers, seed):
        raise ValueError("7.png cannot be read")

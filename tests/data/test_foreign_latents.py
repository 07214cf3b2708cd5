"""Folders of latents as other tools write them, made here from what is published of them, read as caches."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_images import Pooling

from lfm_fast.autoencoder import load_autoencoder
from lfm_fast.data.encoding import copy_latents
from lfm_fast.data.foreign_latents import latent_layout, open_latents
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.latents import CachedLatents
from lfm_fast.distributed import World
from lfm_fast.train.config import from_preset
from lfm_fast.train.source import facts, open_source

COUNTS = (5, 7, 3)  # of the shards
LATENTS = 0.3 + torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1) * torch.randn(
    15, 3, 4, 4, generator=torch.Generator().manual_seed(0)
)
LABELS = torch.tensor([0, 4, 1, 2, 2, 3, 0, 0, 1, 4, 4, 2, 1, 0, 3])


class Scaled(Pooling):
    scaling_factor = 3.5

    def unit(self):
        return 0.0, self.scaling_factor

    def encode(self, images):
        raise AssertionError("nothing is to be encoded")


def lightningdit(folder, flip=True, dtype=torch.float32, stats=None):
    folder.mkdir(exist_ok=True)
    for number, (rows, labels) in enumerate(zip(LATENTS.to(dtype).split(COUNTS), LABELS.split(COUNTS))):
        shard = {"latents": rows.contiguous(), "labels": labels.contiguous()}
        if flip:
            shard["latents_flip"] = rows.flip(-1).contiguous()
        save_file(shard, folder / f"latents_rank00_shard{number:03d}.safetensors", metadata={"total_size": "15"})
    mean, std = LATENTS.mean((0, 2, 3), keepdim=True), LATENTS.std((0, 2, 3), keepdim=True)
    torch.save(stats or {"mean": mean, "std": std}, folder / "latents_stats.pt")
    return folder


def fast_dit(folder, per_file=1, flat=False):
    features, labels = folder / "imagenet256_features", folder / "imagenet256_labels"
    features.mkdir(parents=True)
    labels.mkdir()
    for number, (rows, y) in enumerate(zip((3.5 * LATENTS).split(per_file), LABELS.split(per_file))):
        np.save(features / f"{number}.npy", rows[0].numpy() if flat else rows.numpy())
        np.save(labels / f"{number}.npy", y[0].numpy() if flat else y.numpy())
    return folder


ITEMS = torch.tensor([14, 0, 4, 5, 11, 12, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_in_the_unit_of_the_autoencoder(tmp_path, dtype):
    cache = open_latents(lightningdit(tmp_path / "a", dtype=dtype), autoencoder=Scaled(), image_size=8)
    expected = 3.5 * LATENTS.to(dtype).float()
    flips = torch.tensor([True, False, True, False, False, True, True])
    mean, log_variance = cache.read(ITEMS, flips)
    expected = torch.where(flips.view(-1, 1, 1, 1), expected[ITEMS].flip(-1), expected[ITEMS])
    assert torch.equal(mean, expected)
    assert log_variance is None
    assert torch.equal(cache.labels, LABELS)
    assert (cache.num_items, cache.latent_shape, cache.has_flip, cache.is_posterior) == (15, (3, 4, 4), True, False)
    assert cache.class_names == ["0", "1", "2", "3", "4"]
    cache.check(fingerprint="0123456789ab", image_size=8)
    with pytest.raises(ValueError, match="fingerprint"):
        cache.check(fingerprint="another")
    torch.testing.assert_close(cache.std, (3.5 * LATENTS.to(dtype).float()).std((0, 2, 3), correction=0))


def test_shards_in_the_unit_of_an_autoencoder_with_statistics_of_its_channels(tmp_path):
    autoencoder = Scaled()
    mean, scale = torch.tensor([0.1, 0.3, -0.2]).view(3, 1, 1), torch.tensor([3.0, 4.0, 2.0]).view(3, 1, 1)
    autoencoder.unit = lambda: (mean, scale)
    cache = open_latents(lightningdit(tmp_path / "a"), autoencoder=autoencoder)
    assert torch.equal(cache.read(ITEMS)[0], (LATENTS[ITEMS] - mean) * scale)


def test_shards_in_the_unit_of_their_statistics(tmp_path):
    cache = open_latents(lightningdit(tmp_path / "a", flip=False))  # no autoencoder: as their own training has them
    mean, std = LATENTS.mean((0, 2, 3), keepdim=True), LATENTS.std((0, 2, 3), keepdim=True)
    # float32 rounds a product with 1 / std where the definition divides
    torch.testing.assert_close(cache.read(torch.arange(15))[0], (LATENTS - mean) / std, rtol=1e-6, atol=1e-6)
    scaling = cache.provenance["scaling"]
    torch.testing.assert_close(torch.tensor(scaling["shift"]), mean.flatten())
    torch.testing.assert_close(1 / torch.tensor(scaling["scale"]), std.flatten())
    assert not cache.has_flip
    json.dumps(cache.provenance)
    with pytest.raises(ValueError, match="flip=True needs"):
        CachedLatents(cache, flip=True)


def test_a_number_is_the_scale(tmp_path):
    cache = open_latents(lightningdit(tmp_path / "a"), scaling=1)
    assert torch.equal(cache.read(ITEMS)[0], LATENTS[ITEMS])
    cache = open_latents(tmp_path / "a", scaling=0.5)
    assert torch.equal(cache.read(ITEMS)[0], 0.5 * LATENTS[ITEMS])


@pytest.mark.parametrize(("per_file", "flat"), [(1, False), (4, False), (1, True)])
def test_files_of_features_and_labels(tmp_path, per_file, flat):
    cache = open_latents(fast_dit(tmp_path / "a", per_file, flat), autoencoder=Scaled(), image_size=8)
    assert torch.equal(cache.read(ITEMS)[0], 3.5 * LATENTS[ITEMS])  # 10.npy after 9.npy, and each with its label
    assert torch.equal(cache.labels, LABELS)
    assert (cache.num_items, cache.latent_shape, cache.has_flip) == (15, (3, 4, 4), False)
    z_0, y = CachedLatents(cache).batch(torch.arange(15), 3)
    order = [int((z == 3.5 * LATENTS).flatten(1).all(1).nonzero()) for z in z_0]
    assert sorted(order) == list(range(15))
    assert torch.equal(y, LABELS[order])


def test_labels_of_any_whole_numbers_and_the_shadows_of_a_file_manager(tmp_path):
    folder = fast_dit(tmp_path / "a")
    for path in (folder / "imagenet256_labels").glob("*.npy"):
        np.save(path, np.load(path).astype(np.uint8))
        (path.parent / f"._{path.name}").write_bytes(b"a shadow")
    assert torch.equal(open_latents(folder, autoencoder=Scaled(), image_size=8).labels, LABELS)


def test_a_unit_that_only_shifts(tmp_path):
    class Shifted(Scaled):
        def unit(self):
            return 0.25, 1.0

    rows = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    save_file({"latents": rows, "labels": torch.zeros(64, dtype=torch.int64)}, tmp_path / "a.safetensors")
    cache = open_latents(tmp_path, autoencoder=Shifted(), image_size=8)
    assert torch.equal(cache.read(ITEMS)[0], rows[ITEMS] - 0.25)


def test_whose_latents_lie_in_a_folder(tmp_path):
    assert latent_layout(lightningdit(tmp_path / "a")) == "lightningdit"
    assert latent_layout(fast_dit(tmp_path / "b")) == "fast-dit"
    copy_latents(open_latents(tmp_path / "a", scaling=1), tmp_path / "c", progress=False)
    assert latent_layout(tmp_path / "c") == "lfm_fast"
    (tmp_path / "c" / "stats.json").unlink()
    assert latent_layout(tmp_path / "c") is None  # begun by us and not finished: not another tool's
    for name in ("d", "nowhere"):
        assert latent_layout(tmp_path / name) is None
        (tmp_path / "d").mkdir(exist_ok=True)
    save_file({"weight": torch.zeros(3)}, tmp_path / "d" / "model.safetensors")
    assert latent_layout(tmp_path / "d") is None
    with pytest.raises(ValueError, match=r"no stats\.json"):
        open_latents(tmp_path / "d")


@pytest.mark.parametrize("make", [lightningdit, fast_dit])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_copy_is_a_cache_of_ours(tmp_path, make, dtype):
    cache = open_latents(make(tmp_path / "a"), autoencoder=Scaled(), image_size=8)
    copy = copy_latents(cache, tmp_path / "b", dtype=dtype, shard_size=4, progress=False)
    expected = cache.read(torch.arange(15))[0]
    assert torch.equal(copy.read(torch.arange(15))[0], expected if dtype is None else expected.half().float())
    if cache.has_flip:
        flips = torch.ones(15, dtype=torch.bool)
        assert torch.equal(copy.read(torch.arange(15), flips)[0].half(), cache.read(torch.arange(15), flips)[0].half())
    assert torch.equal(copy.labels, LABELS)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 4
    LatentCache.open(tmp_path / "b", fingerprint="0123456789ab", image_size=8, verify=True)
    with pytest.raises(ValueError, match="fingerprint 0123456789ab"):
        LatentCache.open(tmp_path / "b", fingerprint="another")
    assert copy.provenance["copied_from"] == cache.provenance["format"]


# -- what does not fit is refused


def refused(folder, words, **settings):
    with pytest.raises(ValueError, match=words) as found:
        open_latents(folder, **settings)
    assert "\n" not in str(found.value)


def test_another_autoencoder_or_size(tmp_path):
    a, b = lightningdit(tmp_path / "a"), fast_dit(tmp_path / "b")
    autoencoder = Scaled()
    for folder in (a, b):
        refused(folder, r"shape \(3, 4, 4\).*at 16 pixels have \(3, 8, 8\)", autoencoder=autoencoder, image_size=16)
    autoencoder.latent_channels = 4
    for folder in (a, b):
        refused(folder, r"shape \(3, 4, 4\).*have \(4, 4, 4\)", autoencoder=autoencoder)
    autoencoder = Scaled()
    autoencoder.scaling_factor = 0.18215
    refused(
        a, r"times the scaling_factor 0\.18215 of pooling, have a standard deviation of 0\.0", autoencoder=autoencoder
    )
    for scaling in (0, -1.0, float("inf"), float("nan"), True):
        refused(a, f"scaling={scaling} is not known", scaling=scaling)
    refused(a, r"scaling='all' is not known", scaling="all")
    for path in (b / "imagenet256_features").iterdir():
        np.save(path, np.load(path) / 0.18215)  # not scaled
    refused(b, r"as they are, since such files are scaled already, have a standard deviation of", autoencoder=Scaled())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda mean, std: {"mean": mean}, "damaged, or no dict"),
        (lambda mean, std: {"mean": mean, "std": std[:, :2]}, "no dict|of 3 channels|of 2 channels"),
        (lambda mean, std: {"mean": mean[:, :2], "std": std[:, :2]}, "of 2 channels, but the shards beside it have 3"),
        (lambda mean, std: {"mean": mean, "std": 0 * std}, "that cannot be"),
        (lambda mean, std: {"mean": mean * torch.nan, "std": std}, "that cannot be"),
        (lambda mean, std: {"mean": mean, "std": 5 * std}, "is not of the latents beside it"),
        (lambda mean, std: {"mean": mean + 1, "std": std}, "is not of the latents beside it"),
        (lambda mean, std: [mean, std], "damaged, or no dict"),
    ],
)
def test_statistics_that_are_others(tmp_path, change, words):
    mean, std = LATENTS.mean((0, 2, 3), keepdim=True), LATENTS.std((0, 2, 3), keepdim=True)
    refused(lightningdit(tmp_path / "a", stats=change(mean, std)), words)


def test_statistics_are_read_without_running_them(tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "proof"),)

    folder = lightningdit(tmp_path / "a", stats={"mean": Evil(), "std": torch.ones(1, 3, 1, 1)})
    refused(folder, "damaged, or no dict")
    assert not (tmp_path / "proof").exists()
    (folder / "latents_stats.pt").unlink()
    refused(folder, r"needs .*latents_stats\.pt, which is not there: give the autoencoder, or a number")


def test_shards_that_do_not_fit_each_other(tmp_path):
    folder = lightningdit(tmp_path / "a")
    last = folder / "latents_rank00_shard002.safetensors"
    whole = last.read_bytes()
    good = {"latents": torch.zeros(3, 3, 4, 4), "latents_flip": torch.zeros(3, 3, 4, 4), "labels": torch.arange(3)}
    for change, words in [
        ({"latents": torch.zeros(3, 3, 8, 8), "latents_flip": torch.zeros(3, 3, 8, 8)}, "another kind or shape"),
        ({"latents_flip": None}, "another kind or shape"),
        ({"labels": None}, r"002\.safetensors holds latents \(3, 3, 4, 4\).*expected"),
        ({"labels": torch.arange(2)}, "expected latents"),
        ({"labels": torch.zeros(3)}, "expected latents"),
        ({"labels": torch.tensor([0, -1, 0])}, "has the label -1"),
        ({"labels": torch.tensor([0, 1 << 60, 0])}, "has the label 1152921504606846976"),
        ({"latents": torch.zeros(3, 48), "latents_flip": torch.zeros(3, 48)}, "expected latents"),
        ({"latents": torch.zeros(3, 3, 4, 4, dtype=torch.uint8)}, "expected latents"),
        ({"more": torch.zeros(3)}, "expected latents"),
    ]:
        save_file({name: tensor for name, tensor in (good | change).items() if tensor is not None}, last)
        refused(folder, words, scaling=1)
    for damaged in (b"", whole[:-1], whole[:40], b"\xff" * 100):
        last.write_bytes(damaged)
        refused(folder, r"shard002\.safetensors is damaged", scaling=1)


def test_files_that_do_not_pair_or_are_damaged(tmp_path):
    folder = fast_dit(tmp_path / "a")
    features, labels = folder / "imagenet256_features", folder / "imagenet256_labels"
    (features / "3.npy").rename(features / "99.npy")
    refused(folder, r"do not pair: 3\.npy and 1 more have no partner")
    (features / "99.npy").rename(features / "3.npy")
    whole = (features / "7.npy").read_bytes()
    (features / "7.npy").write_bytes(whole[:-4])
    refused(folder, r"7\.npy has .* bytes, which are not 1 latents as in 0\.npy")
    (features / "7.npy").write_bytes(whole)
    for value, words in [
        (np.zeros(1), "expected whole numbers"),
        (np.zeros((1, 2), dtype=np.int64), "expected whole numbers"),
        (np.array([None]), "damaged or gone"),
    ]:
        np.save(labels / "7.npy", value)
        refused(folder, words)
    np.save(labels / "7.npy", np.array([2]))
    whole = (labels / "7.npy").read_bytes()
    for more in (b"999_999_999,", b"9**9**9,", b"[" * 50):  # no memory is asked for, and nothing is computed
        (labels / "7.npy").write_bytes(whole.replace(b"1,", more).replace(b" " * (len(more) - 2) + b"\n", b"\n"))
        refused(folder, "7.npy is damaged or gone")
    (labels / "7.npy").write_bytes(whole)
    np.save(labels / "0.npy", np.zeros(3, np.int64))  # three labels, and one latent that is no row of several
    np.save(features / "0.npy", np.zeros((3, 4, 4)))
    refused(folder, r"0\.npy holds float64 of shape \(3, 4, 4\); expected latents")
    np.save(labels / "0.npy", np.zeros(1, np.int64))
    np.save(features / "0.npy", (3.5 * LATENTS[:1]).numpy())
    cache = open_latents(folder)
    (features / "5.npy").unlink()  # while it is in use
    with pytest.raises(ValueError, match=r"5\.npy is damaged or gone \(FileNotFoundError\)"):
        cache.read(torch.tensor([4, 5]))
    np.save(features / "5.npy", np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match=r"5\.npy has"):
        open_latents(folder)
    (folder / "other_features").mkdir()
    (folder / "other_labels").mkdir()
    refused(folder, "holds 2 sets")


def test_a_scaling_is_no_matter_of_our_own_caches(tmp_path):
    copy_latents(open_latents(lightningdit(tmp_path / "a"), scaling=2), tmp_path / "b", progress=False)
    refused(tmp_path / "b", "is for other tools' latents", scaling=1)
    refused(tmp_path / "nowhere", "is for other tools' latents", scaling=1)


def test_training_reads_them_if_they_fit_the_autoencoder(tmp_path):
    """4 channels of a quarter of the side are what the embedded autoencoder has."""
    rows = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    autoencoder = load_autoencoder("embedded")
    (tmp_path / "a").mkdir()
    save_file(
        {"latents": rows / autoencoder.scaling_factor, "labels": torch.arange(6)}, tmp_path / "a" / "x.safetensors"
    )
    settings = {"data": str(tmp_path / "a"), "autoencoder": "embedded", "model": "DiT-S/4", "device": "cpu"}
    said = []
    latents, _ = open_source(from_preset(**settings, image_size=32), World(), said.append)
    assert said[:1] == [f"The latents in {tmp_path / 'a'} do not say what made them; they fit embedded, and are its."]
    z_0, y = latents.batch(torch.arange(6), 0)
    # float32 rounds the quotient and the product
    torch.testing.assert_close(z_0, rows[y], rtol=1e-6, atol=0)
    assert facts(from_preset(**settings, image_size=32), World()) == (6, 6, (4, 8, 8), 6 * 4 * 8 * 8 * 4)
    for read in (facts, open_source):
        with pytest.raises(ValueError, match=r"shape \(4, 8, 8\).*at 64 pixels have \(4, 16, 16\)"):
            read(from_preset(**settings, image_size=64), World())

import json
import shutil
import warnings

import pytest
import torch
from torch import nn

from lfm_fast.autoencoder import Posterior
from lfm_fast.data import encoding
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.latents import CachedLatents, EncodedImages, encode_images, flips_of
from lfm_fast.data.order import item_of
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


@pytest.fixture
def source():
    return Pixels()


@pytest.fixture
def numbers():
    return torch.tensor([0, 5, 12, 13, 200, 4, 1_000_003])


def expected_mean(source, items, flips=None):
    images = encoding.to_model_range(source.pixels[items])
    if flips is not None:
        images[flips] = images[flips].flip(-1)
    return Pooling().encode(images).mean


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard_size", [1, 4, 13, 100])
def test_what_is_encoded_is_read_back(tmp_path, source, shard_size):
    cache = encode_images(source, Pooling(), tmp_path, shard_size=shard_size, batch_size=3, progress=False)
    items = torch.tensor([12, 0, 3, 4, 4, 7])
    mean, log_variance = cache.read(items)
    # the same images in batches of another size: averaging four pixels differs by a rounding at most
    torch.testing.assert_close(mean, expected_mean(source, items), rtol=0, atol=1e-6)
    assert (log_variance == -4).all()
    assert cache.latent_shape == (3, 4, 4)
    assert (cache.num_items, cache.class_names) == (13, ["a", "b", "c"])
    assert torch.equal(cache.labels, source.labels)
    assert not list(tmp_path.glob("*.partial"))


def test_mirrored_images_are_encoded_and_read(tmp_path, source):
    cache = encode_images(source, Pooling(), tmp_path, shard_size=5, flip=True, progress=False)
    items, flips = torch.tensor([0, 1, 2, 11, 12]), torch.tensor([True, False, True, True, False])
    mean, _ = cache.read(items, flips)
    torch.testing.assert_close(mean, expected_mean(source, items, flips), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_storage(tmp_path, source, dtype, step):
    cache = encode_images(source, Pooling(), tmp_path, dtype=dtype, progress=False)
    mean, _ = cache.read(torch.arange(13))
    assert mean.dtype == torch.float32
    # storage rounds to the nearest: half a unit in the last place of values up to 3.5
    torch.testing.assert_close(mean, expected_mean(source, torch.arange(13)), rtol=step, atol=1e-6)


def test_the_mode_alone(tmp_path, source, numbers):
    latents = CachedLatents(encode_images(source, Pooling(), tmp_path, store="latents", progress=False))
    z_0, _ = latents.batch(numbers, 0)
    torch.testing.assert_close(z_0, expected_mean(source, item_of(numbers, 13, 0)), rtol=0, atol=1e-6)
    assert torch.equal(z_0, latents.batch(numbers, 0)[0])


def test_statistics_are_those_of_posterior_draws(tmp_path, source):
    cache = encode_images(source, Pooling(), tmp_path, shard_size=4, progress=False)
    mean = expected_mean(source, torch.arange(13)).double()
    torch.testing.assert_close(cache.mean.double(), mean.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    variance = mean.var((0, 2, 3), unbiased=False) + torch.tensor(-4.0).double().exp()
    torch.testing.assert_close(cache.std.double(), variance.sqrt(), rtol=1e-6, atol=0)
    assert cache.variance_note() is None


def test_latents_far_from_unit_variance_are_reported(tmp_path, source):
    autoencoder = Pooling()
    autoencoder.scaling_factor = 0.1
    with pytest.warns(UserWarning, match=r"far from unit variance.*scaling_factor"):
        encode_images(source, autoencoder, tmp_path, progress=False)


# -- training batches


def test_a_sample_depends_on_its_number_and_the_seed_alone(source, numbers):
    latents = CachedLatents.from_images(source, Pooling(), flip=True)
    z_0, y = latents.batch(numbers, 7)
    for k in range(len(numbers)):
        alone, label = latents.batch(numbers[k : k + 1], 7)
        assert torch.equal(alone[0], z_0[k])
        assert label[0] == y[k]
    assert torch.equal(y, source.labels[item_of(numbers, 13, 7)])
    assert not torch.equal(z_0, latents.batch(numbers, 8)[0])


def test_the_posterior_is_sampled_anew_at_every_visit(source):
    latents = CachedLatents.from_images(source, Pooling())
    everything = torch.arange(13 * 400)
    z_0, _ = latents.batch(everything, 3)
    noise = (z_0 - expected_mean(source, item_of(everything, 13, 3))) / torch.tensor(-2.0).exp()
    # 249,600 normals: the mean is within 5 / sqrt(n) and the variance within 5 sqrt(2 / n) of theirs
    assert abs(float(noise.mean())) < 5 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 5 * (2 / noise.numel()) ** 0.5


def test_half_of_the_samples_are_mirrored(source):
    numbers = torch.arange(10_000)
    flips = flips_of(numbers, 2)
    assert abs(float(flips.float().mean()) - 0.5) < 5 * 0.5 / 10_000**0.5
    latents = CachedLatents.from_images(source, Pooling(), flip=True)
    latents.cache._shards[0]["log_variance"].fill_(-200.0)
    latents.cache._shards[0]["log_variance_flip"].fill_(-200.0)  # no noise: the mirror shows
    z_0, _ = latents.batch(numbers[:50], 2)
    torch.testing.assert_close(z_0, expected_mean(source, item_of(numbers[:50], 13, 2), flips[:50]), rtol=0, atol=1e-6)


def test_cached_in_files_cached_in_memory_and_encoded_on_the_fly_agree(tmp_path, source, numbers):
    encode_images(source, Pooling(), tmp_path, flip=True, shard_size=4, progress=False)
    sources = [
        CachedLatents(LatentCache.open(tmp_path), flip=True),
        CachedLatents.from_images(source, Pooling(), flip=True),
        EncodedImages(source, Pooling(), flip=True),
    ]
    for latents in sources:
        assert (latents.num_items, latents.num_classes, latents.latent_shape) == (13, 3, (3, 4, 4))
        assert latents.class_names == ["a", "b", "c"]
    batches = [latents.batch(numbers, 11) for latents in sources]
    for z_0, y in batches[1:]:
        torch.testing.assert_close(z_0, batches[0][0], rtol=0, atol=1e-6)
        assert torch.equal(y, batches[0][1])


def test_no_samples_is_a_batch_too(source):
    for latents in (CachedLatents.from_images(source, Pooling()), EncodedImages(source, Pooling())):
        z_0, y = latents.batch(torch.empty(0, dtype=torch.int64), 0)
        assert z_0.shape == (0, 3, 4, 4)
        assert y.shape == (0,)


def test_reading_ahead_changes_nothing_and_guesses_cycles(source):
    latents = EncodedImages(source, Pooling())
    guesses = []
    load = latents._ahead._load
    latents._ahead._load = lambda numbers, seed: guesses.append(int(numbers[0])) or load(numbers, seed)
    # rank 0 of 2 with two micro-steps of 3: 0, 3, then the next global batch of 12
    firsts = [12 * step + 3 * micro for step in range(8) for micro in range(2)]
    for first in firsts:
        numbers = torch.arange(first, first + 3)
        z_0, y = latents.batch(numbers, 4)
        other, label = CachedLatents.from_images(source, Pooling()).batch(numbers, 4)
        torch.testing.assert_close(z_0, other, rtol=0, atol=1e-6)
        assert torch.equal(y, label)
    latents._ahead._pool.shutdown()
    assert guesses.count(firsts[-1]) == 1  # once the cycle is known every batch is read once, ahead
    assert len(guesses) <= len(firsts) + 4


def test_an_error_while_reading_ahead_arrives_at_the_batch_that_has_it(source):
    latents = EncodedImages(source, Pooling())
    bad = int(item_of(torch.tensor([5]), 13, 0))
    real = source.load
    source.load = lambda position: real(position) if position != bad else (_ for _ in ()).throw(ValueError("gone"))
    latents.batch(torch.arange(0, 3), 0)
    with pytest.raises(ValueError, match="gone"):
        latents.batch(torch.arange(3, 6), 0)
    assert latents.batch(torch.arange(6, 9), 0)[0].shape == (3, 3, 4, 4)


# -- interruption, damage, and other people's caches


def test_an_interrupted_encoding_goes_on_where_it_stopped(tmp_path, source):
    whole = tmp_path / "whole"
    encode_images(source, Pooling(), whole, shard_size=3, progress=False)
    broken = tmp_path / "broken"
    autoencoder = Pooling()
    real = source.load

    def fails_at_ten(position):
        if position == 10:
            raise OSError("the disk went away")
        return real(position)

    source.load = fails_at_ten
    with pytest.raises(OSError, match="went away"):
        encode_images(source, autoencoder, broken, shard_size=3, progress=False)
    assert sorted(path.name for path in broken.iterdir()) == [f"latents-0000{k}.safetensors" for k in range(3)]
    with pytest.raises(ValueError, match=r"no stats\.json.*encode again"):
        LatentCache.open(broken)
    source.load = real
    autoencoder.calls = 0
    encode_images(source, autoencoder, broken, shard_size=3, progress=False)
    assert autoencoder.calls == 2  # items 9 to 11 and 12
    assert files_of(broken) == files_of(whole)


def test_a_shard_whose_writing_fails_leaves_nothing(tmp_path, source, monkeypatch):
    def full_disk(path):
        raise OSError("no space left")

    from lfm_fast.data import cache

    monkeypatch.setattr(cache.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        encode_images(source, Pooling(), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_cache_is_not_made_again(tmp_path, source):
    encode_images(source, Pooling(), tmp_path, progress=False)
    before, autoencoder = files_of(tmp_path), Pooling()
    encode_images(source, autoencoder, tmp_path, progress=False)
    assert autoencoder.calls == 0
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "header"])
def test_a_damaged_shard_is_refused_and_made_anew(tmp_path, source, damage):
    encode_images(source, Pooling(), tmp_path, shard_size=4, progress=False)
    whole, path = files_of(tmp_path), tmp_path / "latents-00001.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-7])
    else:
        content[-99 if damage == "flipped bit" else 3] ^= 1 << 4
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"latents-00001\.safetensors is (damaged|missing)"):
        LatentCache.open(tmp_path)
    path.unlink(missing_ok=True)
    encode_images(source, Pooling(), tmp_path, shard_size=4, progress=False)
    assert files_of(tmp_path) == whole


def test_a_truncated_shard_is_refused_even_where_checksums_are_not_compared(tmp_path, source):
    encode_images(source, Pooling(), tmp_path, progress=False)
    path = tmp_path / "latents-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"bytes instead of"):
        LatentCache.open(tmp_path, verify=False)


def test_every_flipped_bit_of_a_small_shard_is_found(tmp_path, source):
    encode_images(Pixels(2), Pooling(), tmp_path, progress=False)
    path = tmp_path / "latents-00000.safetensors"
    content = path.read_bytes()
    for place in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            LatentCache.open(tmp_path, verify=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_damaged_statistics_are_refused(tmp_path, source, text):
    encode_images(source, Pooling(), tmp_path, progress=False)
    (tmp_path / "stats.json").write_text(text)
    with pytest.raises(ValueError, match=r"stats\.json is (damaged|not of format)"):
        LatentCache.open(tmp_path)


def test_another_format_is_refused(tmp_path, source):
    encode_images(source, Pooling(), tmp_path, progress=False)
    stats = json.loads((tmp_path / "stats.json").read_text())
    (tmp_path / "stats.json").write_text(json.dumps(stats | {"format": 2}))
    with pytest.raises(ValueError, match="not of format 1"):
        LatentCache.open(tmp_path)


def test_checksums_are_compared_once_per_file(tmp_path, source, monkeypatch):
    encode_images(source, Pooling(), tmp_path, shard_size=4, progress=False)
    from lfm_fast.data import latent_cache

    monkeypatch.setattr(latent_cache, "file_checksum", lambda path: pytest.fail("read again"))
    LatentCache.open(tmp_path)
    with pytest.raises(pytest.fail.Exception):
        LatentCache.open(tmp_path, verify=True)
    copy = tmp_path.with_name("copy")
    shutil.copytree(tmp_path, copy, copy_function=shutil.copyfile)
    with pytest.raises(pytest.fail.Exception):
        LatentCache.open(copy)


def test_another_autoencoder_or_size_is_refused(tmp_path, source):
    cache = encode_images(source, Pooling(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="fingerprint 0123456789ab, but the one in use has ffff"):
        LatentCache.open(tmp_path, fingerprint="ffff")
    with pytest.raises(ValueError, match="made from 8-pixel images, but 16 pixels"):
        LatentCache.open(tmp_path, image_size=16)
    LatentCache.open(tmp_path, fingerprint="0123456789ab", image_size=8)
    with pytest.raises(ValueError, match="encode the images again"):
        cache.check(fingerprint="x")


OTHERS = (("shift", 1), ("first", 1), ("classes", "abd"))  # other names, labels, names of classes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": Pixels(12)}, "num_items=13"),
        *(({"source": Pixels(**{name: value})}, "images_digest=") for name, value in OTHERS),
        ({"flip": True}, "flip=False"),
        ({"dtype": torch.float16}, "dtype='float32'"),
        ({"store": "latents"}, "store='posterior'"),
        ({"shard_size": 5}, "shard_size=4"),
    ],
)
def test_a_folder_begun_with_something_else_is_refused(tmp_path, source, change, words):
    arguments = {"source": source, "autoencoder": Pooling(), "folder": tmp_path, "shard_size": 4, "progress": False}
    encode_images(**arguments)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=f"{words}.*choose another folder"):
        encode_images(**arguments | change)
    other = Pooling()
    other.fingerprint = "ba9876543210"
    with pytest.raises(ValueError, match="fingerprint="):
        encode_images(**arguments | {"autoencoder": other})
    assert files_of(tmp_path) == before


def test_bad_arguments_get_a_sentence_before_any_work(tmp_path, source):
    autoencoder = Pooling()
    for arguments, words in [
        ({"store": "pixels"}, "store='pixels'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"source": Pixels(image_size=9)}, "image_size=9 is not a multiple of 2"),
        ({"source": Pixels(0)}, "no image"),
    ]:
        with pytest.raises(ValueError, match=words):
            encode_images(**{"source": source, "autoencoder": autoencoder, "folder": tmp_path / "x"} | arguments)
    assert autoencoder.calls == 0
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="does not exist"):
        LatentCache.open(tmp_path / "x")
    with pytest.raises(ValueError, match="flip=True needs"):
        CachedLatents(encode_images(source, autoencoder, tmp_path / "y", progress=False), flip=True)


def test_a_latent_that_is_not_finite_is_refused_by_name(tmp_path, source):
    autoencoder = Pooling()
    real = autoencoder.encode

    def overflow(images):
        posterior = real(images)
        posterior.mean[2, 0, 0, 0] = torch.inf
        return posterior

    autoencoder.encode = overflow
    with pytest.raises(ValueError, match=r"not finite for 2\.png"):
        encode_images(source, autoencoder, tmp_path, batch_size=4, progress=False)


def test_no_warning_on_the_usual_way(tmp_path, source):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_images(source, Pooling(), tmp_path, progress=False)

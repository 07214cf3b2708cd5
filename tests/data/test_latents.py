import pytest
import torch
from ops.philox_oracle import words
from small_images import Pixels, Pooling, expected_mean

from lfm_fast.autoencoder import Posterior, load_autoencoder
from lfm_fast.data.encoding import encode_images
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.latents import CachedLatents, EncodedImages, ReadAhead, flips_of
from lfm_fast.data.order import item_of


@pytest.fixture
def source():
    return Pixels()


@pytest.fixture
def numbers():
    return torch.tensor([0, 5, 12, 13, 200, 4, 1_000_003])


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


@pytest.mark.parametrize("shard_size", [4, 100])
def test_samples_drawn_once(tmp_path, source, shard_size):
    settings = {"store": "samples", "seed": 5, "flip": True, "progress": False, "batch_size": 3}
    cache = encode_images(source, Pooling(), tmp_path / "a", shard_size=shard_size, **settings)
    items = torch.arange(13)
    for flips, first in ((torch.zeros(13, dtype=torch.bool), 0), (torch.ones(13, dtype=torch.bool), 13)):
        z_0, log_variance = cache.read(items, flips)
        assert log_variance is None
        mean = expected_mean(source, items, flips)
        # the draw of sample number i, or of N + i for the mirror image, whatever the batch and the shard it came in
        expected = Posterior(mean, torch.full_like(mean, -4.0)).sample(items + first, 5)
        torch.testing.assert_close(z_0, expected, rtol=0, atol=1e-6)
    assert cache.provenance["seed"] == 5
    with pytest.raises(ValueError, match="seed=5, but seed=6 is asked for"):
        encode_images(source, Pooling(), tmp_path / "a", shard_size=shard_size, **settings | {"seed": 6})


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_encoding_on_a_gpu(tmp_path):
    images = Pixels(image_size=32)
    for store in ("posterior", "samples"):
        caches = [
            encode_images(images, load_autoencoder("embedded", device=device), tmp_path / store / device, store=store)
            for device in ("cpu", "cuda")
        ]
        # convolutions in TF32, ten bits of mantissa, through about ten layers
        for one, other in zip(*(cache.read(torch.arange(13)) for cache in caches)):
            if one is not None:
                torch.testing.assert_close(one, other, rtol=0.02, atol=0.05)


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


@pytest.mark.parametrize(
    "batches",
    [
        [(5 * k + first, size) for k in range(8) for first, size in ((0, 3), (3, 2))],
        [(3 * k, (3, 1)[k % 2]) for k in range(16)],  # the same step, other sizes
        [(100 - 4 * k, 2) for k in range(12)],
    ],
    ids=["sizes by turns", "one step", "downwards"],
)
def test_batches_that_come_in_turn_are_read_ahead_in_turn(batches):
    read = []
    ahead = ReadAhead(lambda numbers, seed: read.append((numbers.tolist(), seed)) or (numbers + seed))
    for first, size in batches:
        numbers = torch.arange(first, first + size)
        assert torch.equal(ahead.get(numbers, 7), numbers + 7)
    ahead._pool.shutdown()
    wrong = [numbers for numbers, _ in read if numbers not in [[*range(f, f + size)] for f, size in batches]]
    assert len(wrong) <= 4  # until the turn is known, and at the end; fewer, where one is called off in time
    assert read.count(([*range(batches[-1][0], sum(batches[-1]))], 7)) == 1


def test_what_was_read_ahead_for_another_seed_is_not_given_out():
    ahead = ReadAhead(lambda numbers, seed: numbers + seed)
    for first, seed in ((0, 10), (3, 10), (6, 20), (9, 20), (12, 10)):
        numbers = torch.arange(first, first + 3)
        assert torch.equal(ahead.get(numbers, seed), numbers + seed)
    ahead._pool.shutdown()


def test_which_samples_are_mirrored_is_pinned():
    """A run resumed with a later release goes on with the same ones: half of the first words of stream 4."""
    numbers, seed = [0, 1, 2, 3, 2**33 + 1, 5, 6, 7], 2**40 + 3
    first_words = [words(number, 0, seed, 4)[0] for number in numbers]
    assert flips_of(torch.tensor(numbers), seed).tolist() == [word < 2**31 for word in first_words]


def test_the_shape_of_latents_is_the_autoencoders():
    autoencoder = load_autoencoder("embedded")
    latents = EncodedImages(Pixels(image_size=32), autoencoder)
    z_0, _ = latents.batch(torch.arange(2), 0)
    assert latents.latent_shape == tuple(z_0.shape[1:]) == (autoencoder.latent_channels, 8, 8)


def test_an_error_while_reading_ahead_arrives_at_the_batch_that_has_it(source):
    latents = EncodedImages(source, Pooling())
    bad = int(item_of(torch.tensor([5]), 13, 0))
    real = source.load
    source.load = lambda position: real(position) if position != bad else (_ for _ in ()).throw(ValueError("gone"))
    latents.batch(torch.arange(0, 3), 0)
    with pytest.raises(ValueError, match="gone"):
        latents.batch(torch.arange(3, 6), 0)
    assert latents.batch(torch.arange(6, 9), 0)[0].shape == (3, 3, 4, 4)

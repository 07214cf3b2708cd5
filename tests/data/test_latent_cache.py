import json
import re
import shutil
import warnings

import pytest
import torch
from small_images import Pixels, Pooling, files_of

from lfm_fast.data.encoding import encode_images
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.latents import CachedLatents


@pytest.fixture
def source():
    return Pixels()


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
    with pytest.raises(ValueError, match=r"cannot be read, among 9\.png to 11\.png: the disk went away"):
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


def test_a_shard_that_goes_away_is_read_on_where_it_is_open(tmp_path, source):
    cache = encode_images(source, Pooling(), tmp_path, shard_size=4, progress=False)
    expected = cache.read(torch.arange(13))
    (tmp_path / "latents-00002.safetensors").unlink()
    for one, other in zip(cache.read(torch.arange(13)), expected):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"latents-00002\.safetensors is missing"):
        LatentCache.open(tmp_path)


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


def told(cache):
    return [cache.labels.tolist(), cache.class_names, cache.mean.tolist(), cache.std.tolist(), cache.provenance]


def test_every_flipped_bit_of_the_statistics_is_found_or_harmless(tmp_path):
    """Means, labels' names, the autoencoder's fingerprint: none can change unseen."""
    encode_images(Pixels(2), Pooling(), tmp_path, progress=False)
    path, expected = tmp_path / "stats.json", told(LatentCache.open(tmp_path))
    content, found = path.read_bytes(), 0
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        said, cache = None, None
        try:
            cache = LatentCache.open(tmp_path)
        except ValueError as error:
            said = str(error)
        if said is None:
            assert told(cache) == expected  # white space
        else:
            found += 1
            assert re.search(r"stats\.json is (damaged|not of format)|is (damaged|missing)", said)
    assert found > 0.7 * len(content) / 3


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.0, 0.0]},
        {"std": [1.0, float("nan"), 1.0]},
        {"mean": [], "std": []},
        {"shards": []},
        {"shards": [{"file": "../latents-00000.safetensors", "items": 13, "bytes": 1, "crc32": 1}]},
        {"shards": [{"file": "latents-00000.safetensors", "items": 1e999, "bytes": 1, "crc32": 1}]},
        {"shards": [{"file": "latents-00000.safetensors", "items": -13, "bytes": 1, "crc32": 1}]},
        {"class_names": "abc"},
        {"class_names": [1, 2, 3]},
        {"provenance": 3},
        {"checksum": 3},
    ],
)
def test_statistics_that_cannot_be_are_refused_also_without_a_checksum(tmp_path, source, change):
    encode_images(source, Pooling(), tmp_path, progress=False)
    path = tmp_path / "stats.json"
    stats = json.loads(path.read_text())
    del stats["checksum"]  # as older ones are
    path.write_text(json.dumps(stats))
    assert LatentCache.open(tmp_path).num_items == 13
    path.write_text(json.dumps(stats | change))
    with pytest.raises(ValueError, match=r"stats\.json is damaged"):
        LatentCache.open(tmp_path)


def test_labels_beyond_the_classes_are_refused(tmp_path, source):
    encode_images(source, Pooling(), tmp_path, progress=False)
    path = tmp_path / "stats.json"
    stats = json.loads(path.read_text()) | {"class_names": ["a", "b"]}
    del stats["checksum"]
    path.write_text(json.dumps(stats))
    with pytest.raises(ValueError, match="labels beyond its 2 classes"):
        LatentCache.open(tmp_path)


def test_shards_of_different_kinds_are_refused(tmp_path, source):
    """Two caches' shards in one folder, with statistics that somebody made to match."""
    encode_images(source, Pooling(), tmp_path / "a", shard_size=7, progress=False)
    encode_images(source, Pooling(), tmp_path / "b", shard_size=7, store="latents", progress=False)
    stats = [json.loads((tmp_path / name / "stats.json").read_text()) for name in "ab"]
    shutil.copy(tmp_path / "b" / "latents-00001.safetensors", tmp_path / "a")
    stats[0]["shards"][1] = stats[1]["shards"][1]
    del stats[0]["checksum"]
    (tmp_path / "a" / "stats.json").write_text(json.dumps(stats[0]))
    with pytest.raises(ValueError, match="shards of different kinds"):
        LatentCache.open(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 99}', "[" * 100_000])
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
        ({"dtype": torch.float64}, "dtype=torch.float64"),
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

"""Encoding into a full disk, beside another encoder, and from images that go away: nothing is left half-written."""

import errno
import json
import os
import resource
import signal

import numpy as np
import pytest
import torch
from encoding_ranks import context
from PIL import Image
from safetensors.torch import load_file, save_file
from small_images import Pixels, Pooling, files_of

from lfm_fast.cli import main
from lfm_fast.data import open_images, shards
from lfm_fast.data.encoding import encode_images
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.shards import is_whole
from lfm_fast.train.source import FirstImages


def encode_within(limit, folder, said, notes):
    """In a process of its own, where no file may be longer than `limit` bytes."""
    os.environ["LFM_FAST_CACHE"] = notes
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        encode_images(Pixels(), Pooling(), folder, progress=False)
    except OSError as error:
        said.write_text(str(error))


@pytest.fixture
def source():
    return Pixels()


class FullDisk:
    """Takes `whole` writes and a part of the next one, and says then that it is full."""

    def __init__(self, whole):
        self.left, self.real = whole + 1, os.pwrite

    def pwrite(self, descriptor, data, offset):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(descriptor, data[: max(1, len(data) // 2)] if self.left == 0 else data, offset)


@pytest.mark.parametrize("writes", range(18))
def test_a_disk_that_is_full_at_any_write_leaves_whole_shards_alone(tmp_path, source, monkeypatch, writes):
    """8 and 5 images, of two tensors: 4 and 3 batches of them, and the labels and the header of each shard."""
    settings = {"shard_size": 8, "batch_size": 2, "flip": True, "store": "latents", "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "pwrite", FullDisk(writes).pwrite)
        with pytest.raises(OSError, match=r"^cannot write .*/latents-0000[01]\.safetensors: No space left on device$"):
            encode_images(source, Pooling(), tmp_path / "a", **settings)
    assert all(is_whole(path) for path in (tmp_path / "a").iterdir())
    with pytest.raises(ValueError, match=r"no stats\.json"):
        LatentCache.open(tmp_path / "a")
    encode_images(source, Pooling(), tmp_path / "a", **settings)
    encode_images(source, Pooling(), tmp_path / "b", **settings)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_limit_of_the_file_size_ends_in_a_sentence(tmp_path, source):
    """As a full disk, by the operating system itself: a shard takes 5,000 bytes."""
    process = context().Process(
        target=encode_within, args=(2000, tmp_path / "cache", tmp_path / "said", os.environ["LFM_FAST_CACHE"])
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    said = (tmp_path / "said").read_text()
    assert said == f"cannot write {tmp_path}/cache/latents-00000.safetensors: File too large"
    assert list((tmp_path / "cache").iterdir()) == []
    assert encode_images(source, Pooling(), tmp_path / "cache", progress=False).num_items == 13


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_command_between_whole_shards(tmp_path, monkeypatch, capsys, number, status):
    """SIGTERM is what torchrun sends to the other ranks when one has died."""

    class Signalled(Pooling):
        def encode(self, images):
            if self.calls == 4:
                os.kill(os.getpid(), number)
            return super().encode(images)

    monkeypatch.setattr("lfm_fast.data.open_images", lambda *_, **__: Pixels())
    command = ["encode", "--data", "x", "--image-size", "8", "--autoencoder", "embedded", "--device", "cpu"]
    command += ["--shard-size", "3", "--batch-size", "2", "--output", str(tmp_path / "cache")]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("lfm_fast.autoencoder.load_autoencoder", lambda *_, **__: Signalled())
    at_the_keyboard = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        assert main(command) == status
    finally:
        signal.signal(signal.SIGINT, at_the_keyboard)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "lfm-fast encode: stopped; begin again and it goes on where it was"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "latents-00000.safetensors",
        "latents-00001.safetensors",
    ]
    assert signal.getsignal(signal.SIGTERM) is before
    autoencoder = Pooling()
    monkeypatch.setattr("lfm_fast.autoencoder.load_autoencoder", lambda *_, **__: autoencoder)
    assert main(command) == 0
    assert autoencoder.calls == 5  # the shards of 3, 3 and 1 that were missing


def test_an_image_that_goes_away_is_named_and_the_next_call_goes_on(tmp_path, source):
    real = source.load

    def gone(position):
        if position == 7:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "7.png")
        return real(position)

    source.load = gone
    with pytest.raises(ValueError, match=r"image of pixels cannot be read, among 6\.png to 8\.png: .*'7\.png'"):
        encode_images(source, Pooling(), tmp_path, shard_size=3, batch_size=3, progress=False)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "latents-00000.safetensors",
        "latents-00001.safetensors",
    ]
    source.load = real
    assert encode_images(source, Pooling(), tmp_path, shard_size=3, batch_size=3, progress=False).num_items == 13


def test_a_second_encoder_of_one_folder_is_refused(tmp_path, source):
    """While it is at work; a process that died holds nothing."""

    class Meanwhile(Pooling):
        said = None

        def encode(self, images):
            if self.said is None:
                with pytest.raises(
                    ValueError, match=r"Another process is encoding into .*choose another folder"
                ) as found:
                    encode_images(source, Pooling(), tmp_path, progress=False)
                self.said = found.value
            return super().encode(images)

    autoencoder = Meanwhile()
    encode_images(source, autoencoder, tmp_path, progress=False)
    assert autoencoder.said is not None
    encode_images(source, Pooling(), tmp_path, progress=False)


def test_a_finished_cache_is_opened_by_many_at_once(tmp_path, source):
    """Runs that start together with the same cache: none is taken for an encoder."""
    import fcntl

    encode_images(source, Pooling(), tmp_path, progress=False)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert encode_images(source, Pooling(), tmp_path, progress=False).num_items == 13
    finally:
        os.close(descriptor)


def test_a_mixture_of_two_encoders_is_found_without_locks(tmp_path, source, monkeypatch):
    """On a file system without locks: whose shards were replaced refuses to call that a cache."""
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)

    class Meanwhile(Pooling):
        def encode(self, images):
            if self.calls == 1:  # the first shard stands: another encoder puts its own in its place
                other = Pooling()
                other.fingerprint = "ba9876543210"
                with pytest.raises(ValueError, match="fingerprint="):
                    encode_images(source, other, tmp_path / "a", shard_size=7, progress=False)
                encode_images(source, other, tmp_path / "b", shard_size=7, progress=False)
                (tmp_path / "b" / "latents-00000.safetensors").replace(tmp_path / "a" / "latents-00000.safetensors")
            return super().encode(images)

    with pytest.raises(ValueError, match="holds latents with fingerprint='ba9876543210'"):
        encode_images(source, Meanwhile(), tmp_path / "a", shard_size=7, progress=False)
    assert not (tmp_path / "a" / "stats.json").exists()


def test_a_disk_that_does_not_keep_what_is_written_is_named(tmp_path, source, monkeypatch):
    real = os.pwrite

    def forgets(descriptor, data, offset):
        data = bytearray(data)
        data[-1] ^= 1 if len(data) == 2 * 3 * 4 * 4 * 4 else 0  # two means
        return real(descriptor, data, offset)

    monkeypatch.setattr(shards.os, "pwrite", forgets)
    with pytest.raises(OSError, match=r"latents-00000\.safetensors was written, but is not whole: check the disk"):
        encode_images(source, Pooling(), tmp_path, batch_size=2, progress=False)


@pytest.mark.parametrize("finished", [True, False])
def test_a_flipped_bit_is_found_and_that_shard_made_again(tmp_path, source, finished):
    """Also in a folder that was never finished, where no statistics have a checksum of the file."""
    encode_images(source, Pooling(), tmp_path, shard_size=4, progress=False)
    whole, path = files_of(tmp_path), tmp_path / "latents-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 8
    path.write_bytes(content)
    if not finished:
        (tmp_path / "stats.json").unlink()
    autoencoder = Pooling()
    encode_images(source, autoencoder, tmp_path, shard_size=4, progress=False)
    assert autoencoder.calls == 1
    assert files_of(tmp_path) == whole


def test_a_shard_of_before_checksums_is_held_against_the_statistics(tmp_path, source):
    from safetensors.torch import load_file, save_file

    encode_images(source, Pooling(), tmp_path, shard_size=4, progress=False)
    path = tmp_path / "latents-00001.safetensors"
    header = shards.read_header(path)
    save_file(load_file(path), path, metadata={"lfm_fast": json.dumps(header)})  # other bytes, none of them wrong
    autoencoder = Pooling()
    encode_images(source, autoencoder, tmp_path, shard_size=4, progress=False)
    assert autoencoder.calls == 1


def test_an_interrupted_repair_is_no_cache(tmp_path, source):
    """While a shard is made again the statistics are away: nobody takes the old ones for those of the new shard."""
    encode_images(source, Pooling(), tmp_path, shard_size=4, progress=False)
    (tmp_path / "latents-00001.safetensors").unlink()

    class Killed(Pooling):
        def encode(self, images):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_images(source, Killed(), tmp_path, shard_size=4, progress=False)
    with pytest.raises(ValueError, match=r"no stats\.json"):
        LatentCache.open(tmp_path)
    assert encode_images(source, Pooling(), tmp_path, shard_size=4, progress=False).num_items == 13


def test_pictures_of_another_decoder_are_refused_and_older_shards_are_of_any(tmp_path, capsys):
    """They differ by rounding; a cache is of one of them."""
    (tmp_path / "a").mkdir()
    for k in range(5):
        Image.fromarray(np.full((16, 16, 3), 40 * k, np.uint8)).save(tmp_path / "a" / f"{k}.png")

    def encode(decoder):
        images = open_images(tmp_path / "a", 8, decoder=decoder)
        assert FirstImages(images, 3).decoded_by == decoder
        return encode_images(images, Pooling(), tmp_path / "cache", shard_size=2, progress=False)

    assert encode("pil").provenance["decoder"] == "pil"
    for whole in (True, False):
        with pytest.raises(ValueError, match="holds latents with decoder='pil', but decoder='auto' is asked for"):
            encode("auto")
        if whole:
            assert main(["info", str(tmp_path / "cache")]) == 0
            assert capsys.readouterr().out.splitlines()[3].endswith(", decoder pil")
            (tmp_path / "cache" / "latents-00001.safetensors").unlink()
    assert encode("pil").num_items == 5
    without_headers_of(tmp_path / "cache", "decoder")
    assert encode("auto").provenance["decoder"] == "auto"
    assert "decoder" not in encode_images(Pixels(), Pooling(), tmp_path / "b", progress=False).provenance


def without_headers_of(folder, *names):
    """Make the shards, and no statistics, as they were before headers said these."""
    (folder / "stats.json").unlink()
    for path in folder.iterdir():
        header = {name: value for name, value in shards.read_header(path).items() if name not in names}
        save_file(load_file(path), path, metadata={"lfm_fast": json.dumps(header)})


def test_old_headers_without_crop_and_precision_are_of_the_ones_there_were(tmp_path, source):
    encode_images(source, Pooling(), tmp_path, shard_size=4, progress=False)
    without_headers_of(tmp_path, "crop", "precision")
    autoencoder = Pooling()
    cache = encode_images(source, autoencoder, tmp_path, shard_size=4, progress=False)
    assert (autoencoder.calls, cache.num_items) == (0, 13)
    source.crop = "random"
    with pytest.raises(ValueError, match=r"crop='centre', but crop='random' is asked for"):
        encode_images(source, autoencoder, tmp_path, shard_size=4, progress=False)
    autoencoder.dtype, source.crop = torch.bfloat16, "centre"
    with pytest.raises(ValueError, match=r"precision='fp32', but precision='bf16'"):
        encode_images(source, autoencoder, tmp_path, shard_size=4, progress=False)

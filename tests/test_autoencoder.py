"""The autoencoder wrapper against diffusers itself, and the embedded VAE against images it never saw."""

import http.server
import math
import resource
import socket
import threading
import warnings

import pytest
import torch

from lfm_fast import autoencoder
from lfm_fast.autoencoder import EMBEDDED_FOLDER, WEIGHTS_FILE, Autoencoder, Posterior, SmallVAE, load_autoencoder
from lfm_fast.data import open_images
from lfm_fast.data.latents import CachedLatents
from lfm_fast.train.source import FirstImages


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory):
    """A tiny AutoencoderKL with random weights, saved by diffusers."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    folder = tmp_path_factory.mktemp("saved") / "vae"
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def embedded():
    return load_autoencoder("embedded")


def test_wraps_diffusers(kl_folder, images):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(kl_folder).eval()
    ours = load_autoencoder(kl_folder)
    with torch.no_grad():
        distribution = theirs.encode(images).latent_dist
        decoded = theirs.decode(distribution.mean).sample.clamp(-1, 1)
    posterior = ours.encode(images)
    torch.testing.assert_close(posterior.mean, distribution.mean * 0.18215)
    torch.testing.assert_close(torch.exp(0.5 * posterior.log_variance), distribution.std * 0.18215)
    # one multiplication and one division by the scaling factor in float32 on the way
    torch.testing.assert_close(ours.decode(posterior.mode()), decoded, atol=1e-5, rtol=1e-5)
    assert (ours.downsampling, ours.latent_channels, ours.scaling_factor) == (2, 4, 0.18215)


def test_a_shift_is_taken_off_and_given_back(images):
    """z_0 = (latent - shift_factor) * scaling_factor, as diffusers' pipelines of such VAEs have it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    shape = {"block_out_channels": [32, 32], "norm_num_groups": 8, "latent_channels": 4}
    theirs = AutoencoderKL(**blocks, **shape, scaling_factor=1.5, shift_factor=0.6).eval()
    ours = Autoencoder(theirs, "shifted")
    latent = theirs.encode(images).latent_dist
    found = ours.encode(images)
    torch.testing.assert_close(found.mean, (latent.mean - 0.6) * 1.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.log_variance.exp(), latent.var * 1.5**2, rtol=1e-3, atol=1e-6)
    decoded = theirs.decode(latent.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(ours.decode(found.mean), decoded, rtol=1e-4, atol=1e-5)


STATISTICS = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [2.0, 0.5, 1.0, 4.0]}


def test_statistics_of_each_channel_are_taken_off_and_given_back(images, tmp_path):
    """z_0 = (latent - latents_mean) scaling_factor / latents_std, as diffusers' pipelines of such VAEs have it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    shape = {"block_out_channels": [32, 32], "norm_num_groups": 8, "latent_channels": 4}
    theirs = AutoencoderKL(**blocks, **shape, scaling_factor=0.5, **STATISTICS).eval()
    latent = theirs.encode(images).latent_dist
    mean, std = (torch.tensor(STATISTICS[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    plain = Autoencoder(AutoencoderKL(**blocks, **shape, scaling_factor=0.5).eval(), "plain")
    plain.network.load_state_dict(theirs.state_dict())
    Autoencoder(theirs, "x").save_pretrained(tmp_path / "vae")
    first = Autoencoder(theirs, "x")
    for ours in (first, load_autoencoder(tmp_path / "vae"), first.optimized("fp32")):
        found = ours.encode(images)
        torch.testing.assert_close(found.mean, (latent.mean - mean) * 0.5 / std, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.log_variance.exp(), latent.var * (0.5 / std) ** 2, rtol=1e-3, atol=1e-6)
        decoded = theirs.decode(latent.mean).sample.clamp(-1, 1)
        torch.testing.assert_close(ours.decode(found.mean), decoded, rtol=1e-4, atol=1e-5)
        assert ours.fingerprint != plain.fingerprint  # the same weights, but latents in another unit


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"latents_std": None},
            r"latents_mean \[0.5, -1.0, 0.0, 2.0\] and latents_std None; expected 4 numbers",
        ),
        ({"latents_mean": None}, "latents_mean None and"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "expected 4 numbers in each"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, "those of latents_std above 0"),
        ({"latents_mean": [0.0, 0.0, 0.0, float("nan")]}, "expected 4 numbers"),
        ({"latents_mean": "abcd"}, "expected 4 numbers"),
        ({"latents_std": 2.0}, "expected 4 numbers"),
        ({"shift_factor": 0.1}, "latents_mean or latents_std beside a shift_factor; leave one out"),
    ],
)
def test_statistics_that_cannot_be_are_refused(change, says):
    network = SmallVAE(block_out_channels=(16, 32))
    network.config |= STATISTICS | change
    with pytest.raises(ValueError, match=says):
        Autoencoder(network, "x")


def test_finds_the_vae_below_a_pipeline_folder(kl_folder, images):
    above, direct = load_autoencoder(kl_folder.parent), load_autoencoder(kl_folder)
    assert torch.equal(above.encode(images).mean, direct.encode(images).mean)
    assert above.fingerprint == direct.fingerprint


def test_fingerprint_tells_weights_apart(kl_folder):
    autoencoder = load_autoencoder(kl_folder)
    before = autoencoder.fingerprint
    with torch.no_grad():
        next(autoencoder.network.parameters()).view(-1)[0] += 1e-3
    assert autoencoder.fingerprint != before


def test_posterior_noise_belongs_to_the_sample_number():
    mean, log_variance = torch.zeros(4, 2, 3, 3), torch.full((4, 2, 3, 3), math.log(4.0))
    index = torch.tensor([7, 2**40, 9, 11])
    together = Posterior(mean, log_variance).sample(index, seed=3)
    alone = Posterior(mean[:1], log_variance[:1]).sample(index[1:2], seed=3)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together, Posterior(mean, log_variance).sample(index, seed=4))


def test_posterior_sample_has_the_posterior_s_moments():
    count = 4096
    mean, log_variance = torch.full((count, 1, 2, 2), 3.0), torch.full((count, 1, 2, 2), math.log(0.25))
    drawn = Posterior(mean, log_variance).sample(torch.arange(count), seed=0)
    # 16,384 draws of standard deviation 0.5: five standard errors of mean and of standard deviation
    assert drawn.mean().item() == pytest.approx(3.0, abs=5 * 0.5 / 128)
    assert drawn.std().item() == pytest.approx(0.5, abs=5 * 0.5 / 181)


def test_small_vae_survives_saving(tmp_path, images):
    torch.manual_seed(0)
    network = SmallVAE(block_out_channels=(16, 32), scaling_factor=0.5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.half().float())  # what float16 files keep
    before = Autoencoder(network, "before")
    before.save_pretrained(tmp_path)
    after = load_autoencoder(tmp_path)
    assert torch.equal(before.encode(images).mean, after.encode(images).mean)
    assert after.fingerprint == before.fingerprint
    assert after.scaling_factor == 0.5


def test_embedded_reconstructs_held_out_images(embedded):
    held_out = open_images("embedded", 64, split="held_out")
    images = held_out.batch(range(len(held_out))).float() / 127.5 - 1
    posterior = embedded.encode(images)
    squared = ((embedded.decode(posterior.mode()) - images) / 2).square().mean((1, 2, 3))
    psnr = -10 * torch.log10(squared)
    assert psnr.mean() > 32  # measured.json beside the weights says what it is; 29.7 dB was reached in a first attempt
    assert 0.9 < posterior.mean.std() < 1.1, "latents must be near unit variance for the flow"
    assert posterior.mean.mean().abs() < 0.3


def test_embedded_files_are_small():
    assert (EMBEDDED_FOLDER / "vae" / WEIGHTS_FILE).stat().st_size <= 4 * 2**20


@pytest.mark.parametrize(
    ("shape", "says"),
    [((3, 64, 64), r"takes \(B, 3, H, W\)"), ((1, 1, 64, 64), "takes"), ((1, 3, 62, 64), "multiples of 4")],
)
def test_encode_refuses_wrong_shapes(embedded, shape, says):
    with pytest.raises(ValueError, match=says):
        embedded.encode(torch.zeros(shape))


def test_decode_refuses_wrong_channels(embedded):
    with pytest.raises(ValueError, match=r"decodes \(B, 4, h, w\)"):
        embedded.decode(torch.zeros(1, 3, 16, 16))


def test_missing_places_get_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not exist"):
        load_autoencoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="does not load as a diffusers AutoencoderKL"):
        load_autoencoder(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="put both into one folder"):
        load_autoencoder("nobody/no-such-vae")


def test_a_hub_out_of_reach_is_said_at_once_and_alone(monkeypatch, tmp_path, capfd):
    """The hub's client tries six times in half a minute, with two lines for each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"  # bound, and nobody listens
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nobody)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        asked, load = [], autoencoder._load_diffusers

        def ask(name, **options):
            asked.append(options)
            return load(name, **options)

        monkeypatch.setattr(autoencoder, "_load_diffusers", ask)
        with pytest.raises(ValueError, match=r"nor reachable on the hub; download its config\.json"):
            load_autoencoder("nobody/no-such-vae")
    assert asked == [{"local_files_only": True}], "what was downloaded before serves without the hub"
    assert capfd.readouterr() == ("", "")


def test_whatever_a_server_answers_it_is_there():
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *_):
            """Not into the tests' output."""

    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        autoencoder._require_answer(f"http://127.0.0.1:{server.server_port}")
        thread.join()


def test_missing_weights_are_not_filled_with_random_ones(kl_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = {k: v for k, v in load_file(kl_folder / WEIGHTS_FILE).items() if not k.startswith("decoder.mid")}
    save_file(weights, tmp_path / WEIGHTS_FILE)
    (tmp_path / "config.json").write_text((kl_folder / "config.json").read_text())
    with pytest.raises(ValueError, match="missing or do not fit"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("config", ["{}", "[1]", '{"block_out_channels": 3}', "{"])
def test_odd_configuration_gets_a_sentence(kl_folder, tmp_path, config):
    (tmp_path / WEIGHTS_FILE).write_bytes((kl_folder / WEIGHTS_FILE).read_bytes())
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"does not load|is no JSON"):
        load_autoencoder(tmp_path)


def test_damaged_small_vae_gets_a_sentence(tmp_path):
    SmallVAE(block_out_channels=(16, 32)).save_pretrained(tmp_path)
    weights = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_autoencoder(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=WEIGHTS_FILE):
        load_autoencoder(tmp_path)


def test_weights_that_cannot_be_written_are_one_sentence(tmp_path):
    autoencoder, limits = load_autoencoder("embedded"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*vae: .*File too large"):
            autoencoder.save_pretrained(tmp_path / "vae")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "vae" / "config.json").exists()


def test_training_from_memory_says_when_latents_are_far_from_unit_variance():
    images = FirstImages(open_images("embedded", 64, split="held_out"), 20)
    autoencoder = load_autoencoder("embedded")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CachedLatents.from_images(images, autoencoder)
    autoencoder.scaling_factor *= 10
    with pytest.warns(UserWarning, match=r"far from unit variance.*scaling_factor"):
        CachedLatents.from_images(images, autoencoder)

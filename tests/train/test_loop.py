import errno
import json
import math
import re
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import SETTINGS, TinyAutoencoder, TinySource, flags

import lfm_fast
from lfm_fast.autoencoder import Autoencoder, SmallVAE
from lfm_fast.data import open_images
from lfm_fast.data.latents import CachedLatents, EncodedImages
from lfm_fast.data.resident import ResidentLatents
from lfm_fast.distributed import World
from lfm_fast.models import DiT, checkpointing, create_model, num_parameters
from lfm_fast.train import loop, report, source
from lfm_fast.train.config import from_preset, parse_args
from lfm_fast.train.journal import Journal, _append, read_metrics
from lfm_fast.train.loop import resolve_precision, train
from lfm_fast.train.samples import grid_labels, sample_grid
from lfm_fast.train.source import FirstImages, check_source, open_source, resolve_labels


def settings(folder, **changes):
    return from_preset(**{**SETTINGS, "output": str(folder), **changes})


# --- a run ---


def test_the_loss_falls(tmp_path):
    config = settings(tmp_path, steps=200, learning_rate=3e-3, log_every=20, checkpoint_every=200)
    lines = read_metrics(train(config, TinySource()))
    losses = [line["loss"] for line in lines]
    assert [line["step"] for line in lines] == list(range(20, 201, 20))
    # data of variance 1 and noise of variance 1: predicting the mean velocity, 0, costs 2; this must be far below
    assert losses[0] > 1.7
    assert losses[-1] < 1.2


@pytest.mark.parametrize("norm", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_ends_the_run_where_the_loss_still_is(tmp_path, monkeypatch, norm):
    monkeypatch.setattr("lfm_fast.train.step._clip", lambda parameters, largest: (torch.tensor(float(norm)), None))
    with pytest.raises(FloatingPointError, match=rf"no longer finite at step 4 \(loss \d.*, gradient norm {norm}\)"):
        train(settings(tmp_path, log_every=100), TinySource())
    assert not list(tmp_path.glob("*/checkpoints/*"))


def test_metrics_hold_means_and_rates(tmp_path):
    every = read_metrics(train(settings(tmp_path / "every"), TinySource()))
    third = read_metrics(train(settings(tmp_path / "third", log_every=3), TinySource()))
    for k, line in enumerate(third):
        part = every[3 * k : 3 * k + 3]
        assert line["loss"] == pytest.approx(sum(row["loss"] for row in part) / 3, rel=1e-12)
        assert line["grad_norm"] == part[-1]["grad_norm"]
        assert line["epoch"] == line["step"] * 8 / 20
        assert line["images_per_s"] == pytest.approx(8 * line["steps_per_s"])
        assert line["memory_gb"] > 0.01
    assert [line["seconds"] for line in third] == sorted(line["seconds"] for line in third)
    assert third[-1]["seconds"] == pytest.approx(sum(3 / line["steps_per_s"] for line in third))
    assert "mfu" not in third[0]


def test_the_end_of_a_short_run_leaves_a_line_of_metrics(tmp_path):
    folder = train(settings(tmp_path, steps=3, log_every=10), TinySource())
    (line,) = read_metrics(folder)
    assert line["step"] == 3
    assert read_metrics(train(settings(tmp_path / "all", steps=3), TinySource()))[-1]["loss"] != line["loss"] > 0


def test_mfu_is_the_share_of_a_known_ceiling(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "peak_flops", lambda device, precision: 1e9)
    line = read_metrics(train(settings(tmp_path, steps=2), TinySource()))[0]
    flops = create_model(**network(), label_dropout=0.0).flops_per_sample()
    assert line["mfu"] == pytest.approx(line["images_per_s"] * 3 * flops / 1e9)


def network():
    return {"name": "DiT-Tiny", "image_size": 8, "downsampling": 1, "num_classes": 3}


def test_log_lines_say_what_a_person_wants(tmp_path, capfd):
    folder = train(settings(tmp_path, steps=2), TinySource())
    printed = capfd.readouterr().out
    expected = r"step 2/2: loss \d\.\d{4}, steps/s [\d.]+, images/s \d+, data [\d.]+%, memory [\d.]+ GB, left 00:00"
    assert re.search(expected, printed)
    assert (folder / "log.txt").read_text() == printed


def test_grids_are_drawn_at_the_start_every_so_often_and_at_the_end(tmp_path):
    config = settings(tmp_path, steps=7, sample_every=3, samples_per_class=2)
    folder = train(config, TinySource(), TinyAutoencoder())
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "0000000.png",
        "0000003.png",
        "0000006.png",
        "0000007.png",
    ]
    images = [np.asarray(Image.open(path)).astype(int) for path in sorted((folder / "samples").iterdir())]
    # 3 classes in rows of 2 pictures of 16 pixels, 2 pixels apart; captions stand to the left
    assert images[0].shape[0] == 3 * 18 + 2
    assert images[0].shape[1] > 2 * 18 + 2
    # the same noise and labels: early grids of a slowly changing network resemble each other
    assert 0 < np.abs(images[1] - images[2]).mean() < 5


@pytest.mark.parametrize(("path", "sigma"), [("linear", 1.0), ("ve", 50.0)])
def test_grids_begin_from_other_noise_than_training(tmp_path, monkeypatch, path, sigma):
    """At the path's prior. With the run's own seed, picture i would start from the noise of sample i, which the network
    was trained on."""
    began = []
    monkeypatch.setattr(lfm_fast, "sample", lambda model, z_1, **_: began.append(z_1) or z_1)
    config = settings(tmp_path, num_classes=3, samples_per_class=2, path=path)
    state = loop.build_state(config, TinySource(), World())
    sample_grid(state, TinySource(), TinyAutoencoder(), config, loop.training_path(config), World())
    numbers = torch.arange(6)
    expected = lfm_fast.noise(6, (4, 8, 8), seed=config.seed + 1, indices=numbers)
    torch.testing.assert_close(torch.cat(began), sigma * expected, rtol=1e-6, atol=0)  # two roundings of 2^-24
    assert not torch.equal(expected, lfm_fast.noise(6, (4, 8, 8), seed=config.seed, indices=numbers))


def test_rows_of_a_grid():
    config = from_preset(num_classes=4, task="labelled", samples_per_class=3)
    labels, captions = grid_labels(TinySource(), config)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert captions == ["a", "b", "c", "class 3"]
    labels, captions = grid_labels(TinySource(), from_preset(num_classes=1000, samples_per_class=1))
    assert len(labels) == 16
    assert (int(labels[0]), int(labels[-1])) == (0, 937)
    assert grid_labels(TinySource(), from_preset(num_classes=0)) == (None, None)


def test_compiling_keeps_the_names_of_the_weights(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(DiT, "compile", lambda model, part="velocity": compiled.append(part))
    names = {}
    for mode in ("off", "auto", "block", "full"):
        config = settings(tmp_path, compile=mode, num_classes=3)
        names[mode] = list(loop.build_state(config, TinySource(), World()).model.state_dict())
    assert compiled == ["block", "velocity"]
    assert names["off"] == names["block"] == names["full"]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_leaves_the_curve_as_it_is(tmp_path, monkeypatch, mode):
    used, through_blocks = [], checkpointing.through_blocks
    monkeypatch.setattr(checkpointing, "through_blocks", lambda *a: used.append(a[4]) or through_blocks(*a))
    curves = {}
    for name in ("none", mode):
        folder = train(settings(tmp_path / name, steps=3, activation_checkpointing=name), TinySource())
        curves[name] = [(line["loss"], line["grad_norm"]) for line in read_metrics(folder)]
    assert curves["none"] == curves[mode]
    assert used == [mode] * 3


def test_precision_is_chosen_by_the_device(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert resolve_precision("auto", torch.device("cpu")) == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("auto", torch.device("cuda")) == "bf16"
    assert resolve_precision("fp32", torch.device("cuda")) == "fp32"
    with pytest.raises(ValueError, match="CUDA devices only"):
        resolve_precision("tf32", torch.device("cpu"))


def test_metrics_survive_a_disk_that_was_full_for_a_while(tmp_path, monkeypatch, capfd):
    journal, write = Journal(tmp_path), Journal._write_metrics
    journal.metrics(step=1)

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "_write_metrics", full)
    journal.metrics(step=2)
    journal.metrics(step=3)
    monkeypatch.setattr(Journal, "_write_metrics", write)
    journal.metrics(step=4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    said = "Could not write metrics.jsonl: No space left on device. Training goes on.\n"
    assert capfd.readouterr().out == said


# --- a dry run ---


def test_a_line_that_fits_in_part_leaves_nothing_of_itself(tmp_path):
    """As on a disk that fills up in the middle of it: half a line would swallow the next."""
    _append(tmp_path / "metrics.jsonl", "first\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            _append(tmp_path / "metrics.jsonl", "a second line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_text() == "first\n"


def test_a_dry_run_describes_and_stops(tmp_path, capfd):
    config = parse_args(
        ["--preset", "imagenet256-dit-b2", "--dry-run", "--output", str(tmp_path / "results"), "--precision", "bf16"]
    )
    assert train(config) is None
    text = capfd.readouterr().out
    settings_text, rest = text[: text.index("\n}") + 2], text[text.index("\n}") + 2 :]
    assert json.loads(settings_text)["batch_size"] == 1280
    # the published parameter count and FLOPs of a DiT-B/2 with 1000 classes
    assert "130,500,112 parameters" in rest
    assert "138.01 G in training (3 x the forward's 46.00 G)" in rest
    assert "weights 0.52, AdamW 1.04, EMA 0.52, gradients and activations" in rest
    assert ", latents" not in rest[rest.index("memory per rank") :]  # without data there is no table of them
    assert "1000 epochs, 1280 images per step on 1 rank(s)" in rest
    assert not (tmp_path / "results").exists()


def test_steps_of_a_dry_run_with_data():
    config = from_preset("church256-dit-l2", model="DiT-S/8", precision="bf16")
    assert "600 epochs = 750000 steps over 120000 items" in report.describe(config, World(), (4, 32, 32), 120_000)


# --- data ---


@pytest.fixture
def vae(tmp_path):
    """An untrained VAE of 4 x 4 x 4 latents from 8-pixel images, as a folder."""
    torch.manual_seed(0)
    folder = tmp_path / "vae"
    Autoencoder(SmallVAE(block_out_channels=(16, 16)), "tiny").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(path)
    return str(tmp_path / "photos")


def test_a_folder_of_images_trains_to_a_grid_and_a_checkpoint(tmp_path, monkeypatch, photos, vae):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "cache"))
    command = flags(data=photos, autoencoder=vae, image_size=8, output=tmp_path / "results", steps=3, sample_every=3)
    assert loop.main(parse_args([*command, "--flip"])) == 0
    folder = tmp_path / "results" / "000-DiT-Tiny"
    assert (folder / "samples" / "0000003.png").exists()
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 2


def test_photographs_through_the_emoji_autoencoder_are_remarked_upon(tmp_path, photos, vae):
    for autoencoder, remarks in ((vae, 0), ("embedded", 1)):
        said = []
        open_source(settings(tmp_path, data=photos, autoencoder=autoencoder, image_size=8), World(), said.append)
        assert len([line for line in said if "emoji" in line]) == remarks


def test_images_are_encoded_ahead_where_they_fit_and_on_the_fly_where_not(tmp_path, monkeypatch, photos, vae):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "cache"))
    config = settings(tmp_path, data=photos, autoencoder=vae, image_size=8)
    ahead, _ = open_source(config, World())
    monkeypatch.setattr(source, "LARGEST_IN_MEMORY", 6 * 8 * 8 - 1)
    live, _ = open_source(config, World())
    cached, _ = open_source(settings(tmp_path, **{**config_of(config), "cache_latents": str(tmp_path / "c")}), World())
    direct, _ = open_source(settings(tmp_path, **{**config_of(config), "data": str(tmp_path / "c")}), World())
    assert [type(s) for s in (ahead, live, cached, direct)] == [ResidentLatents, EncodedImages] + [ResidentLatents] * 2
    for keep, kind, remarks in (("mapped", CachedLatents, 0), ("device", ResidentLatents, 1)):
        said, settings_of_it = [], {**config_of(config), "data": str(tmp_path / "c"), "keep_latents": keep}
        assert type(open_source(settings(tmp_path, **settings_of_it), World(), said.append)[0]) is kind
        assert len([line for line in said if "a table of 3.1 kB in the memory of cpu" in line]) == remarks
    index = torch.tensor([3, 11, 4])
    z_0, y = ahead.batch(index, 5)
    for other in (live, cached, direct):
        others = other.batch(index, 5)
        torch.testing.assert_close(others[0], z_0, rtol=1e-4, atol=1e-5)  # convolutions over other batches
        assert torch.equal(others[1], y)


def config_of(config):
    return {"data": config.data, "autoencoder": config.autoencoder, "image_size": config.image_size}


def test_the_first_images_alone(tmp_path, monkeypatch, photos, vae):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "cache"))
    config = settings(tmp_path, data=photos, autoencoder=vae, image_size=8, max_items=4)
    found, _ = open_source(config, World())
    assert found.num_items == 4
    images = FirstImages(open_images(photos, 8), 4)
    assert images.names == ["a/0.png", "a/2.png", "a/4.png", "b/1.png"]
    assert images.batch([0, 3]).shape == (2, 3, 8, 8)
    assert torch.equal(images.labels, torch.tensor([0, 0, 0, 1]))


FAULTS = [
    ({"data": "NOWHERE"}, "NOWHERE"),
    ({"data": "EMPTY"}, "EMPTY"),
    ({"num_classes": 1}, "num_classes is 1, but .* has 2 classes"),
    ({"image_size": 7}, "7 is not a multiple of 2|image_size=7"),
    ({"image_size": 64}, "photos"),
    ({"guidance_scale": 2.0, "label_dropout": 0.0}, "without label dropout"),
    ({"autoencoder": "./no-such-vae"}, "no-such-vae"),
    ({"model": "DiT-Q/2"}, "DiT-Q/2"),
    ({"max_items": 3, "data": "CACHE"}, "a latent cache is used whole"),
    ({"cache_latents": "OTHER", "data": "CACHE"}, "is a latent cache already; leave --cache-latents out"),
    ({"data": ""}, "--data is empty"),
    ({"output": ""}, "--output is empty"),
    ({"cache_latents": ""}, "--cache-latents is empty"),
    ({"autoencoder": ""}, "--autoencoder is empty"),
    ({"image_size": 6, "model": "DiT-Tiny"}, "patch_size 2"),
    ({"autoencoder": "EMPTY"}, "holds no config.json"),
    ({"autoencoder": "LIST"}, "no VAE's config.json"),
    ({"autoencoder": "KINDS"}, "no VAE's config.json"),
    ({"autoencoder": "KEYS"}, "no VAE's config.json"),
]
CONFIGS = {"LIST": "[1]", "KINDS": '{"latent_channels": "4", "block_out_channels": 3}', "KEYS": "{}"}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(("changes", "sentence"), FAULTS)
def test_a_fault_of_the_data_is_one_sentence_and_status_2(
    tmp_path, monkeypatch, capfd, photos, vae, changes, sentence, dry_run
):
    """A dry run refuses what a real one does."""
    for name, text in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "EMPTY").mkdir()
    base = {
        "data": photos,
        "autoencoder": vae,
        "image_size": 8,
        "output": str(tmp_path / "results"),
        "task": "labelled",
    }
    if changes.get("data") == "CACHE":
        open_source(settings(tmp_path, **base, cache_latents=str(tmp_path / "CACHE")), World())
    changes = {k: str(tmp_path / v) if str(v).isupper() else v for k, v in changes.items()}
    capfd.readouterr()
    assert loop.main(settings(tmp_path, **{**base, **changes}, dry_run=dry_run)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(sentence, lines[0])
    assert not (tmp_path / "results").exists()


def test_a_preset_without_data_asks_for_it():
    with pytest.raises(ValueError, match="give --data FOLDER"):
        open_source(from_preset("celeba256-dit-l2"), World())


@pytest.mark.parametrize(
    ("task", "asked", "in_data", "expected"),
    [
        (None, None, 9, ("labelled", 9)),
        (None, None, 1, ("unconditional", 0)),
        (None, 12, 9, ("labelled", 12)),
        (None, 0, 9, ("unconditional", 0)),
        ("unconditional", None, 9, ("unconditional", 0)),
        ("labelled", None, 1, ("labelled", 1)),
    ],
)
def test_labels_come_from_the_data_unless_the_settings_say(task, asked, in_data, expected):
    config = resolve_labels(from_preset(task=task, num_classes=asked), in_data)
    assert (config.task, config.num_classes) == expected
    assert config.label_dropout == (0.1 if config.task == "labelled" else 0.0)


def test_labels_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="has no labels"):
        resolve_labels(from_preset(task="labelled"), 0)


def test_latents_that_are_not_square_are_refused(tmp_path):
    class Wide(TinySource):
        latent_shape = (4, 8, 16)

    with pytest.raises(ValueError, match=r"\(4, 8, 16\)"):
        check_source(settings(tmp_path), Wide(), World())


def test_parameters_of_the_embedded_network_are_few():
    """It must train in minutes on two cores and ship in a package of a few megabytes."""
    model = create_model(from_preset().model, image_size=64, downsampling=4, num_classes=9, label_dropout=0.1)
    assert num_parameters(model) < 1e7
    assert math.isfinite(sum(float(p.detach().sum()) for p in model.parameters()))

"""Training from archives: the same curve as from a folder, and label maps that come with a data set."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from lfm_fast.cli import main
from lfm_fast.models import NETWORKS, DiT

SMALL = [
    "--model",
    "DiT-Layouts",
    "--image-size",
    "32",
    "--autoencoder",
    "embedded",
    "--batch-size",
    "4",
    "--steps",
    "3",
]
SMALL += ["--precision", "fp32", "--sample-every", "0", "--log-every", "1", "--device", "cpu", "--compile", "off"]


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setitem(
        NETWORKS, "DiT-Layouts", (DiT, {"hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4})
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path / "user"))


def losses(output):
    """What every line of the run's journal says but of time."""
    (journal,) = output.glob("*/metrics.jsonl")
    return [json.loads(line)["loss"] for line in journal.read_text().splitlines()]


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Latent channels")
def test_the_curve_is_the_same_whatever_form_the_pictures_lie_in(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in range(10)]
    (tmp_path / "folder").mkdir()
    with (
        lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 24, sync=False) as environment,
        environment.begin(write=True) as writes,
        tarfile.open(tmp_path / "a.tar", "w") as tar,
    ):
        for k, pixels in enumerate(pictures):
            (tmp_path / "folder" / f"{k}.png").write_bytes(encoded(pixels))
            writes.put(b"%d" % k, pixels.tobytes())
            member = tarfile.TarInfo(f"{k}.png")
            member.size = len(encoded(pixels))
            tar.addfile(member, io.BytesIO(encoded(pixels)))
    curves = {}
    for data in ("folder", "lmdb", "a.tar"):
        command = ["train", "--data", str(tmp_path / data), "--output", str(tmp_path / f"run-{data}"), "--flip"]
        assert main([*command, "--task", "unconditional", *SMALL]) == 0
        curves[data] = losses(tmp_path / f"run-{data}")
    assert len(set(curves["folder"])) == 3
    assert curves["lmdb"] == curves["folder"]
    assert curves["a.tar"] == curves["folder"]


@pytest.mark.filterwarnings("ignore:Latent channels")
def test_label_maps_and_palette_come_with_the_data(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for kind, highest in (("images", 256), ("annotations", 151)):
        for k in range(5):
            path = tmp_path / "ade" / kind / "training" / f"ADE_train_{k:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (32, 32, 3) if kind == "images" else (32, 32)
            Image.fromarray(generator.integers(0, highest, shape).astype(np.uint8)).save(path)
    command = [
        "train",
        "--data",
        str(tmp_path / "ade"),
        "--output",
        str(tmp_path / "run"),
        "--task",
        "semantic",
        *SMALL,
    ]
    assert main(command) == 0
    assert len(losses(tmp_path / "run")) == 3
    assert main([*command, "--palette", "celebamask-hq", "--resume", "never"]) == 2
    assert "palette is 'celebamask-hq', but the maps of ade20k train are of 'ade20k'" in capsys.readouterr().err


def test_headers_alone_are_checked_on_request(tmp_path, capsys):
    """A picture cut short is left out of a run, or stops the one that read its header only."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3)).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    for k, picture in enumerate(map(encoded, pixels)):
        (tmp_path / "photos" / f"{k}.png").write_bytes(picture[:-900] if k == 2 else picture)
    train = ["train", "--data", str(tmp_path / "photos"), *SMALL]
    assert main([*train, "--output", str(tmp_path / "whole")]) == 0
    assert "Skipped 1 image (it is damaged or truncated" in capsys.readouterr().out
    assert main([*train, "--check-images", "headers", "--output", str(tmp_path / "headers")]) != 0
    assert "2.png in" in capsys.readouterr().err
    encode = ["encode", "--data", str(tmp_path / "photos"), "--autoencoder", "embedded", "--image-size", "32"]
    assert main([*encode, "--check-images", "headers", "--output", str(tmp_path / "latents")]) != 0
    assert "2.png in" in capsys.readouterr().err

"""The command line: what it writes, what it says, and one sentence for each mistake."""

import pytest
import torch
from PIL import Image

from lfm_fast import __version__
from lfm_fast.cli import main
from lfm_fast.data.latents import LatentCache

FAST = ("--num-steps", "2", "--num-images", "3")


def test_sample_writes_one_grid(tmp_path, capsys):
    output = tmp_path / "new" / "grid.png"
    assert main(["sample", "--class", "smileys & emotion", *FAST, "--output", str(output)]) == 0
    assert Image.open(output).size == (2 * 66 + 2, 2 * 66 + 2)
    assert f"wrote 3 images to {output}" in capsys.readouterr().out


def test_sample_writes_a_folder_and_the_seed_decides(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["sample", *FAST, "--seed", seed, "--output", str(tmp_path / name)]) == 0
    files = {name: [path.read_bytes() for path in sorted((tmp_path / name).glob("*.png"))] for name in "abc"}
    assert len(files["a"]) == 3
    assert Image.open(tmp_path / "a" / "000000.png").size == (64, 64)
    assert files["a"] == files["b"] != files["c"]


def test_a_solver_that_cannot_go_on_ends_with_one_sentence(capsys, tmp_path):
    arguments = ["--method", "dopri5", "--tolerance", "1e-30", "--num-images", "1", "--output", str(tmp_path / "x.png")]
    assert main(["sample", *arguments]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_sample_with_an_adaptive_method_and_tolerance(tmp_path):
    arguments = ["--method", "dopri5", "--tolerance", "0.1", "--num-images", "1", "--output", str(tmp_path / "x.png")]
    assert main(["sample", *arguments]) == 0


def test_encode_writes_a_cache_that_training_reads(tmp_path, capsys):
    for color in ("red", "blue"):
        (tmp_path / "images" / color).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 40), color).save(tmp_path / "images" / color / f"{number}.png")
    (tmp_path / "images" / "red" / "broken.png").write_bytes(b"no image")
    arguments = ["--data", str(tmp_path / "images"), "--image-size", "32", "--autoencoder", "embedded"]
    assert main(["encode", *arguments, "--output", str(tmp_path / "cache")]) == 0
    said = capsys.readouterr().out
    assert "broken.png" in said
    assert "wrote the latents of 4 images" in said
    cache = LatentCache.open(tmp_path / "cache")
    assert (cache.num_items, cache.latent_shape, list(cache.class_names)) == (4, (4, 8, 8), ["blue", "red"])


def test_convert_keeps_what_is_drawn(tmp_path):
    assert main(["convert", "--model", "embedded", "--output", str(tmp_path / "flow")]) == 0
    for model, name in (("embedded", "a.png"), (tmp_path / "flow", "b.png")):
        assert main(["sample", "--model", str(model), "--class", "Flags", *FAST, "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_info_names_version_and_kernels(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert __version__ in said
    assert torch.__version__ in said
    assert "compiled CPU kernels:" in said


def test_train_takes_the_same_flags(capsys):
    assert main(["train", "--dry-run"]) == 0
    assert "embedded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sample", "--class", "Nothing"], "there is no class 'Nothing'"),
        (["sample", "--class", "9"], "knows 0 to 8"),
        (["sample", "--num-images", "0"], "from 1 on"),
        (["sample", "--model", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["sample", "--output", "grid.jpg"], "must end in .png"),
        (["sample", "--output", ""], "--output is empty"),
        (["sample", "--output", "/dev/null/y.png"], "cannot be written"),
        (["sample", "--device", "foo"], "--device foo is not here"),
        (["sample", "--device", "cuda:99"], "--device cuda:99 is not here"),
        (["encode", "--data", "embedded", "--output", "cache", "--autoencoder", "nope"], "'nope' does not exist"),
        (["sample", "--method", "newton"], "method is 'newton'"),
        (["encode", "--data", "nowhere", "--output", "cache", "--autoencoder", "embedded"], "nowhere"),
    ],
)
def test_mistakes_end_with_one_sentence(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert says in said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is written after a mistake"


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["paint"])
    assert stop.value.code == 2
    assert "invalid choice: 'paint'" in capsys.readouterr().err

"""The command line: what it writes, what it says, and one sentence for each mistake."""

import contextlib
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import lfm_fast
from lfm_fast import __version__, pictures
from lfm_fast.cli import main
from lfm_fast.data.latent_cache import LatentCache

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


@pytest.mark.parametrize(
    ("arguments", "guidance"),
    [
        (["--guidance", "apg", "--guidance-scale", "3"], lambda: lfm_fast.guidance.APG(3.0)),
        (["--guidance", "cfg-zero"], lambda: lfm_fast.guidance.CFGZeroStar(2.0)),  # the flow's own scale
        (["--guidance-interval", "0.2", "0.6"], lambda: lfm_fast.guidance.LinearGuidance(2.0, (0.2, 0.6))),
    ],
)
def test_sample_with_guidance_by_name(arguments, guidance, tmp_path):
    more = ["--num-images", "2", "--num-steps", "4", "--class", "0", "--output", str(tmp_path / "grid.png")]
    assert main(["sample", *more, *arguments]) == 0
    flow = lfm_fast.LatentFlow.from_pretrained("embedded")
    expected = flow.sample(2, y=0, num_steps=4, guidance=guidance())
    pictures.save(pictures.grid(expected), tmp_path / "expected.png")
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    pictures.save(pictures.grid(flow.sample(2, y=0, num_steps=4)), tmp_path / "plain.png")
    assert (tmp_path / "grid.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


def test_a_solver_that_cannot_go_on_ends_with_one_sentence(capsys, tmp_path):
    arguments = ["--method", "dopri5", "--tolerance", "1e-30", "--num-images", "1", "--output", str(tmp_path / "x.png")]
    assert main(["sample", *arguments]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_sample_with_an_adaptive_method_and_tolerance(tmp_path):
    arguments = ["--method", "dopri5", "--tolerance", "0.1", "--num-images", "1", "--output", str(tmp_path / "x.png")]
    assert main(["sample", *arguments]) == 0


def test_sample_with_a_time_grid_by_name_and_by_file(tmp_path):
    (tmp_path / "times.json").write_text('{"times": [1.0, 0.75, 0.5, 0.25, 0.0]}')  # as ("shift", 1) has them
    files = {}
    for name, grid in (("a", "shift:1"), ("b", str(tmp_path / "times.json")), ("c", "quadratic")):
        steps = [] if grid.endswith(".json") else ["--num-steps", "4"]
        arguments = ["--num-images", "1", "--method", "euler", "--time-grid", grid, *steps]
        assert main(["sample", *arguments, "--output", str(tmp_path / f"{name}.png")]) == 0
        files[name] = (tmp_path / f"{name}.png").read_bytes()
    assert files["a"] == files["b"] != files["c"]


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
    assert main(["info", str(tmp_path / "cache"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "4 images in 2 classes, latents (4, 8, 8)" in said
    assert f"fingerprint {cache.provenance['fingerprint']}" in said
    copy = ["--data", str(tmp_path / "cache"), "--image-size", "32", "--autoencoder", "embedded", "--dtype", "bf16"]
    assert main(["encode", *copy, "--output", str(tmp_path / "copy")]) == 0
    assert "wrote 4 latents" in capsys.readouterr().out
    assert LatentCache.open(tmp_path / "copy").dtype == torch.bfloat16
    for flag in (["--flip"], ["--store", "samples"], ["--precision", "fp32"]):
        assert main(["encode", *copy, *flag, "--output", str(tmp_path / "other")]) == 2
        assert f"{flag[0]} is of encoding images" in capsys.readouterr().err
    assert main(["encode", *arguments, "--store", "samples", "--seed", "1", "--output", str(tmp_path / "cache")]) == 2
    assert "store='posterior', but store='samples' is asked for" in capsys.readouterr().err
    assert main(["encode", *arguments, "--precision", "bf16", "--output", str(tmp_path / "cache")]) == 2
    assert "precision='fp32', but precision='bf16' is asked for" in capsys.readouterr().err


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
    backend = lfm_fast.ops.explain("philox_normal").backend
    assert re.search(rf"^  {backend} runs .*philox_normal", said, re.MULTILINE)


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
        (["sample", "--guidance-scale", "2"], "give --class too"),
        (["sample", "--guidance", "apg"], "--guidance guides towards a class; give --class too"),
        (["sample", "--class", "0", "--guidance-interval", "0.8", "0.2"], "with 0 <= low <= high <= 1"),
        (["sample", "--tolerance", "0.1"], "heun takes fixed steps; give --num-steps"),
        (["sample", "--method", "dopri5", "--num-steps", "4"], "dopri5 chooses its own; give --tolerance"),
        (["sample", "--method", "dopri5", "--time-grid", "karras"], "--time-grid is for fixed-step solvers"),
        (["sample", "--time-grid", "cosine"], "time_grid is 'cosine'"),
        (["sample", "--time-grid", "shift:x"], "expected a number after shift:"),
        (["sample", "--time-grid", "nowhere.json"], "nowhere.json cannot be read"),
        (["sample", "--time-grid", "nowhere.json", "--num-steps", "4"], "which holds its own times"),
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


@pytest.mark.parametrize(
    "arguments", [["convert", "--model", "embedded"], ["encode", "--data", "embedded", "--autoencoder", "embedded"]]
)
def test_an_empty_output_is_not_the_current_folder(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--output", ""])
    assert stop.value.code == 2
    assert "argument --output: it is empty; give a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sample", "tune-grid", "encode", "convert", "info"])
def test_help_says_what_a_command_is_for_and_what_each_flag_means(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out.split("options:")
    assert len(said[0].split("\n\n")) > 2, "a usage and nothing else"
    entries = re.split(r"\n  (?=-)", said[1])[1:]
    flags = re.compile(r"-+[\w-]+( [A-Z_]+|,| \{[^}]*\})?\s*")
    assert [entry for entry in entries if not re.sub(r"\s", "", flags.sub("", entry))] == []


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["paint"])
    assert stop.value.code == 2
    assert "invalid choice: 'paint'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--model", "nowhere"],
        ["encode", "--data", "nowhere", "--autoencoder", "embedded"],
        ["convert", "--model", "nowhere"],
        ["train", "--data", "nowhere"],
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([*arguments, "--output", "file/folder"]) == 2
    assert capsys.readouterr().err.endswith("--output file/folder cannot be written; choose another place\n")


def test_a_table_that_a_folder_stands_in_the_way_of_is_refused_before_the_fit(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("lfm_fast.tuning.tune_grid", lambda *_, **__: pytest.fail("minutes of work began"))
    (tmp_path / "times.json").mkdir()
    assert main(["tune-grid", "--output", str(tmp_path / "times.json")]) == 2
    assert capsys.readouterr().err.endswith("times.json is a folder; choose another place\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "dopri5", "--reuse", "0.05"], "--reuse is for fixed-step solvers, and dopri5"),
        (["--time-grid", "step:0.5", "--num-steps", "7"], "--num-steps is not for step:0.5"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_any_work(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("lfm_fast.approximations.compare", lambda *_, **__: pytest.fail("a solve began"))
    assert main(["sample", "--num-images", "1", *arguments, "--output", str(tmp_path / "x.png")]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_missing_images_are_said_before_a_download(capsys, tmp_path):
    assert main(["encode", "--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "cache")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--num-images", "16", "--num-steps", "1", "--output", "out.png"],
        ["convert", "--model", "embedded", "--output", "out"],
        ["encode", "--data", "images", "--image-size", "64", "--autoencoder", "embedded", "--output", "out"],
    ],
)
def test_a_full_disk_is_one_sentence_and_spares_what_was_there(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save("images/a.png")
    (tmp_path / "out.png").write_bytes(b"an earlier picture")
    for limit in (4096, 4_000_000):  # bytes a file may have: of the VAE's weights, too, the second time
        with smaller_files(limit):
            status = main(arguments)
        if status == 0:
            break
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "cannot write out" in line] == said[-1:]
        assert (tmp_path / "out.png").read_bytes() == b"an earlier picture"
    assert not list(tmp_path.glob("**/*.partial"))


@contextlib.contextmanager
def smaller_files(limit):
    """Writing beyond `limit` bytes fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "command", [["-m", "lfm_fast.cli", "sample"], ["-m", "lfm_fast.cli", "train"], ["train_fast.py"]]
)
def test_an_interrupt_while_modules_are_imported_is_one_sentence(command):
    """torch is replaced by a module that Ctrl-C meets on its way in."""
    root = Path(lfm_fast.__file__).parent.parent
    program = "import runpy, sys; sys.meta_path.insert(0, type('Interrupted', (), {'find_spec': lambda name, *_: "
    program += "exec('raise KeyboardInterrupt') if name == 'torch' else None})); sys.argv = sys.argv[1:]; "
    program += (
        "runpy.run_module(sys.argv.pop(1), run_name='__main__')"
        if command[0] == "-m"
        else ("runpy.run_path(sys.argv[0], run_name='__main__')")
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", program, *command], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 130
    assert done.stderr.endswith("interrupted\n")
    assert done.stderr.count("\n") == 1

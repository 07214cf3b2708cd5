"""A flow is trained to inpaint, paints and is measured, by commands alone; and the one that ships paints as well."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lfm_fast import LatentFlow
from lfm_fast.cli import main

SMALL = ("--max-items", "8", "--batch-size", "4", "--steps", "2", "--log-every", "1", "--samples-per-class", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    flags = ("--preset", "emoji-inpainting", "--device", "cpu", "--output", str(folder))
    assert main(["train", *flags, *SMALL]) == 0
    (run,) = folder.iterdir()
    return run


@pytest.fixture
def files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    mask = np.zeros((70, 90), np.uint8)
    mask[20:50, 30:60] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path, ("--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png"))


def test_grids_show_what_is_given_and_what_it_was(run):
    """Six rows: the image with its hole, one sample, the image."""
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["0000000.png", "0000002.png"]
    picture = Image.open(run / "samples" / "0000002.png")
    assert picture.size == (3 * 66 + 2, 6 * 66 + 2)
    tiles = np.array(picture)[2:, 2:].reshape(6, 66, 3, 66, 3).transpose(0, 2, 1, 3, 4)[:, :, :64, :64]
    for given, drawn, truth in tiles:
        known = (given == truth).all(-1)
        assert 0.2 < known.mean() < 1  # the smallest hole has 5 %, and some of its pixels may be grey
        assert np.array_equal(drawn[known & (given != 128).any(-1)], truth[known & (given != 128).any(-1)])


def test_a_run_remembers_its_task(run):
    flow = LatentFlow.from_pretrained(run)
    assert flow.task == {"name": "inpainting", "masks": "mixed", "share": [0.05, 0.75]}
    assert (flow.model.in_channels, flow.model.out_channels) == (9, 4)


def test_a_run_begins_as_the_flow_that_ships(run, capsys, tmp_path):
    """After two steps of warm-up at 2e-5 and 4e-5 each weight is within 6e-5 of where it began, or of 0 where new."""
    assert "from the weights of embedded" in (run / "log.txt").read_text()
    ours, theirs = (LatentFlow.from_pretrained(source).model for source in (run, "embedded"))
    weights, before = ours.x_embedder.proj.weight, theirs.x_embedder.proj.weight
    torch.testing.assert_close(weights[:, :4], before, atol=1e-4, rtol=0)
    assert 0 < weights[:, 4:].abs().max() < 1e-4
    flags = ("--preset", "emoji-inpainting", "--device", "cpu", "--output", str(tmp_path), *SMALL)
    assert main(["train", *flags, "--model", "DiT-Emoji/4"]) == 2
    assert "cannot begin" in capsys.readouterr().err
    assert main(["train", *flags, "--path", "vp"]) == 2
    assert "train on the same path" in capsys.readouterr().err


@pytest.mark.parametrize("fit", ["resize", "tile"])
def test_holes_of_files_are_painted(run, files, fit):
    folder, given = files
    flags = ("--num-images", "2", "--num-steps", "2", "--fit", fit, "--output", str(folder / "painted"))
    assert main(["sample", "--model", str(run), *given, *flags]) == 0
    image, mask = (np.array(Image.open(folder / name)) for name in ("image.png", "mask.png"))
    for name in ("000000.png", "000001.png"):
        painted = np.array(Image.open(folder / "painted" / name))
        assert np.array_equal(painted[mask == 0], image[mask == 0])
        assert not np.array_equal(painted[mask > 0], image[mask > 0])


def test_the_flow_that_ships_paints_too(files):
    folder, given = files
    flags = ("--num-images", "1", "--num-steps", "2", "--class", "Flags", "--output", str(folder / "painted.png"))
    assert main(["sample", *given, *flags]) == 0
    assert Image.open(folder / "painted.png").size == (94, 74)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--mask", "mask.png"), "--mask belongs to --image"),
        (("--image", "image.png"), "--image needs --mask"),
        (("--approach", "project"), "--approach belongs to --image"),
        (("--fit", "tile"), "--fit belongs to --image"),
        (("--image", "image.png", "--mask", "mask.png", "--reuse", "0.1"), "--reuse is not for --image"),
        (("--image", "image.png", "--label-map", "map.png"), "--image and --label-map belong to different tasks"),
        (("--image", "image.png", "--mask", "no.png"), "mask no.png cannot be used: it cannot be opened"),
        (("--image", "no.png", "--mask", "mask.png"), "image no.png cannot be used: it cannot be opened"),
        (("--image", "image.png", "--mask", "mask.png", "--approach", "condition"), "was not trained to inpaint"),
        (("--image", "image.png", "--mask", "mask.png", "--fit", "refuse"), "70x90 pixels and the flow 64x64"),
    ],
)
def test_mistakes_end_in_a_sentence(files, flags, sentence, capsys, monkeypatch):
    monkeypatch.chdir(files[0])
    assert main(["sample", *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_run_that_is_not_told_what_to_paint_says_which_flags_do(run, capsys, tmp_path):
    assert main(["sample", "--model", str(run), "--output", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err == "lfm-fast sample: this flow is of task inpainting; give --image and --mask\n"


def test_a_plain_flow_is_not_measured_without_a_task(capsys):
    assert main(["evaluate", "--model", "embedded"]) == 2
    assert "give --task inpainting, which any flow does" in capsys.readouterr().err


def test_held_out_images_are_shown(run, tmp_path):
    """Rows of the given image, samples with what is known of it, the image, and the nearest of training."""
    show_task = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "show_task.py"))
    show_task["show"](run, tmp_path / "grid.png", rows=2, samples=2, nearest=True, scale=1, num_steps=1)
    picture = np.array(Image.open(tmp_path / "grid.png"))[-(2 * 66) :, 2:]
    for row in picture.reshape(2, 66, 5, 66, 3).transpose(0, 2, 1, 3, 4)[:, :, :64, :64]:
        given, *drawn, truth, _ = row
        known = (given == truth).all(-1) & (given != 128).any(-1)
        assert all(np.array_equal(image[known], truth[known]) for image in drawn)
        assert not np.array_equal(drawn[0], drawn[1])


def test_a_run_on_a_folder_shows_its_own_images(tmp_path, capsys, monkeypatch):
    """A folder is trained on whole; what cannot be shown is said in a sentence."""
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 50, 200)).save(tmp_path / "photos" / f"{number}.png")
    flags = ("--data", str(tmp_path / "photos"), "--sample-every", "0", "--output", str(tmp_path / "runs"))
    assert main(["train", "--preset", "emoji-inpainting", "--device", "cpu", *flags, *SMALL, "--batch-size", "2"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    show_task = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "show_task.py"))
    show_task["show"](run, tmp_path / "grid.png", rows=2, samples=1, scale=1, num_steps=1)
    assert Image.open(tmp_path / "grid.png").width == 3 * 66 + 2
    monkeypatch.setattr("sys.argv", ["show_task.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit):
        show_task["main"]()
    assert "this is no run folder" in capsys.readouterr().err


def test_figures_are_printed_and_written(run, tmp_path, capsys):
    file = tmp_path / "figures.json"
    flags = ("--num-images", "4", "--num-steps", "2", "--output", str(file))
    assert main(["evaluate", "--model", str(run), *flags]) == 0
    figures = json.loads(file.read_text())
    assert figures["images"] == 4
    assert {"psnr", "seam", "mean colour: psnr", "another image: psnr", "truth: seam"} <= set(figures)
    assert "mean colour: psnr: " in capsys.readouterr().out
    assert main(["evaluate", "--model", "embedded", "--task", "inpainting", *flags]) == 0
    straight_on = json.loads(file.read_text())["psnr"]
    resampled = ("--approach", "project:resample")
    assert main(["evaluate", "--model", "embedded", "--task", "inpainting", *flags, *resampled]) == 0
    assert json.loads(file.read_text())["psnr"] != straight_on
    assert main(["evaluate", "--model", "embedded", "--task", "layout", *flags, *resampled]) == 2
    assert "--approach is of task inpainting" in capsys.readouterr().err

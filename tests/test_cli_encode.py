"""Who encodes and makes a mistake is told so in one sentence; nothing that was asked for is passed over."""

import pytest
from PIL import Image

from lfm_fast.cli import main
from lfm_fast.data.latent_cache import LatentCache

TO = ["--image-size", "16", "--autoencoder", "embedded", "--output"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a folder of images in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.linear_gradient("L").resize((16, 16)).rotate(90 * number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def refused(arguments, capsys) -> str:
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "command", [["encode", *TO, "out", "--data"], ["evaluate", "--model", "x", "--data"], ["info"]]
)
def test_an_empty_name_is_not_the_current_folder(command, capsys, place):
    assert "it is empty; give a name or a path" in refused([*command, ""], capsys)
    assert not (place / "out").exists()


def test_latents_do_not_go_among_the_images_that_they_are_of(capsys, place):
    for output in ("images", "images/../images"):
        says = refused(["encode", "--data", "images", *TO, output], capsys)
        assert says == f"lfm-fast encode: --output {output} is where --data lies; choose another folder"
    assert len(list((place / "images").iterdir())) == 4


def test_a_compat_that_would_change_nothing_is_refused(capsys, place):
    says = refused(["encode", "--data", "images", "--compat", "lfm", *TO, "out"], capsys)
    assert says.endswith("--compat is for LSUN, and images is read as folder; leave it out, or give --from")
    assert not (place / "out").exists()


@pytest.mark.filterwarnings("ignore:Latent channels")
def test_what_copied_latents_cannot_be_is_refused(capsys, place):
    assert main(["encode", "--data", "images", *TO, "cache"]) == 0
    flags = (("--split", "all"), ("--compat", "lfm"), ("--decoder", "pil"))
    for flag, value in flags:
        says = refused(["encode", "--data", "cache", flag, value, *TO, "copy"], capsys)
        assert says.startswith(f"lfm-fast encode: {flag} is of encoding images, but cache holds latents")
    assert not (place / "copy").exists()


@pytest.mark.filterwarnings("ignore:Latent channels")
def test_latents_that_are_not_all_there_are_no_folder_without_images(capsys, place):
    assert main(["encode", "--data", "images", *TO, "cache"]) == 0
    (place / "cache" / "stats.json").unlink()  # it is written last
    again = "encoding was interrupted; encode again and it goes on where it stopped."
    assert refused(["encode", "--data", "cache", *TO, "copy"], capsys).endswith(again)
    assert refused(["train", "--data", "cache", "--autoencoder", "embedded", "--output", "runs"], capsys).endswith(
        again
    )
    assert main(["encode", "--data", "images", *TO, "cache"]) == 0
    assert LatentCache.open(place / "cache").num_items == 4


@pytest.mark.filterwarnings("always:Latent channels")
def test_a_warning_is_a_sentence_and_no_line_of_code(capsys, place):
    for number in range(4):
        Image.new("RGB", (16, 16), "red").save(place / "images" / f"{number}.png")
    assert main(["encode", "--data", "images", *TO, "cache"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "unit variance" in line]
    assert len(said) == 1
    assert said[0].startswith("lfm-fast encode: Latent channels")


def test_a_wrong_layout_is_said_of_its_flag(capsys):
    assert "error: --from is 'tfrecord'; there is folder" in refused(["train", "--from", "tfrecord"], capsys)


def test_a_folder_of_runs_names_one(capsys, place):
    (place / "runs" / "000-DiT" / "checkpoints").mkdir(parents=True)
    assert refused(["sample", "--model", "runs"], capsys).endswith("runs lie in it: give runs/000-DiT")

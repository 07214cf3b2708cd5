"""--precision of `lfm-fast encode` and `sample`: what computes, what is written, and what is refused."""

import pytest
import torch
from PIL import Image

from lfm_fast.cli import main
from lfm_fast.data.latent_cache import LatentCache

ENCODE = ("--image-size", "32", "--autoencoder", "embedded")
SAMPLE = ("--num-steps", "2", "--num-images", "2")


def test_latents_are_encoded_in_the_precision_asked_for_and_say_so(tmp_path):
    (tmp_path / "images").mkdir()
    for name, color in (("a", "red"), ("b", "green")):
        Image.linear_gradient("L").convert("RGB").save(tmp_path / "images" / f"{name}.png")
        Image.new("RGB", (40, 40), color).save(tmp_path / "images" / f"{name}{color}.png")
    found = {}
    for precision in ("fp32", "bf16"):
        arguments = ["encode", "--data", str(tmp_path / "images"), *ENCODE, "--precision", precision]
        assert main([*arguments, "--output", str(tmp_path / precision)]) == 0
        cache = LatentCache.open(tmp_path / precision)
        assert cache.provenance["precision"] == precision
        found[precision] = cache.read(torch.arange(4))[0]
    apart = (found["bf16"] - found["fp32"]).norm() / found["fp32"].norm()
    assert 1e-4 < apart < 5e-2  # roundings to 8 bits, through fifteen layers


def test_samples_in_another_precision_are_the_same_pictures_but_for_rounding(tmp_path):
    pictures = {}
    for name, arguments in (("plain", ()), ("fp32", ("--precision", "fp32")), ("bf16", ("--precision", "bf16"))):
        assert main(["sample", *SAMPLE, *arguments, "--output", str(tmp_path / f"{name}.png")]) == 0
        pixels = Image.open(tmp_path / f"{name}.png").convert("RGB").tobytes()
        pictures[name] = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).float()
    assert (pictures["fp32"] - pictures["plain"]).abs().max() <= 1  # a pixel at the edge of two numbers
    assert 0 < (pictures["bf16"] - pictures["plain"]).abs().mean() < 4


@pytest.mark.parametrize(
    ("precision", "says"),
    [("fp16", "use bf16 or fp32 on a CPU"), ("tf32", "precision tf32 exists on CUDA devices only")],
)
def test_a_precision_that_a_cpu_does_not_have_is_one_sentence(precision, says, tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    arguments = ["encode", "--data", str(tmp_path), *ENCODE, "--device", "cpu", "--precision", precision]
    assert main([*arguments, "--output", str(tmp_path / "cache")]) == 2
    assert says in capsys.readouterr().err

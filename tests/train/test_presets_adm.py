"""The presets of the paper's ADM rows: their networks are the released ones, and a dry run describes each."""

import json
import math
from pathlib import Path

import pytest

from lfm_fast.distributed import World
from lfm_fast.train import memory, report
from lfm_fast.train.config import from_preset, parse_args
from lfm_fast.train.loop import train

MANIFESTS = {
    "celeba256-adm": "celeb256_adm",
    "ffhq256-adm": "ffhq_adm",
    "bedroom256-adm": "ffhq_adm",  # one manifest serves both
    "church256-adm": "church_adm",
    "imagenet256-adm": "imnet_adm",
    "celeba512-adm": "celeb512_adm",
    "celeba1024-adm": None,  # of which none is there
    "celeba256-inpainting": "inpainting",
    "celeba256-semantic": "semantic",
}
OF_THE_ENCODER = {"celeba256-semantic": 19 * 4}  # classes of CelebAMask-HQ, channels each becomes


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_dry_run_describes_the_released_network(name, monkeypatch):
    """But for the step on tensors without storage, which takes seconds and is the same for all."""
    monkeypatch.setattr(memory, "of_step", lambda *_: memory.StepMemory(0, 0, 0))
    config = from_preset(name)
    side = config.image_size // 8
    text = report.describe(config, World(), (4, side, side), 1000)
    assert f"network: {config.model}, latents 4x{side}x{side}, " in text
    steps = math.ceil(config.epochs * 1000 / config.batch_size)
    assert f"length: {config.epochs:g} epochs = {steps} steps over 1000 items" in text
    if MANIFESTS[name]:
        path = Path(__file__).parents[1] / "golden" / f"{MANIFESTS[name]}.json"
        parameters = json.loads(path.read_text())["params"] + OF_THE_ENCODER.get(name, 0)
        assert f"{parameters:,} parameters" in text


def test_a_dry_run_of_the_command_counts_the_step_too(tmp_path, capfd):
    output = ["--output", str(tmp_path / "results"), "--precision", "bf16"]
    assert train(parse_args(["--preset", "celeba256-adm", "--dry-run", *output])) is None
    said = capfd.readouterr().out
    assert "153,099,524 parameters" in said
    assert "weights 0.61, AdamW 1.22, EMA 0.61, gradients and activations" in said
    assert not (tmp_path / "results").exists()

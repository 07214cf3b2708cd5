"""Networks of convolutions in the training loop: steps, checkpoints, going on, and what comes out as a flow."""

import pytest
import torch
from tiny_run import SETTINGS, TinyAutoencoder, TinySource

import lfm_fast
from lfm_fast.models import ADM, NETWORKS, SongUNet, UNet
from lfm_fast.train import loop
from lfm_fast.train.config import TrainConfig, from_preset
from lfm_fast.train.journal import read_metrics
from lfm_fast.train.loop import train
from lfm_fast.train.resume import read_verified

SIZES = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
TINY = {
    "adm-tiny": (ADM, SIZES),
    "unet-tiny": (UNet, {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_sides": [4]}),
    "ncsn-tiny": (SongUNet, {**NETWORKS["ncsn++"][1], **SIZES}),
}


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in TINY.items():
        monkeypatch.setitem(NETWORKS, name, network)


def settings(folder, **changes):
    return from_preset(**{**SETTINGS, "label_dropout": 0.3, "output": str(folder), **changes})


def losses(folder):
    return [line["loss"] for line in read_metrics(folder)]


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("adm-tiny", {"precision": "bf16"}),
        ("unet-tiny", {"precision": "bf16", "activation_checkpointing": "full"}),
        ("ncsn-tiny", {"activation_checkpointing": "selective"}),
    ],
)
def test_a_run_goes_on_to_the_bit_and_gives_a_flow(tmp_path, model, changes):
    changes |= {"model": model, "steps": 8, "checkpoint_every": 4}
    whole = train(settings(tmp_path / "whole", **changes), TinySource(), TinyAutoencoder())
    begun = train(settings(tmp_path / "parts", **{**changes, "steps": 4}), TinySource(), TinyAutoencoder())
    again = train(settings(tmp_path / "parts", **changes, resume=str(begun)), TinySource(), TinyAutoencoder())
    assert losses(again)[-4:] == losses(whole)[-4:]
    checkpoints = (folder / "checkpoints" / "0000008.safetensors" for folder in (again, whole))
    found, expected = map(lfm_fast.load_checkpoint, checkpoints)
    assert type(found) is TINY[model][0]
    for one, other in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    last, _ = read_verified(again / "checkpoints" / "0000008.safetensors")
    for name, buffer in found.named_buffers():  # frequencies are drawn once, and belong to the weights
        assert torch.equal(buffer, last[f"model.{name}"])
    flow = lfm_fast.LatentFlow(found, TinyAutoencoder())
    sampling = {"y": torch.tensor([0, 2]), "guidance_scale": 2.0, "method": "euler", "num_steps": 2}
    pictures = flow.sample(2, **sampling)
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures.isfinite().all()
    assert not torch.equal(pictures, flow.sample(2, **{**sampling, "y": torch.tensor([1, 1])}))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("adm-orginal", "did you mean adm-original"),
        ("ADM-Emoji-layout", "looks at a context, which task layout alone brings"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_network_that_cannot_be_is_refused_before_images_are_read(tmp_path, monkeypatch, model, says, dry_run):
    def reads(*arguments, **settings):
        raise AssertionError("images are read")

    monkeypatch.setattr(loop, "open_source", reads)
    monkeypatch.setattr(loop, "facts", reads)
    config = TrainConfig(
        data="embedded", steps=1, model=model, device="cpu", output=str(tmp_path / "runs"), dry_run=dry_run
    )
    with pytest.raises(ValueError, match=says):
        loop.train(config)
    assert not any(tmp_path.iterdir())

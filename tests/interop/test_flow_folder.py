"""The folder of a flow names the class of its network, whatever family it is of, and gives it back."""

import json

import pytest
import torch

import lfm_fast
from lfm_fast import LatentFlow
from lfm_fast.autoencoder import Autoencoder, SmallVAE
from lfm_fast.interop.folder import read_network
from lfm_fast.models import FAMILIES, create_model, from_config
from lfm_fast.models.conditioned import ENCODERS

SMALL = {"image_size": 64, "model_channels": 32, "channel_mult": [1, 2]}
GUIDED = {**SMALL, "num_res_blocks": 1, "attention_resolutions": [2]}
SAVED = [
    ("DiT-S/2", {"image_size": 64, "hidden_size": 32, "depth": 1, "num_heads": 2}, "transformer", "DiT"),
    ("adm", {**SMALL, "num_blocks": 1, "num_classes": 3, "label_dropout": 0.1}, "unet", "ADM"),
    ("ddpm++", {**SMALL, "num_blocks": 1}, "unet", "SongUNet"),
    ("ncsn++", {**SMALL, "num_blocks": 1}, "unet", "SongUNet"),
    ("adm-original", {**GUIDED, "in_channels": 9, "out_channels": 4}, "unet", "UNet"),
    ("adm-layout", {**GUIDED, "context_dim": 8}, "unet", "LayoutUNet"),
]


def flow_of(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return LatentFlow(model.eval(), Autoencoder(SmallVAE(block_out_channels=(16, 32)), "tiny"))


def check(model, again):
    assert type(again) is type(model)
    assert again.config == model.config
    theirs = again.state_dict()
    assert list(theirs) == list(model.state_dict())
    assert all(torch.equal(theirs[name], x) for name, x in model.state_dict().items())  # buffers of noise among them


@pytest.mark.parametrize(("name", "sizes", "folder", "kind"), SAVED, ids=[name for name, *_ in SAVED])
def test_every_family_is_saved_under_its_class(tmp_path, name, sizes, folder, kind):
    model = create_model(name, **sizes)
    flow_of(model).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index[folder] == ["lfm_fast", kind]
    assert getattr(lfm_fast, kind) is type(model)  # where diffusers looks for it
    config = json.loads((tmp_path / folder / "config.json").read_text())
    assert config.pop("_class_name") == kind
    assert config == model.config
    assert {path.name for path in tmp_path.iterdir()} == {"model_index.json", folder, "vae"}
    check(model, LatentFlow.from_pretrained(tmp_path).model)


@pytest.mark.parametrize("inside", ["DiT-S/2", "adm-layout"])
def test_a_network_with_its_encoder_is_one_component(tmp_path, inside, monkeypatch):
    class Encoder(torch.nn.Module):
        kind, argument = "sums", "condition"

        def __init__(self, *, width):
            super().__init__()
            self.config, self.weight = {"width": width}, torch.nn.Parameter(torch.randn(width))

    monkeypatch.setitem(ENCODERS, "sums", Encoder)
    sizes = next(sizes for name, sizes, *_ in SAVED if name == inside)
    network = create_model(inside, **{**sizes, "in_channels": 6, "out_channels": 4})
    encoder = {"kind": "sums", "width": 5}
    model = from_config({"family": "conditioned", "network": network.config, "encoder": encoder})
    flow_of(model).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer" if inside == "DiT-S/2" else "unet"] == ["lfm_fast", "Conditioned"]
    check(model, LatentFlow.from_pretrained(tmp_path).model)


def test_every_class_of_network_stands_at_the_top_of_the_package():
    assert [kind.__name__ for kind in FAMILIES.values() if getattr(lfm_fast, kind.__name__, None) is not kind] == []


def test_half_precision_halves_weights_and_leaves_whole_numbers(tmp_path):
    model = create_model("DiT-S/2", **SAVED[0][1])
    model.register_buffer("steps", torch.tensor([2049]))  # which float16 does not have
    flow_of(model).save_pretrained(tmp_path, dtype=torch.float16)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert saved["pos_embed"].dtype == torch.float16
    assert saved["steps"].tolist() == [2049]


def test_a_folder_without_its_network_is_said_to_be_incomplete(tmp_path):
    flow_of(create_model("adm-original", **GUIDED)).save_pretrained(tmp_path)
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no file .*unet.config\.json; the folder is incomplete"):
        read_network(tmp_path, {"unet": ["lfm_fast", "UNet"]})

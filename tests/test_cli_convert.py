"""`lfm-fast convert` between projects: the same pictures, and one sentence for each mistake."""

import json

import pytest
import torch

import lfm_fast
from lfm_fast import LatentFlow
from lfm_fast.autoencoder import Autoencoder, SmallVAE
from lfm_fast.cli import main
from lfm_fast.flow.paths import Linear, VariancePreserving
from lfm_fast.interop.dit import DiTVelocity
from lfm_fast.interop.sit import turned
from lfm_fast.models import NETWORKS, DiT

SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2}


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    monkeypatch.setitem(NETWORKS, "DiT-Tiny", (DiT, SIZES))


def network(**settings):
    torch.manual_seed(0)
    model = DiT(image_size=8, **SIZES, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(0)
    Autoencoder(SmallVAE(block_out_channels=(16, 32)), "tiny").save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def pictures(place, vae, **settings):
    flow = LatentFlow.from_pretrained(place, vae)
    return flow.sample(2, method="heun", num_steps=3, **settings)


@pytest.mark.parametrize("to", ["lfm_fast", "diffusers", "lfm"])
def test_there_and_back_draws_the_same(tmp_path, vae, to, capsys):
    """Weights are copied; a DiTTransformer2DModel has queries, keys and values apart, and they come together again."""
    model = network()
    torch.save(model.state_dict(), tmp_path / "model_475.pth")
    arguments = ["--autoencoder", vae, "--to", to, *(["--epoch", 475] if to == "lfm" else [])]
    assert convert("--model", tmp_path / "model_475.pth", *arguments, "--output", tmp_path / "there") == 0
    written = tmp_path / "there" / ("model_475.pth" if to == "lfm" else "")
    assert capsys.readouterr().out == f"wrote {written}\n"
    assert torch.equal(pictures(tmp_path / "there", vae), pictures(tmp_path / "model_475.pth", vae))
    assert convert("--model", tmp_path / "there", "--to", "lfm", "--output", tmp_path / "back.pth") == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(model.state_dict())
    assert all(torch.equal(back[name], x) for name, x in model.state_dict().items())


def test_a_file_of_sit_is_turned_and_said_to_be(tmp_path, vae, capsys):
    model = network(num_classes=3, label_dropout=0.1)
    torch.save({"model": {}, "ema": turned(model).state_dict()}, tmp_path / "sit.pt")
    told = ["--from", "sit", "--num-classes", 3, "--num-heads", 2, "--autoencoder", vae]
    assert convert("--model", tmp_path / "sit.pt", *told, "--output", tmp_path / "flow") == 0
    assert "note: its time ran from noise to data" in capsys.readouterr().out
    flow = LatentFlow(model, lfm_fast.autoencoder.load_autoencoder(vae), path=Linear())
    settings = {"y": [0, 2], "guidance_scale": 1.5, "method": "heun", "num_steps": 3}
    want, got = flow.sample(2, **settings), LatentFlow.from_pretrained(tmp_path / "flow").sample(2, **settings)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)  # turned twice in float32; the small VAE is in float16


def test_the_autoencoder_beside_a_network_of_diffusers_is_taken(tmp_path, vae, capsys):
    LatentFlow(network(), lfm_fast.autoencoder.load_autoencoder(vae)).save_pretrained(tmp_path, as_diffusers=True)
    (tmp_path / "model_index.json").unlink()  # as any other folder of diffusers
    assert convert("--model", tmp_path, "--from", "diffusers", "--output", tmp_path / "flow") == 0
    assert "2.5e-3" in capsys.readouterr().out
    assert torch.equal(pictures(tmp_path / "flow", vae), pictures(lfms(tmp_path / "again"), vae))


def lfms(folder):
    """The same network in a file of LFM's."""
    lfm_fast.interop.released.save_released(network(), folder)
    return folder


def test_a_network_that_its_weights_do_not_tell_is_named(tmp_path, vae):
    arguments = {"image_size": 64, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "num_heads": 2}
    arguments |= {"use_new_attention_order": True}
    model = lfm_fast.create_model("adm-original", **arguments).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    lfm_fast.interop.released.save_released(model, tmp_path / "exp", epoch=3)
    told = ["--network", "adm-original", "--set", *(f"{k}={str(v).lower()}" for k, v in arguments.items())]
    assert convert("--model", tmp_path / "exp", *told, "--autoencoder", vae, "--output", tmp_path / "flow") == 0
    flow = LatentFlow.from_pretrained(tmp_path / "flow")
    assert flow.model.config == model.config
    t, z = torch.tensor([0.3, 0.8]), torch.randn(2, 4, 8, 8)
    assert torch.equal(flow.model(t, z), model(t, z))
    index = json.loads((tmp_path / "flow" / "model_index.json").read_text())
    assert index["unet"] == ["lfm_fast", "UNet"]
    assert json.loads((tmp_path / "flow" / "unet" / "config.json").read_text())["_class_name"] == "UNet"
    output = tmp_path / "lfm"
    assert convert("--model", tmp_path / "exp", *told, "--to", "lfm", "--output", output) == 0
    assert list(torch.load(output / "model_0.pth", weights_only=True)) == list(model.state_dict())


def of_noise(folder, vae):
    field = DiTVelocity(network(), null_label=0)
    LatentFlow(field, vae, path=field.path).save_pretrained(folder)


def of_another_path(folder, vae):
    LatentFlow(network(), vae, path=VariancePreserving()).save_pretrained(folder)


def of_lfm(folder, vae):
    lfms(folder)


@pytest.mark.parametrize(
    ("make", "arguments", "says"),
    [
        (of_noise, ["--to", "lfm"], "trained on the straight path, and this one on DiscretePath"),
        (of_noise, ["--to", "diffusers"], "without what makes a velocity of another prediction"),
        (of_another_path, ["--to", "lfm"], "and this one on VariancePreserving"),
        (of_lfm, ["--to", "lfm", "--dtype", "fp16"], "--dtype fp16 is not for --to lfm"),
        (of_lfm, ["--to", "lfm", "--epoch", "-1"], "epoch is -1"),
        (of_lfm, ["--epoch", "3"], "--epoch is for --to lfm"),
        (of_lfm, ["--num-heads", "4"], "--num-heads is for other projects' files"),
        (of_lfm, ["--weights", "model"], "--weights is for other projects' files"),
        (of_lfm, ["--set", "num_heads=2"], "--set is for the arguments of --network"),
        (of_lfm, ["--network", "DiT-Tiny", "--set", "num_heads"], "--set num_heads is not NAME=VALUE"),
        (of_lfm, ["--network", "DiT-Tiny", "--set", "heads=2"], "DiT has no argument heads"),
        (of_lfm, ["--network", "DiT-Tiny", "--set", "depth=2", "depth=3"], "--set gives depth twice"),
        (of_lfm, ["--network", "DiT-Tiny", "--from", "sit"], "leave --from or --network out"),
        (of_noise, ["--network", "DiT-Tiny"], "says itself which network it holds; leave model out"),
        (of_lfm, ["--from", "diffusers"], "holds no DiTTransformer2DModel"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(make, arguments, says, tmp_path, vae, capsys):
    make(tmp_path / "model", lfm_fast.autoencoder.load_autoencoder(vae))
    output = tmp_path / "output"
    assert convert("--model", tmp_path / "model", *arguments, "--autoencoder", vae, "--output", output) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not output.exists()

"""Files of LFM, SiT, DiT and diffusers become fields that compute what the networks in them compute."""

import argparse
import re

import pytest
import torch
from plain_dit import plain_dit

import lfm_fast
from lfm_fast import LatentFlow
from lfm_fast.autoencoder import Autoencoder, SmallVAE
from lfm_fast.flow.paths import Linear
from lfm_fast.interop.diffusers import DiffusersVelocity, align, to_diffusers
from lfm_fast.interop.discrete import DiscretePath
from lfm_fast.interop.dit import DiTVelocity
from lfm_fast.interop.files import convert
from lfm_fast.interop.recognise import recognise
from lfm_fast.interop.sit import SiTVelocity, turned
from lfm_fast.models.recognise import dit_from_weights

T, Y = torch.tensor([0.9, 0.3, 0.07], dtype=torch.float64), torch.tensor([0, 2, 3])
Z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROUNDED = {"rtol": 1e-4, "atol": 1e-5}  # float32 weights and sums against float64 ones, through two blocks
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 3,
}


def vae():
    torch.manual_seed(0)
    return Autoencoder(SmallVAE(block_out_channels=(16, 32)), "tiny")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_network_turned_round_is_exact(dtype):
    """Against the network itself at 1 - t: in float64 some thousand roundings of 1e-16, in float32 those of 6e-8."""
    theirs = plain_dit(dtype=dtype, sigmas=False)
    ours = turned(dit_from_weights(theirs.state_dict(), num_heads=2))
    t, z = T.to(dtype), Z.to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(ours(t, z, Y), -theirs(z, 1 - t, Y), rtol=0, atol=tolerance)
    again = turned(ours)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=tolerance)
    with pytest.raises(ValueError, match="not of a Linear"):
        turned(torch.nn.Linear(2, 2))


def training_file(path, theirs, **entries):
    """What the training scripts of DiT and SiT leave: average, weights, optimizer and arguments."""
    other = {name: torch.zeros_like(tensor) for name, tensor in theirs.state_dict().items()}
    content = {"model": other, "ema": theirs.state_dict(), "opt": {"state": {}}, **entries}
    torch.save({"args": argparse.Namespace(model="SiT-XL/2", num_classes=3), **content}, path)


@torch.no_grad()
@pytest.mark.parametrize("sigmas", [True, False])
def test_a_file_of_sit_samples_as_sit_does(tmp_path, sigmas):
    """Its own Euler steps, from noise at s = 0 to data at s = 1, against ours from t = 1 to t = 0."""
    theirs, path = plain_dit(sigmas=sigmas), tmp_path / "0400000.pt"
    training_file(path, theirs)
    found = convert(path, "sit", num_heads=2)
    assert type(found.field) is lfm_fast.DiT
    assert (found.field.num_classes, found.field.null_label) == (3, 3)
    assert any("sigmas" in note for note in found.notes) == sigmas
    assert any("noise to data" in note for note in found.notes)
    x = Z.clone()
    for step in range(4):
        x = x + theirs(x, torch.full((3,), step / 4, dtype=torch.float64), Y)[:, :4] / 4
    z0 = lfm_fast.sample(found.field, Z.float(), y=Y, method="euler", num_steps=4)
    torch.testing.assert_close(z0.double(), x, **ROUNDED)
    assert not convert(path, "sit", num_heads=2, weights="model").field.final_layer.linear.weight.any()


@torch.no_grad()
def test_plain_state_dicts_in_half_precision_and_with_a_prefix(tmp_path):
    theirs = plain_dit(dtype=torch.float32)
    weights = {f"module.{name}": tensor.half() for name, tensor in theirs.state_dict().items()}
    torch.save(weights, tmp_path / "a.pt")
    field = convert(tmp_path / "a.pt", "sit", num_heads=2, num_classes=3).field
    want = SiTVelocity(plain_dit(dtype=torch.float32), null_label=3)
    want.network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    torch.testing.assert_close(field(T.float(), Z.float(), Y), want(T.float(), Z.float(), Y), **ROUNDED)


def same_samples(flow, again):
    settings = {"y": [0, 2], "method": "heun", "num_steps": 3, "guidance_scale": 1.5}
    assert torch.equal(again.sample(2, **settings), flow.sample(2, **settings))


@torch.no_grad()
def test_a_file_of_dit_keeps_its_adapter_when_it_is_saved(tmp_path):
    theirs = plain_dit()
    torch.save(theirs.state_dict(), tmp_path / "DiT.pt")
    found = convert(tmp_path / "DiT.pt", "dit", num_heads=2, num_classes=3)
    want = DiTVelocity(theirs, null_label=3)
    got = found.field(T.float(), Z.float(), Y)
    assert float((got - want(T, Z, Y)).norm() / want(T, Z, Y).norm()) < 1e-4  # float32 rounds angles of 900 by 3e-5
    flow = LatentFlow(found.field, vae(), path=found.field.path)
    flow.save_pretrained(tmp_path / "flow")
    first = LatentFlow.from_pretrained(tmp_path / "flow")  # the small VAE is written in float16
    assert isinstance(first.model, DiTVelocity)
    assert isinstance(first.path, DiscretePath)
    assert torch.equal(first.path.alphas_cumprod, want.path.alphas_cumprod)
    torch.testing.assert_close(first.model(T.float(), Z.float()), found.field(T.float(), Z.float()))
    first.save_pretrained(tmp_path / "again")
    same_samples(first, LatentFlow.from_pretrained(tmp_path / "again"))
    with pytest.raises(ValueError, match="without what makes a velocity of another prediction"):
        first.save_pretrained(tmp_path / "theirs", as_diffusers=True)


def test_a_field_about_a_network_of_another_class_is_not_saved(tmp_path):
    field = DiTVelocity(plain_dit())
    field.network.out_channels = 4
    with pytest.raises(ValueError, match="DiTVelocity of a PlainDiT cannot be saved"):
        LatentFlow(field, vae(), path=field.path).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def network(**settings):
    torch.manual_seed(2)
    model = lfm_fast.DiT(image_size=8, hidden_size=32, depth=2, num_heads=2, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("settings", [{"num_classes": 3, "label_dropout": 0.2}, {"num_classes": 3}, {}])
def test_a_flow_saved_in_diffusers_own_class_comes_back(tmp_path, settings):
    from diffusers import DiTTransformer2DModel

    flow = LatentFlow(network(**settings), vae(), path=Linear(sigma_min=1e-5), sampling={"method": "euler"})
    flow.save_pretrained(tmp_path, as_diffusers=True)
    theirs = align(DiTTransformer2DModel.from_pretrained(tmp_path / "transformer", low_cpu_mem_usage=False))
    t, z, y = T.float(), Z.float(), Y % flow.model.num_labels
    torch.testing.assert_close(theirs(z, timestep=t, class_labels=y).sample, flow.model(t, z, y), **ROUNDED)
    again = LatentFlow.from_pretrained(tmp_path)
    assert again.model.config == flow.model.config
    assert (again.path, again.sampling) == (flow.path, flow.sampling)
    assert all(torch.equal(again.model.state_dict()[name], x) for name, x in flow.model.state_dict().items())


@torch.no_grad()
def test_diffusers_samples_a_converted_network_with_its_own_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, scheduler = network(num_classes=3), FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    transformer, z = to_diffusers(model), Z.float()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    for t in scheduler.timesteps:
        velocity = transformer(z, timestep=t.expand(3), class_labels=Y % 3).sample
        z = scheduler.step(velocity, t, z).prev_sample
    torch.testing.assert_close(z, lfm_fast.sample(model, Z.float(), y=Y % 3, method="euler", num_steps=4), **ROUNDED)


def their_transformer(**settings):
    """One that has come from DiT: the embedders of all its blocks are the same."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(4)
    transformer = DiTTransformer2DModel(**SIZES, **settings).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first = transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return transformer


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_folder_of_diffusers_with_learned_sigmas_and_a_scheduler(tmp_path, prediction):
    from diffusers import DDIMScheduler

    transformer = their_transformer(out_channels=8)
    scheduler = DDIMScheduler(prediction_type=prediction, beta_schedule="scaled_linear")
    transformer.save_pretrained(tmp_path / "transformer")
    scheduler.save_pretrained(tmp_path / "scheduler")
    found = convert(tmp_path, "diffusers")
    assert isinstance(found.field, DiTVelocity)
    assert isinstance(found.field.network, lfm_fast.DiT)
    assert [word for word in ("sigmas", "2.5e-3", "table") if not any(word in note for note in found.notes)] == []
    t, z = T.float(), Z.float()
    want = DiffusersVelocity(align(transformer), scheduler)
    for labels in (Y, None):
        difference = found.field(t, z, labels) - want(t, z, labels)
        assert float(difference.norm() / want(t, z, labels).norm()) < 1e-4  # float32 rounds angles of 900 by 3e-5


@torch.no_grad()
def test_a_folder_of_diffusers_alone_is_one_of_ours(tmp_path):
    model = network(num_classes=3, label_dropout=0.1)
    to_diffusers(model).save_pretrained(tmp_path)
    found = convert(tmp_path, "diffusers")
    assert found.field.config == model.config
    assert all(torch.equal(found.field.state_dict()[name], x) for name, x in model.state_dict().items())
    assert len(found.notes) == 1


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        ({"blocks.0.mlp.w12.weight": (64, 32)}, "a SwiGLU"),
        ({"blocks.1.norm1.weight": (32,), "blocks.1.norm2.weight": (32,)}, r"norms with weights \(RMSNorm\)"),
        ({"feat_rope.freqs_cos": (16, 16)}, "rotary positions"),
        ({"blocks.0.attn.q_norm.bias": (16,)}, "norms of queries and keys with a bias"),
    ],
)  # fmt: skip
def test_what_lightningdit_has_besides_is_named(tmp_path, edit, names):
    weights = {**plain_dit(sigmas=False).state_dict(), **{name: torch.zeros(shape) for name, shape in edit.items()}}
    says = rf"of a DiT with {names}.*as LightningDiT has, which our DiT has not"
    torch.save({"ema": weights, "model": weights}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=says):
        convert(tmp_path / "a.pt", "sit", num_heads=2)
    with pytest.raises(ValueError, match=says):
        dit_from_weights(weights, 2)
    assert recognise(weights).projects == ()
    torch.save(weights, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=says):
        lfm_fast.load_checkpoint(tmp_path / "b.pt")


def test_a_lightningdit_that_is_a_dit_with_normed_heads_is_one_of_ours():
    model = network(num_classes=3, label_dropout=0.1, qk_norm=True)
    again = dit_from_weights(model.state_dict(), num_heads=2)
    torch.testing.assert_close(again(T.float(), Z.float(), Y), model(T.float(), Z.float(), Y), rtol=0, atol=0)


def test_learned_sigmas_alone_show_that_a_file_is_not_lfms(tmp_path):
    torch.save(plain_dit().state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt: these weights are of a DiT with learned sigmas.*convert --from dit"):
        lfm_fast.load_checkpoint(tmp_path / "a.pt")


def test_a_file_of_another_project_is_never_taken_for_lfms(tmp_path):
    """Without learned sigmas nothing else in it tells that its time runs the other way."""
    training_file(tmp_path / "a.pt", plain_dit(sigmas=False, rows=1))
    with pytest.raises(ValueError, match=r"entries 'args', 'model', 'ema', 'opt'.*lfm-fast convert --from sit"):
        lfm_fast.load_checkpoint(tmp_path / "a.pt")
    given = network()  # whoever gives the network says what it is
    assert lfm_fast.load_checkpoint(tmp_path / "a.pt", given) is given


def flow_of_diffusers(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler

    their_transformer().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")


def unet_of_diffusers(folder):
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')


def unknown_scheduler(folder):
    their_transformer().save_pretrained(folder / "transformer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "Nobody"}')


def own_file(folder):
    lfm_fast.checkpoint.save_weights(folder / "w.safetensors", network().state_dict(), {"config": network().config})


@pytest.mark.parametrize(
    ("make", "name", "project", "says"),
    [
        (flow_of_diffusers, "", "diffusers", "its times run to 1000, and ours to 1"),
        (unet_of_diffusers, "", "diffusers", "holds no DiTTransformer2DModel, the one network"),
        (unknown_scheduler, "", "diffusers", "names no scheduler of diffusers, but 'Nobody'"),
        (lambda folder: None, "", "diffusers", "holds no DiTTransformer2DModel"),
        (lambda folder: None, "", "sit", "is a folder"),
        (lambda folder: None, "x.pt", "edm", "project is 'edm', expected one of lfm, sit, dit, diffusers"),
        (own_file, "w.safetensors", "sit", "is a file of lfm_fast's own"),
        (lambda folder: torch.save(plain_dit(depth=5).state_dict(), folder / "a.pt"), "a.pt", "sit", "has 4 rows"),
    ],
)
def test_what_cannot_be_converted_gets_a_sentence(tmp_path, make, name, project, says):
    make(tmp_path)
    with pytest.raises(ValueError, match=re.compile(says)) as caught:
        convert(tmp_path / name, project)
    assert "\n" not in str(caught.value)

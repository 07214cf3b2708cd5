"""Whose weights these are: told where it is certain, asked for where it is not, and never another network's numbers."""

import json
from pathlib import Path

import pytest
import torch
from plain_dit import PlainDiT, plain_dit

import lfm_fast
from lfm_fast.interop.dit import DiTVelocity
from lfm_fast.interop.recognise import from_state_dict, recognise
from lfm_fast.interop.sit import SiTVelocity

GOLDEN = Path(__file__).parents[1] / "golden"
T, Y = torch.tensor([0.9, 0.3, 0.07], dtype=torch.float64), torch.tensor([0, 2, 3])
Z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SIZES = {"image_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}


def manifest(name):
    shapes = json.loads((GOLDEN / f"{name}.json").read_text())["state_shapes"]
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def named(**arguments):
    with torch.device("meta"):
        return PlainDiT(side=32, width=384, depth=12, heads=6, **arguments).state_dict()


@pytest.mark.parametrize(
    ("weights", "projects", "rows", "sigma"),
    [
        (lambda: manifest("celeb256_dit"), ("lfm",), 1, False),
        (lambda: manifest("imnet_dit"), ("lfm", "sit"), 1001, False),
        (lambda: named(rows=1001), ("sit", "dit"), 1001, True),
        (lambda: named(rows=1001, sigmas=False), ("lfm", "sit"), 1001, False),
        (lambda: {f"module.{k}": v for k, v in manifest("celeb256_dit").items()}, ("lfm",), 1, False),
    ],
)
def test_what_keys_and_shapes_tell_of_a_dit(weights, projects, rows, sigma):
    found = recognise(weights())
    assert (found.network, found.projects, found.label_rows, found.learned_sigma) == ("DiT", projects, rows, sigma)
    assert (found.missing == "") == (len(projects) == 1)


def test_networks_that_are_not_built_here_are_named():
    from diffusers import DiTTransformer2DModel, UNet2DModel

    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, norm_num_groups=4, **blocks).state_dict()
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4)
    adm = {key: torch.empty(1) for key in ("time_embed.0.weight", "input_blocks.0.0.weight")}
    adm["middle_block.0.in_layers.0.weight"] = torch.empty(1)
    edm = {key: torch.empty(1) for key in ("map_layer0.weight", "map_layer1.weight", "enc.32x32_conv.weight")}
    for weights, name, says in (
        (unet, "a UNet2DModel of diffusers", "DiffusersVelocity"),
        (transformer.state_dict(), "diffusers' DiTTransformer2DModel", "scheduler"),
        (adm, "guided-diffusion's U-Net", "torchcfm"),
        (edm, "EDM's U-Net", "load_checkpoint takes LFM's, and others are loaded in the class"),
    ):
        found = recognise(weights)
        assert (found.network, found.projects) == (name, ())
        with pytest.raises(ValueError, match=says):
            from_state_dict(weights)


@torch.no_grad()
def test_a_sit_and_a_dit_of_the_same_weights_are_what_their_projects_make_of_them():
    theirs = plain_dit()
    weights = theirs.state_dict()
    sit = from_state_dict(weights, "sit", num_classes=3, num_heads=2)
    torch.testing.assert_close(sit(T, Z, Y), -theirs(Z, 1 - T, Y)[:, :4], rtol=1e-10, atol=1e-10)
    dit = from_state_dict(weights, "dit", num_classes=3, num_heads=2)
    noise = theirs(Z, 1000 * T - 1, Y)[:, :4]
    torch.testing.assert_close(dit(T, Z, Y), dit.path.velocity_from_noise(noise, Z, T), rtol=1e-8, atol=1e-8)
    assert isinstance(dit, DiTVelocity)
    torch.testing.assert_close(sit(T, Z), sit(T, Z, torch.full((3,), 3)))  # the last row is "no label"
    assert sit.null_label == 3
    whole = from_state_dict(weights, "sit", num_classes=4, num_heads=2)
    assert whole.null_label is None
    lfm = plain_dit(sigmas=False, rows=1, order="t, x, y")
    ours = from_state_dict(lfm.state_dict(), num_heads=2)
    torch.testing.assert_close(ours(T, Z), lfm(T, Z, torch.zeros_like(Y)), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", [SiTVelocity, DiTVelocity])
def test_optimize_takes_an_adapter_about_a_network_that_is_a_dit(kind):
    """float32 rounds angles of 900 by 3e-5, in our time features alone; bfloat16 each of some dozen sums by 2^-9."""
    theirs = plain_dit(dtype=torch.float32)
    field = kind(theirs, null_label=3)
    t, z = T.float(), Z.float()
    for precision, most in (("fp32", 1e-4), ("bf16", 4e-2)):
        fast = lfm_fast.optimize(field, precision=precision)
        assert type(fast) is kind
        assert isinstance(fast.network, lfm_fast.DiT)
        error = (fast(t, z, Y) - field(t, z, Y)).norm() / field(t, z, Y).norm()
        assert float(error) < most
    assert isinstance(field.network, PlainDiT)  # what was given is as it was


def test_optimize_takes_a_dit_of_another_class_that_is_called_as_ours():
    theirs = plain_dit(sigmas=False, order="t, x, y", dtype=torch.float32)
    fast = lfm_fast.optimize(theirs, precision="fp32")
    with torch.no_grad():
        torch.testing.assert_close(fast(T.float(), Z.float(), Y), theirs(T.float(), Z.float(), Y), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="wrap it in an adapter"):
        lfm_fast.optimize(plain_dit(sigmas=False, dtype=torch.float32))  # called x, t, y
    with pytest.raises(ValueError, match="wrap it in an adapter"):
        lfm_fast.optimize(plain_dit(order="t, x, y", dtype=torch.float32))  # with sigmas
    with pytest.raises(ValueError, match="training"):
        lfm_fast.optimize(theirs, mode="training")


def test_weights_of_a_dit_that_computes_something_else_are_refused():
    class Other(PlainDiT):
        def forward(self, x, t, y):
            return super().forward(x, t * 1.001, y)

    torch.manual_seed(0)
    other = Other()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(ValueError, match="computes something else"):
        lfm_fast.optimize(SiTVelocity(other.eval(), null_label=3))
    with pytest.raises(ValueError, match="nothing but zeros"):
        lfm_fast.optimize(SiTVelocity(silent()))
    with_more = plain_dit()
    with_more.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="not exactly a DiT's; unexpected: extra"):
        lfm_fast.optimize(SiTVelocity(with_more))
    with pytest.raises(ValueError, match="a function has no weights"):
        lfm_fast.optimize(SiTVelocity(lambda x, t, y: x))
    with pytest.raises(ValueError, match="no DiT's"):
        lfm_fast.optimize(SiTVelocity(torch.nn.Linear(2, 2)))


def silent():
    model = plain_dit(dtype=torch.float32)
    for parameter in model.final_layer["linear"].parameters():
        torch.nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("null_label", [3, 1])
@pytest.mark.parametrize("kind", [SiTVelocity, DiTVelocity])
def test_the_sampling_form_is_used_and_changes_nothing(kind, null_label):
    """Under guidance of some samples, in an interval: tables of modulations at their times, not ours, and of the null
    label, whichever row that is."""
    field = from_state_dict(
        plain_dit().state_dict(), {SiTVelocity: "sit", DiTVelocity: "dit"}[kind], num_classes=3, num_heads=2
    )
    plain = field.around(lambda *arguments: field.network(arguments[1], arguments[0], arguments[2]))
    calls = []
    field.network.register_forward_hook(lambda *_: calls.append(1))  # a hook has to be respected: no sampling form
    assert not field.prepares
    field.network._forward_hooks.clear()
    assert field.prepares
    field.null_label = plain.null_label = null_label
    settings = {"y": Y, "guidance_scale": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), "num_steps": 3}
    settings |= {"guidance_interval": (0.3, 0.8), "method": "heun"}
    named = null_label if null_label == 1 else None
    want = lfm_fast.sample(plain, Z, null_label=named, **settings)
    torch.testing.assert_close(lfm_fast.sample(field, Z, null_label=named, **settings), want)
    assert not calls


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: from_state_dict(named(rows=1001)), "'sit' if it predicts a velocity .* give project='sit' or 'dit'"),
        (lambda: from_state_dict(manifest("imnet_dit")), "time runs from data to noise.*project='lfm' or 'sit'"),
        (lambda: from_state_dict(named(rows=1001), "lfm"), "learned sigmas, which no network of LFM has"),
        (lambda: from_state_dict(named(rows=1001), "edm"), "project is 'edm', expected"),
        (lambda: from_state_dict(named(rows=11), "sit"), "has 11 rows, maybe 10 classes"),
        (lambda: from_state_dict(named(rows=11), "sit", num_classes=9), "num_classes is 9, but the label table has 11"),
        (lambda: from_state_dict(plain_dit(depth=5).state_dict(), "sit", num_classes=3), "give num_heads"),
        (lambda: recognise({"ema": plain_dit().state_dict(), "args": 3}), "'ema' is no tensor; give one of its"),
        (lambda: recognise([1, 2]), "expected a state dict, names and tensors, but this is a list"),
        (lambda: recognise({"w": torch.zeros(1)}), r"no network known here \(their keys begin with w\)"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()

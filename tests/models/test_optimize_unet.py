"""lfm_fast.optimize of U-Nets: the same network, its convolutions on packed weights, or under autocast."""

import copy
import pickle

import pytest
import torch
from test_optimize import error
from test_unet import KINDS, inputs, unet
from torch import nn

import lfm_fast
from lfm_fast import ops
from lfm_fast.models import ADM, SongUNet
from lfm_fast.models.conditioned import ENCODERS, Conditioned
from lfm_fast.models.packed_convolution import PackedConv2d, why_not

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EDM = {"image_size": 8, "model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "num_classes": 5}
OTHERS = {"adm": ADM, "ncsn++": lambda **sizes: SongUNet(**sizes, resample_filter=(1, 3, 3, 1))}
with_onednn = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def network(kind):
    if kind in KINDS:
        return unet(kind)
    torch.manual_seed(0)
    model = OTHERS[kind](**EDM).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "precision"), [("unet", "fp16"), *((kind, p) for kind in (*KINDS, *OTHERS) for p in ("bf16", "fp32"))]
)
def test_the_velocity_is_the_networks_up_to_rounding(kind, precision):
    """Every sample has its own time, label and context; batches of other sizes than the one that is packed for."""
    model, bound = network(kind), {"bf16": 3e-2, "fp16": 4e-3, "fp32": 2e-6}[precision]
    fast = lfm_fast.optimize(model, precision)
    for batch in (1, 3):
        given = inputs(model, batch)
        want = copy.deepcopy(model).double()(**{n: x.double() if n != "y" else x for n, x in given.items()})
        given = {n: x.to(DTYPES[precision]) if n == "context" else x for n, x in given.items()}
        with ops.use_backend("reference"):
            plain = copy.deepcopy(model).to(DTYPES[precision])(**given)
        assert error(fast(**given), want) < bound
        assert error(fast(**given), want) < 1.5 * error(plain, want) + 1e-6


@with_onednn
@torch.no_grad()
def test_the_original_is_left_alone_and_the_state_dict_is_its_own():
    model = unet().train()
    before, given = copy.deepcopy(model.state_dict()), inputs(model)
    fast = lfm_fast.optimize(model)
    fast(**given)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, PackedConv2d) for module in model.modules())
    assert sum(isinstance(module, PackedConv2d) for module in fast.modules()) > 10
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    state = fast.state_dict()
    assert list(state) == list(before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(state[name], value.bfloat16())


@torch.no_grad()
def test_weights_that_are_loaded_or_changed_are_used():
    fast, given = lfm_fast.optimize(unet(), "fp32"), inputs(unet())
    before = fast(**given)
    other = unet()
    for parameter in other.parameters():
        parameter.mul_(1.5)
    expected = other(**given)
    assert error(before, expected) > 0.01
    fast.load_state_dict(other.state_dict())
    assert error(fast(**given), expected) < 2e-6
    fast.out[2].weight.zero_()
    fast.out[2].bias.zero_()
    assert not fast(**given).any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_made_and_called_in_inference_mode(precision):
    model, given = unet(), inputs(unet())
    with torch.inference_mode():
        fast = lfm_fast.optimize(model, precision)
        assert torch.equal(fast(**given), lfm_fast.optimize(model, precision)(**given))
        assert error(fast(**given), model(**given)) < (3e-2 if precision == "bf16" else 2e-6)
        fast.out[2].weight.zero_()
        fast.out[2].bias.zero_()
        assert not fast(**given).any()


@torch.no_grad()
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(again):
    fast, given = lfm_fast.optimize(unet()), inputs(unet())
    expected = fast(**given)
    assert torch.equal(again(fast)(**given), expected)


def test_gradients_through_a_frozen_network():
    """With respect to z, as a guidance may want them: on the plain convolutions."""
    model = unet()
    given = inputs(model)
    found = {}
    for name, network in {"plain": model, "fast": lfm_fast.optimize(model, "fp32")}.items():
        z = given["z"].clone().requires_grad_()
        network(**{**given, "z": z}).square().sum().backward()
        found[name] = z.grad
    assert error(found["fast"], found["plain"]) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_shares_the_parameters(precision):
    model = unet().train()
    fast = lfm_fast.optimize(model, precision, "training")
    assert fast.training
    assert all(p is q for p, q in zip(fast.parameters(), model.parameters(), strict=True))
    velocity = fast(**inputs(model))
    assert velocity.dtype is DTYPES[precision]
    velocity.float().square().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in model.parameters())
    assert error(velocity.detach(), model(**inputs(model)).detach()) < (3e-2 if precision == "bf16" else 1e-6)


@torch.no_grad()
def test_sample_takes_it():
    model = unet()
    z, y = inputs(model)["z"], inputs(model)["y"]
    settings = {"guidance_scale": 2.0, "null_label": 5, "method": "heun", "num_steps": 3}
    expected = lfm_fast.sample(model, z, y=y, **settings)
    assert error(lfm_fast.sample(lfm_fast.optimize(model, "fp32"), z, y=y, **settings), expected) < 1e-5
    assert error(lfm_fast.sample(lfm_fast.optimize(model), z, y=y, **settings), expected) < 3e-2


@pytest.mark.parametrize("precision", ["int8", "fp8", "tf32"])
def test_precisions_of_other_networks_are_refused(precision):
    with pytest.raises(ValueError, match=f"precision {precision} (is for a DiT, and this is a UNet|exists on CUDA)"):
        lfm_fast.optimize(unet(), precision)


class Doubling(nn.Module):
    """(B, 4, H, W) -> a condition of as many channels."""

    kind, argument = "doubling", "condition"

    def __init__(self):
        super().__init__()
        self.config = {}
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, raw):
        return raw * self.weight

    def check(self, raw, count):
        """Takes anything."""


def test_a_network_with_its_encoder(monkeypatch):
    monkeypatch.setitem(ENCODERS, Doubling.kind, Doubling)
    model = Conditioned(network=unet(in_channels=8, out_channels=4), encoder=Doubling()).eval()
    given = inputs(unet())
    given["condition"] = given["z"].flip(0)
    fast = lfm_fast.optimize(model, "fp32")
    with torch.no_grad():
        assert error(fast(**given), model(**given)) < 2e-6
    assert (fast.encoder is model.encoder, fast.encoder.weight.requires_grad) == (False, False)
    trained = lfm_fast.optimize(model, "bf16", "training")
    assert all(p is q for p, q in zip(trained.parameters(), model.parameters(), strict=True))

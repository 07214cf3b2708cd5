"""lfm_fast.optimize: the same network on its fastest path."""

import copy

import pytest
import torch

import lfm_fast
from lfm_fast import _library, ops
from lfm_fast.models.packed import PackedLinear, PackedLinearInt8

NO_TILES = _library.why_no_tiles()
with_tiles = pytest.mark.skipif(NO_TILES is not None, reason=str(NO_TILES))


def network(**arguments):
    """A small DiT without zeros in it: with them it would compute nothing."""
    torch.manual_seed(0)
    arguments = {"num_classes": 5, "label_dropout": 0.1, **arguments}
    model = lfm_fast.create_model("DiT-Emoji/2", image_size=64, **arguments)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def inputs(count=3):
    z = lfm_fast.noise(count, (4, 8, 8), seed=0)
    return torch.linspace(0.1, 0.9, count), z, torch.arange(count) % 5


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def exact(model, t, z, y):
    with torch.no_grad():
        return copy.deepcopy(model).double()(t.double(), z.double(), y)


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 3e-2), ("fp16", 4e-3), ("fp32", 2e-6)])
def test_the_velocity_is_the_networks_up_to_rounding(precision, bound):
    """Every sample has its own time and label. Rounding: 8, 11 or 24 bits, through five blocks; the plain network in
    that precision is as far off."""
    model, (t, z, y) = network(), inputs()
    want = exact(model, t, z, y)
    got = lfm_fast.optimize(model, precision)(t, z, y)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    with torch.no_grad(), ops.use_backend("reference"):
        plain = copy.deepcopy(model).to(dtype)(t, z, y)
    assert error(got, want) < bound
    assert error(got, want) < 1.5 * error(plain, want) + 1e-7


def test_the_original_is_left_alone():
    model = network().train()
    before, (t, z, y) = copy.deepcopy(model.state_dict()), inputs()
    fast = lfm_fast.optimize(model)
    fast(t, z, y)
    assert model.training
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "pos_embed")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())


def test_the_state_dict_in_fp32_is_the_originals():
    model = network()
    state = lfm_fast.optimize(model, "fp32").state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_the_state_dict_is_the_originals_rounded():
    model = network()
    fast = lfm_fast.optimize(model)
    state = fast.state_dict()
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in model.state_dict().items()}
    assert all(torch.equal(value, model.state_dict()[name].bfloat16()) for name, value in state.items())


def test_weights_can_be_loaded_into_it():
    first, second, (t, z, y) = network(), network(), inputs()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.9)
    fast = lfm_fast.optimize(first)
    fast.load_state_dict(second.state_dict())
    assert torch.equal(fast(t, z, y), lfm_fast.optimize(second)(t, z, y))


def test_a_state_dict_of_other_sizes_is_refused():
    fast = lfm_fast.optimize(network())
    with pytest.raises(RuntimeError, match="size mismatch"):
        fast.load_state_dict(network(hidden_size=96, num_heads=3).state_dict())


def test_reference_backend_runs_it_too():
    model, (t, z, y) = network(), inputs()
    fast = lfm_fast.optimize(model)
    with ops.use_backend("reference"):
        assert error(fast(t, z, y), exact(model, t, z, y)) < 3e-2


def test_sampling_takes_it():
    model, (_, z, y) = network(), inputs()
    settings = {"y": y, "guidance_scale": 2.0, "null_label": model.null_label, "method": "heun", "num_steps": 4}
    want = lfm_fast.sample(copy.deepcopy(model).double(), z.double(), **settings)
    got = lfm_fast.sample(lfm_fast.optimize(model), z, **settings)
    plain = lfm_fast.sample(copy.deepcopy(model).bfloat16(), z, **settings)
    assert error(got, want) < 1.5 * error(plain, want)


@with_tiles
def test_every_linear_layer_is_packed_where_there_are_tiles():
    fast = lfm_fast.optimize(network())
    assert not any(isinstance(module, torch.nn.Linear) for module in fast.modules())
    assert sum(isinstance(module, PackedLinear) for module in fast.modules()) == 2 + 5 * 5 + 2


@with_tiles
def test_int8_is_in_the_layers_that_see_every_token():
    fast = lfm_fast.optimize(network(), "int8")
    assert sum(isinstance(module, PackedLinearInt8) for module in fast.modules()) == 5 * 4
    assert sum(type(module) is PackedLinear for module in fast.modules()) == 2 + 5 + 2


@with_tiles
def test_int8_gives_the_velocity_up_to_its_rounding():
    """A network that was trained (the embedded one): 8 bits with a sign for tokens and weights instead of 8 bits for
    each number make three times bfloat16's error, not ten. Where the whole numbers come from does not matter."""
    model = lfm_fast.LatentFlow.from_pretrained("embedded").model
    z = lfm_fast.noise(4, (4, 16, 16), seed=0)
    t, y = torch.linspace(0.1, 0.9, 4), torch.arange(4)
    want, fast = exact(model, t, z, y), lfm_fast.optimize(model, "int8")
    off = error(fast(t, z, y), want)
    assert error(lfm_fast.optimize(model, "bf16")(t, z, y), want) < off < 0.05
    with ops.use_backend("reference"):
        assert abs(error(fast(t, z, y), want) / off - 1.0) < 0.2


@with_tiles
def test_the_state_dict_of_int8_is_the_originals_up_to_half_a_step():
    model = network()
    fast = lfm_fast.optimize(model, "int8")
    state, original = fast.state_dict(), model.state_dict()
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in original.items()}
    for name, module in fast.named_modules():
        if isinstance(module, PackedLinearInt8):
            weight = original[name + ".weight"]
            step = weight.abs().amax(1, keepdim=True) / 127
            assert ((state[name + ".weight"] - weight).abs() <= 0.5001 * step).all()
    other = lfm_fast.optimize(network(), "int8")
    with torch.no_grad():
        for buffer in other.buffers():
            buffer.zero_()
    other.load_state_dict(state)
    t, z, y = inputs()
    assert torch.equal(other(t, z, y), fast(t, z, y))


def test_int8_without_tiles_is_refused(monkeypatch):
    monkeypatch.setattr(_library, "lacks", lambda *arguments: "it has none")
    with pytest.raises(ValueError, match="int8 needs a CPU with matrix tiles, but it has none; use fp32"):
        lfm_fast.optimize(network(), "int8")
    with pytest.raises(ValueError, match="int8 is for inference on a CPU, but the network is on meta"):
        lfm_fast.optimize(network().to("meta"), "int8")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_shares_the_parameters(precision):
    """One step of an optimizer of the original, on a gradient that came through the fast form, moves both."""
    model, (t, z, y) = network(), inputs()
    fast = lfm_fast.optimize(model, precision, mode="training")
    assert all(ours is theirs for ours, theirs in zip(fast.parameters(), model.parameters(), strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        want = torch.autograd.grad(model(t, z, y).square().sum(), [p for p in model.parameters() if p.requires_grad])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = fast(t, z, y)
    before.square().sum().backward()
    for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), want, strict=True):
        assert parameter.grad.dtype is torch.float32
        assert torch.equal(parameter.grad, gradient)
    optimizer.step()
    assert not torch.equal(fast(t, z, y), before)
    assert model.training == fast.training


def test_what_it_does_not_know_is_refused():
    model = network()
    with pytest.raises(ValueError, match=r"takes a network of lfm_fast\.create_model"):
        lfm_fast.optimize(torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="precision is 'fp7', expected bf16, fp32, tf32, fp16, fp8 or int8 in inference"
    ):
        lfm_fast.optimize(model, "fp7")
    with pytest.raises(ValueError, match="mode is 'fast', expected inference or training"):
        lfm_fast.optimize(model, mode="fast")

"""Queries and keys normed per head: the formula, what it changes of a network, and that without it nothing changes."""

import pytest
import torch
from test_dit import SMALL, inputs, small_dit

import lfm_fast
from lfm_fast.checkpoint import save_weights
from lfm_fast.models import DiT, create_model, from_config
from lfm_fast.models.layers import Attention, HeadNorm


def test_attention_is_the_formula_in_float64():
    torch.manual_seed(0)
    layer = Attention(24, 3, qk_norm=True).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
    q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.q_norm.weight
    k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.k_norm.weight
    y = torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, dim=-1) @ v
    torch.testing.assert_close(layer(x), layer.proj(y.transpose(1, 2).reshape(2, 5, 24)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_the_norm_is_computed_in_float32(dtype, rounding):
    """The result is rounded once, and squares that 16 bits could not hold do not overflow."""
    norm = HeadNorm(72).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(4, 72, generator=torch.Generator().manual_seed(1)) * 1e3).to(dtype)
    wide = x.double()
    want = wide / wide.square().mean(-1, keepdim=True).sqrt() * norm.weight.double()
    got = norm(x)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), want, rtol=rounding + 1e-6, atol=1e-7)


def test_lengths_of_queries_and_keys_no_longer_matter():
    model, (t, z, y) = small_dit(qk_norm=True).double(), inputs()
    with torch.no_grad():
        before = model(t, z, y)
        for block in model.blocks:
            block.attn.qkv.weight[:48] *= 100.0
            block.attn.qkv.bias[:48] *= 100.0
        torch.testing.assert_close(model(t, z, y), before, rtol=1e-4, atol=1e-5)  # 1e-6 beside the mean square


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_of_it_gets_a_gradient(dtype):
    model, (t, z, y) = small_dit(qk_norm=True).to(dtype), inputs()
    exact = small_dit(qk_norm=True).double()
    for network in (model, exact):
        network(t, z.double() if network is exact else z, y).double().square().sum().backward()
    for block, want in zip(model.blocks, exact.blocks):
        for norm, same in ((block.attn.q_norm, want.attn.q_norm), (block.attn.k_norm, want.attn.k_norm)):
            size = same.weight.grad.abs().max()
            assert size > 0
            # some twenty roundings to 2^-9 one after the other
            assert (norm.weight.grad - same.weight.grad).abs().max() <= (1e-3 if dtype is torch.float32 else 0.2) * size


def test_without_it_configuration_and_weights_are_as_ever():
    plain, normed = DiT(**SMALL), DiT(**SMALL, qk_norm=True)
    assert "qk_norm" not in plain.config
    assert normed.config == {**plain.config, "qk_norm": True}
    added = {f"blocks.{i}.attn.{name}_norm.weight" for i in range(2) for name in "qk"}
    assert normed.state_dict().keys() - plain.state_dict().keys() == added
    assert plain.state_dict().keys() <= normed.state_dict().keys()
    assert DiT(**SMALL, qk_norm=False).config == plain.config
    with pytest.raises(ValueError, match="qk_norm must be True or False, but is 1"):
        DiT(**SMALL, qk_norm=1)


def test_fresh_weights_are_ones():
    model = small_dit(qk_norm=True)
    model.initialise()
    assert all(
        (block.attn.q_norm.weight == 1).all() and (block.attn.k_norm.weight == 1).all() for block in model.blocks
    )


def test_a_checkpoint_brings_it_back(tmp_path):
    model = create_model("DiT-S/8", image_size=64, depth=1, qk_norm=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path / "model.safetensors"
    save_weights(path, model.state_dict(), {"config": model.config})
    again = lfm_fast.load_checkpoint(path)
    assert again.config == model.config == from_config(model.config).config
    t, z = torch.rand(2), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.eval()(t, z), model.eval()(t, z))


def test_weights_without_a_configuration_are_recognised(tmp_path):
    state = create_model("DiT-S/8", image_size=64, qk_norm=True).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    assert lfm_fast.load_checkpoint(tmp_path / "weights.pt").config["qk_norm"] is True

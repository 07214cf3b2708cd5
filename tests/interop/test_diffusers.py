"""diffusers' DiT with our weights computes what ours computes, and the weights come back."""

import pytest
import torch

import lfm_fast
from lfm_fast.interop.diffusers import DiffusersVelocity, align, from_diffusers, to_diffusers
from lfm_fast.models.layers import time_features

SETTINGS = {"image_size": 8, "hidden_size": 48, "depth": 3, "num_heads": 3}
LABELLED = {**SETTINGS, "num_classes": 5, "label_dropout": 0.1}


def network(dtype=torch.float64, **settings):
    """A DiT without zeros among its weights, in eval mode."""
    torch.manual_seed(3)
    model = lfm_fast.DiT(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def inputs(dtype=torch.float64):
    """Four samples, of different times, latents and labels, "no label" (5) among them."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(4, 4, 8, 8, generator=generator, dtype=torch.float64)
    return torch.tensor([0.0, 0.3, 0.71, 1.0], dtype=dtype), z.to(dtype), torch.tensor([0, 4, 5, 2])


class OurTimes(torch.nn.Module):
    """Time features as ours: in float64, where diffusers rounds its own to float32."""

    def forward(self, t):
        return time_features(t, 256, torch.float64)


def difference(got, want):
    return float((got - want).detach().norm() / want.detach().norm())


def test_same_velocity_in_float64():
    """With float64 time features too, nothing but roundings of float64 (1e-16 each, some thousand in a row) is left."""
    model, (t, z, y) = network(**LABELLED), inputs()
    velocity = DiffusersVelocity(to_diffusers(model))
    assert 0 < difference(velocity(t, z, y), model(t, z, y)) < 1e-7  # features rounded to float32: 6e-8 each
    for block in velocity.network.transformer_blocks:
        block.norm1.emb.time_proj = OurTimes()
    assert difference(velocity(t, z, y), model(t, z, y)) < 1e-13
    assert difference(velocity(t[2], z), model(t[2], z)) < 1e-13  # one time for all, no labels
    assert velocity.null_label == model.null_label == 5


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, {**SETTINGS, "num_classes": 5}, {**LABELLED, "patch_size": 4, "in_channels": 3, "image_size": 16}],
    ids=["unlabelled", "no null label", "other sizes"],
)
def test_other_networks_in_float32(settings):
    """float32 rounds to 6e-8; through three blocks the difference grows to some 1e-7."""
    model = network(torch.float32, **settings)
    channels, side = model.in_channels, model.image_size
    z, t = lfm_fast.noise(3, (channels, side, side)), torch.tensor([0.1, 0.5, 0.9])
    y = torch.tensor([0, 4, 2]) % model.num_labels
    assert difference(DiffusersVelocity(to_diffusers(model))(t, z, y), model(t, z, y)) < 2e-6


def test_gradients_are_the_same():
    model, (t, z, y) = network(**LABELLED), inputs()
    transformer = to_diffusers(model.train())
    assert transformer.training
    weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)
    (model(t, z, y) * weights).sum().backward()
    (transformer(z, timestep=t, class_labels=y).sample * weights).sum().backward()
    theirs = dict(transformer.named_parameters())
    shared = sum(p.grad for name, p in theirs.items() if "class_embedder" in name)
    assert difference(shared, model.y_embedder.embedding_table.weight.grad) < 1e-7
    query = theirs["transformer_blocks.1.attn1.to_q.weight"].grad
    assert difference(query, model.blocks[1].attn.qkv.weight.grad[: len(query)]) < 1e-7


def test_there_and_back():
    for settings, told in ((SETTINGS, {}), (LABELLED, {}), ({**SETTINGS, "num_classes": 5}, {"num_classes": 5})):
        model = network(torch.bfloat16, **settings)
        again = from_diffusers(to_diffusers(model), **told)
        assert again.config == model.config
        assert not again.training
        want, got = model.state_dict(), again.state_dict()
        assert want.keys() == got.keys()
        assert all(torch.equal(got[name], want[name]) and got[name].dtype == torch.bfloat16 for name in want)


def test_a_plain_load_differs_until_it_is_aligned(tmp_path):
    from diffusers import DiTTransformer2DModel

    model, (t, z, y) = network(torch.float32, **LABELLED), inputs(torch.float32)
    to_diffusers(model).save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    plain = difference(loaded(z, timestep=t, class_labels=y).sample, model(t, z, y))
    assert 1e-5 < plain < 2e-2, "the other time frequencies show"
    assert difference(align(loaded)(z, timestep=t, class_labels=y).sample, model(t, z, y)) < 2e-6
    assert difference(from_diffusers(loaded)(t, z, y), model(t, z, y)) < 1e-6


def test_sampling_takes_it_like_any_other():
    model, (_, z, y) = network(**LABELLED), inputs()
    settings = {"y": y % 5, "guidance_scale": 1.5, "null_label": 5, "method": "heun", "num_steps": 3}
    theirs = lfm_fast.sample(DiffusersVelocity(to_diffusers(model)), z, **settings)
    assert difference(theirs, lfm_fast.sample(model, z, **settings)) < 1e-7


def own_embedder(transformer):
    with torch.no_grad():
        transformer.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias[0] += 1


def test_what_has_no_counterpart_is_refused():
    from diffusers import DiTTransformer2DModel

    own_embedder(transformer := to_diffusers(network(**LABELLED)))
    with pytest.raises(ValueError, match="block 2 of this transformer has time or label embedders of its own"):
        from_diffusers(transformer)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4}
    for settings, says in (
        ({"out_channels": 8}, "returns 8 channels for 4"),
        ({"attention_bias": False}, "attention_bias True"),
    ):
        with pytest.raises(ValueError, match=says):
            from_diffusers(DiTTransformer2DModel(**sizes, **settings))
    with pytest.raises(ValueError, match="the label table has 6 rows; give 5 or 6"):
        from_diffusers(to_diffusers(network(**LABELLED)), num_classes=4)
    with pytest.raises(ValueError, match="but this is a Linear"):
        from_diffusers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not from a Linear"):
        to_diffusers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mlp_ratio of 4, but this network's is 2"):
        to_diffusers(network(**SETTINGS, mlp_ratio=2.0))
    moved = network(**SETTINGS)
    with torch.no_grad():
        moved.pos_embed[0, 3, 5] += 0.01
    with pytest.raises(ValueError, match="position table"):
        to_diffusers(moved)
    other = network(**SETTINGS)
    other.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"extra\.bias"):
        to_diffusers(other)

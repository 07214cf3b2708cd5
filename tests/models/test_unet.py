"""The U-Nets of guided diffusion: samples apart, gradients, labels, conditions, contexts, layouts, refusals."""

import pytest
import torch
from torch import nn

import lfm_fast
from lfm_fast import ops
from lfm_fast.models import from_reference_config, num_parameters
from lfm_fast.models.layout_unet import LayoutUNet
from lfm_fast.models.spatial_transformer import SpatialTransformer
from lfm_fast.models.unet import UNet

SIZES = {"image_size": 8, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 2}
LABELS = {"num_classes": 5, "label_dropout": 0.1}
# adaptive norms and not, levels that change in residual blocks, by convolutions and without, either order of channels
KINDS = {
    "unet": (UNet, {"attention_sides": (4,)}),
    "variants": (
        UNet,
        {"attention_sides": (8, 4), "use_scale_shift_norm": False, "resblock_updown": True, "num_head_channels": 16}
        | {"use_new_attention_order": True},
    ),
    "plain resampling": (UNet, {"conv_resample": False, "attention_resolutions": (), "num_heads_upsample": 4}),
    "layout": (LayoutUNet, {"attention_sides": (4,), "context_dim": 24}),
}


def unet(kind="unet", **arguments):
    """A small network whose zero weights (last layers, biases) are drawn, so that everything matters."""
    network, own = KINDS[kind]
    torch.manual_seed(0)
    model = network(**{**SIZES, **LABELS, **own, **arguments})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(model, batch=3, dtype=torch.float32):
    """Times, latents, labels and, for a network under one, a context, all of each sample its own."""
    generator = torch.Generator().manual_seed(2)
    side, channels = model.image_size, model.in_channels
    made = {"t": torch.linspace(0.2, 0.9, batch, dtype=dtype), "y": torch.arange(batch) % 5}
    made["z"] = torch.randn(batch, channels, side, side, generator=generator).to(dtype)
    if isinstance(model, LayoutUNet):
        made["context"] = torch.randn(batch, 7, 24, generator=generator).to(dtype)
    return made


def difference(found, expected):
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_a_batch_is_the_sample_alone(kind):
    model = unet(kind).double()
    given = inputs(model, dtype=torch.float64)
    together = model(**given)
    for i in range(3):
        alone = model(**{name: value[i : i + 1] for name, value in given.items()})
        assert difference(together[i : i + 1], alone) < 1e-13  # float64 sums in another order
    for name, value in given.items():
        others = model(**{**given, name: value.roll(1, 0)})  # whatever belongs to a sample matters
        assert all(difference(others[i], together[i]) > 1e-3 for i in range(3)), name


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_and_bfloat16_follow_float64(kind, layout):
    model = unet(kind)
    given = inputs(model)
    exact = unet(kind).double()(**{n: x.double() if x.is_floating_point() else x for n, x in given.items()})
    given["z"] = given["z"].contiguous(memory_format=layout)
    for backend in ("reference", "cpp"):
        with ops.use_backend(backend):
            assert difference(model(**given), exact) < 1e-5  # the bound on golden networks of the same sizes
            with torch.autocast("cpu", torch.bfloat16):
                found = model(**given)
    # a rounding to 2^-9 after each of about 20 layers on a way through the network, a branch of each of order 1
    assert found.dtype is torch.bfloat16
    assert difference(found, exact) < 0.05
    halved = model.bfloat16()(**{n: x.bfloat16() if n in ("z", "context") else x for n, x in given.items()})
    assert difference(halved, exact) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    model = unet(kind).double()
    given = inputs(model, dtype=torch.float64)
    weighting = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moved = [*model.parameters(), *(given[name].requires_grad_() for name in ("z", "context") if name in given)]
    (model(**given) * weighting).sum().backward()
    generator, step = torch.Generator().manual_seed(4), 1e-6
    for chosen in (moved, [given["z"]], [p for p in moved if p.ndim == 1]):
        directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in chosen]
        expected = sum((x.grad * d).sum() for x, d in zip(chosen, directions)).item()
        ends = []
        with torch.no_grad():
            for sign in (1, -2, 1):  # forward, back over the start, and where it was
                for x, d in zip(chosen, directions):
                    x.add_(d, alpha=sign * step)
                ends.append((model(**given) * weighting).sum().item())
        # the third derivative times 1e-12, and roundings of the value, 1e-14, over the step
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=2e-5)


def gradients(model, given):
    model.zero_grad()
    model(**given).float().square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_float32_gradients_follow_float64(kind, backend):
    model = unet(kind)
    given = inputs(model)
    exact_model = unet(kind).double()
    exact = gradients(exact_model, {n: x.double() if x.is_floating_point() else x for n, x in given.items()})
    with ops.use_backend(backend):
        found = gradients(model, given)
    largest = max(gradient.abs().max() for gradient in exact)
    for one, other in zip(found, exact, strict=True):
        # roundings of 2^-24 that add up over 20 layers, all that is left of a bias before a norm of its channel alone
        assert (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-6 * largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "precision"), [("selective", torch.bfloat16), ("full", torch.float32)])
def test_checkpointing_changes_no_gradient_and_keeps_less(kind, mode, precision):
    model = unet(kind, dropout=0.5).train()
    given = inputs(model)
    outcomes, kept = {}, {}
    for name in ("none", mode):
        model.activation_checkpointing, sizes = name, []
        torch.manual_seed(0)  # dropout draws the same

        def pack(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        ):
            outcomes[name], kept[name] = gradients(model, given), sum(sizes)
    assert all(map(torch.equal, outcomes["none"], outcomes[mode]))
    assert kept[mode] < 0.75 * kept["none"]


@torch.no_grad()
def test_dropout_is_for_training():
    model = unet(dropout=0.5)
    given = inputs(model)
    assert torch.equal(model(**given), unet()(**given))
    model.train()
    assert difference(model(**given), model(**given)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unet", "layout"])
def test_guidance_by_the_null_label(kind):
    model = unet(kind).double()
    given = inputs(model, dtype=torch.float64)
    assert (model.null_label, model.num_labels) == (5, 6)
    null = {**given, "y": torch.full((3,), 5)}
    assert torch.equal(model(**{**given, "y": None}), model(**null))
    context = {name: value for name, value in given.items() if name == "context"}
    settings = {"guidance_scale": 3.0, "null_label": model.null_label, "method": "euler", "num_steps": 1}
    found = lfm_fast.sample(model, given["z"], y=given["y"], model_kwargs=context, **settings)
    now = {**given, "t": torch.ones(3, dtype=torch.float64)}
    expected = given["z"] - (3 * model(**now) - 2 * model(**{**now, "y": null["y"]}))
    assert difference(found, expected) < 1e-13


def test_labels_without_a_null_label_have_to_be_given():
    model = unet(label_dropout=0.0)
    given = inputs(model)
    assert (model.null_label, model.num_labels) == (None, 5)
    with pytest.raises(ValueError, match="5 classes and no label that means none of them; give y"):
        model(given["t"], given["z"])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, but y holds 7"):
        model(given["t"], given["z"], given["y"] + 5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unet", "layout"])
@pytest.mark.parametrize("extra", [4, 5])
def test_a_condition_goes_behind_the_latents(kind, extra):
    model = unet(kind, in_channels=4 + extra, out_channels=4)
    given = inputs(model)
    whole = model(**given)
    assert whole.shape == (3, 4, 8, 8)
    condition, given["z"] = given["z"][:, 4:], given["z"][:, :4]
    assert torch.equal(model(**given, condition=condition), whole)
    with pytest.raises(ValueError, match=f"give the other {extra} channels as condition"):
        model(**given)


@pytest.mark.parametrize(
    ("context", "sentence"),
    [
        (None, r"needs a context \(B, L, 24\), tokens of an encoder; give context"),
        (torch.zeros(3, 7, 20), r"context must be floating and \(B, L, 24\), but is torch.float32 \(3, 7, 20\)"),
        (torch.zeros(3, 24), r"but is torch.float32 \(3, 24\)"),
        (torch.zeros(3, 7, 24, dtype=torch.int64), "but is torch.int64"),
        (torch.zeros(2, 7, 24), "context holds 2 entries for 3 samples of z"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(context, sentence):
    model = unet("layout")
    with pytest.raises(ValueError, match=sentence):
        model(**{**inputs(model), "context": context})


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_context_is_a_set_of_tokens_of_any_number(count):
    model = unet("layout").double()
    given = inputs(model, dtype=torch.float64)
    given["context"] = torch.randn(3, count, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = model(**given)
    given["context"] = given["context"].flip(1)
    assert difference(model(**given), found) < 1e-13
    given["context"] = given["context"].repeat_interleave(2, dim=1)  # each token twice has the weight of one
    assert difference(model(**given), found) < 1e-13


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_weights(kind):
    network, own = KINDS[kind]
    torch.manual_seed(7)
    model = network(**SIZES, **LABELS, **own)
    assert not model(**inputs(model)).any()
    before = [(parameter.mean(), parameter.std()) for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.fill_(9.0)
    model.initialise()
    for (mean, std), parameter in zip(before, model.parameters()):
        spread = std / parameter.numel() ** 0.5  # of a mean; of two of them 1.4 times that
        assert (parameter.mean() - mean).abs() <= 9 * spread
        assert (parameter.std() - std).abs() <= 0.8 * std
    ends = [name for name, p in model.named_parameters() if not p.any() and name.endswith("weight")]
    branches = sum(hasattr(m, "proj_out") or hasattr(m, "out_layers") for m in model.modules())
    assert len(ends) == branches + 1


def test_attention_by_sides_is_attention_by_factors():
    by_sides, by_factors = unet(attention_sides=(4, 8)), unet(attention_sides=None, attention_resolutions=(2, 1))
    assert by_sides.config["attention_resolutions"] == [2, 1]
    assert list(by_sides.state_dict()) == list(by_factors.state_dict())
    # factors that no level has are no error: released networks name 16 where 8 is the largest
    assert num_parameters(unet(attention_sides=None, attention_resolutions=(16, 2))) == num_parameters(unet())


@torch.no_grad()
def test_heads_on_the_way_up():
    four, one = unet(num_heads_upsample=4), unet(num_heads_upsample=-1)
    four.load_state_dict(one.state_dict())
    assert [stage[1].order[0] for stage in four.output_blocks if len(stage) > 1 and hasattr(stage[1], "order")] == [
        4,
        4,
    ]
    assert four.middle_block[1].order[0] == 2
    assert difference(four(**inputs(four)), one(**inputs(one))) > 1e-4


def test_operations_are_counted():
    """Against a count by hand of a network with one level and no attention but in the middle."""
    side, c, e = 8, 32, 128
    model = UNet(image_size=side, model_channels=c, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())
    t, conv = side * side, lambda a, b, k=9: side * side * k * a * b
    block = lambda a: conv(a, c) + conv(c, c) + 2 * c * e + (conv(a, c, 1) if a != c else 0)  # noqa: E731
    attention = t * c * 3 * c + t * c * c + 2 * t * t * c
    total = conv(4, c) + 3 * block(c) + attention + 2 * block(2 * c) + conv(c, 4) + c * e + e * e
    assert model.flops_per_sample() == 2 * total
    attends = LayoutUNet(
        **{**SIZES, "channel_mult": (1,)}, attention_resolutions=(), context_dim=24, transformer_depth=3
    )
    tokens = 64  # of the context it counts with
    layer = t * c * c * (4 + 2 + 12) + 2 * tokens * 24 * c + 2 * t * t * c + 2 * t * tokens * c
    assert attends.flops_per_sample() == 2 * (total - attention + 2 * t * c * c + 3 * layer)


REFERENCE = {"family": "guided_diffusion", **SIZES, "out_channels": 4, "in_channels": 4, "num_classes": None}
REFERENCE |= {"attention_resolutions": [2], "dims": 2, "use_fp16": False}
LAYOUT = {**REFERENCE, "family": "guided_diffusion_layout", "context_dim": 24, "transformer_depth": 2}


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        *(({**REFERENCE, name: value}, f"{name}={value}") for name, value in (("dims", 3), ("use_fp16", True))),
        ({**LAYOUT, "use_spatial_transformer": False}, "use_spatial_transformer=False, but ours is the one of True"),
        ({**LAYOUT, "num_heads_upsample": 2}, "num_heads_upsample=2"),
        ({**REFERENCE, "n_embed": 3}, "has no argument n_embed"),
        ({**REFERENCE, "context_dim": 3}, "has no argument context_dim"),
    ],
)
def test_reference_arguments_that_change_the_computation_are_refused(config, refused):
    with pytest.raises(ValueError, match=refused):
        from_reference_config(config)


@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_reference_arguments_without_an_effect_are_ignored(use_checkpoint, legacy):
    model = from_reference_config({**REFERENCE, "use_checkpoint": use_checkpoint})
    assert (type(model), model.config["num_classes"], model.null_label) == (UNet, 0, 0)
    arguments = {"use_checkpoint": use_checkpoint, "legacy": legacy, "use_new_attention_order": legacy}
    model = from_reference_config({**LAYOUT, **arguments, "use_spatial_transformer": True})
    assert sum(isinstance(m, SpatialTransformer) for m in model.modules()) == 4
    assert len(model.middle_block[1].transformer_blocks) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model_channels": 48}, "gives 48 channels, which is no multiple of 32"),
        ({"image_size": 9}, "the latent's side 9 cannot be halved 1 times, as 2 levels need"),
        ({"num_heads": 3}, "64 channels cannot be split into 3 heads"),
        ({"num_head_channels": 24}, "64 channels cannot be split into heads of 24 channels"),
        ({"num_head_channels": 128}, "cannot be split into heads of 128 channels"),
        ({"num_heads_upsample": 5, "attention_sides": (8,)}, "32 channels cannot be split into 5 heads"),
        ({"num_heads_upsample": 0}, "num_heads_upsample must be a positive integer"),
        ({"attention_sides": (3,)}, "attention_sides holds 3, but the feature maps of this network have sides 8, 4"),
        ({"attention_sides": 4}, "attention_sides must be"),
        ({"attention_resolutions": ("2",)}, "attention_resolutions must be"),
        ({"channel_mult": ()}, "channel_mult must be"),
        ({"channel_mult": (1, 1.5)}, "channel_mult must be"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), but is 1.0"),
        ({"resblock_updown": 1}, "resblock_updown must be True or False, but is 1"),
        ({"num_res_blocks": 0}, "num_res_blocks must be a positive integer"),
        ({"label_dropout": 0.1}, "needs labels to drop"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        UNet(**{**SIZES, **arguments})


def test_heads_have_to_divide_the_channels_of_maps_that_attend():
    sizes = {**SIZES, "channel_mult": (1, 2), "num_head_channels": 64}
    assert UNet(**{**sizes, "attention_sides": (4,)}).input_blocks[3][1].qkv.weight.shape[0] == 3 * 64
    with pytest.raises(ValueError, match="32 channels cannot be split into heads of 64 channels"):
        UNet(**{**sizes, "attention_sides": (8,)})


@pytest.mark.parametrize("name", ["context_dim", "transformer_depth"])
def test_sizes_of_a_context_are_counts(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, but is 0"):
        LayoutUNet(**{**SIZES, "context_dim": 24, name: 0})


def test_half_the_sides_and_back():
    block = nn.ModuleList(unet("plain resampling").input_blocks)[2][0]
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert block(x)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]


@torch.no_grad()
def test_sampling_keeps_contexts_and_conditions_with_their_samples():
    """Adaptive steps and guidance leave out and repeat rows; what belongs to a sample goes with it."""
    model = unet("layout", in_channels=7, out_channels=4).double()
    given = inputs(model, dtype=torch.float64)
    z, own = given["z"][:, :4], {"condition": given["z"][:, 4:], "context": given["context"]}
    settings = {"guidance_scale": 1.5, "null_label": 5, "method": "dopri5", "atol": 0.05, "rtol": 0.05}
    found = lfm_fast.sample(model, z, y=given["y"], model_kwargs=own, **settings)
    for i in range(3):
        alone = {name: value[i : i + 1] for name, value in own.items()}
        expected = lfm_fast.sample(model, z[i : i + 1], y=given["y"][i : i + 1], model_kwargs=alone, **settings)
        assert difference(found[i : i + 1], expected) < 1e-9  # the same steps; float64 sums in another order


@pytest.mark.parametrize("kind", ["unet", "layout"])
def test_tangents_in_forward_mode(kind):
    """As likelihoods take them; PyTorch gives an op without a rule the tangent zero and no word."""
    model = unet(kind).double().requires_grad_(False)
    given = inputs(model, dtype=torch.float64)
    z = given.pop("z")
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    velocity, tangent = torch.func.jvp(lambda z: model(z=z, **given), (z,), (direction,))
    assert difference(velocity, model(z=z, **given)) < 1e-13
    ends = [model(z=z + sign * 1e-5 * direction, **given) for sign in (1, -1)]
    assert difference(tangent, (ends[0] - ends[1]) / 2e-5) < 1e-7  # the third derivative times 1e-10, and 1e-16 / 1e-5
    for fast in (unet(kind), lfm_fast.optimize(unet(kind), "fp32")):
        single = {name: x.float() if x.is_floating_point() else x for name, x in given.items()}
        _, found = torch.func.jvp(lambda z, fast=fast, y=single: fast(z=z, **y), (z.float(),), (direction.float(),))
        assert difference(found, tangent) < 1e-5

"""ADM, DDPM++ and NCSN++: samples on their own, gradients, training, labels, fresh weights, refusals."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lfm_fast
from lfm_fast import ops
from lfm_fast.models import create_model
from lfm_fast.models.edm_layers import GroupNorm, filter_of, resample
from lfm_fast.models.song import AuxiliaryInput

NAMES = ["adm", "ddpm++", "ncsn++"]
SIZES = {"image_size": 64, "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
LABELS = {"num_classes": 5, "label_dropout": 0.1}


def small(name, dtype=torch.float64, **arguments):
    """A network on 8x8 latents, no weight of which is zero."""
    model = create_model(name, **{**SIZES, **LABELS, **arguments}).eval().to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(scale * draw + (1.0 if parameter.ndim == 1 else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("freqs"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def inputs(batch=3, channels=4, side=8, dtype=torch.float64):
    """Every sample with a time, a latent and a label of its own."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(batch, channels, side, side, generator=generator, dtype=torch.float64)
    return torch.linspace(0.05, 0.95, batch, dtype=dtype), z.to(dtype), (2 * torch.arange(batch) + 1) % 5


def gap(found, expected):
    """The largest difference over the largest magnitude."""
    expected = expected.double()
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_do_not_depend_on_their_batch(name, dtype):
    model, (t, z, y) = small(name, dtype), inputs(5, dtype=dtype)
    together = model(t, z, y)
    alone = torch.cat([model(*(x[i : i + 1] for x in (t, z, y))) for i in range(5)])
    # sums in another order: 50 layers of sums of up to 2000 products
    assert gap(together, alone) < (1e-5 if dtype == torch.float32 else 1e-13)
    for other in (model(t.flip(0), z, y), model(t, z, y.flip(0))):  # and each input matters to its sample
        assert ((other - together).flatten(1).norm(dim=1)[[0, 1, 3, 4]] > 1e-3).all()


def gradients(model, dtype, layout=torch.contiguous_format):
    t, z, y = inputs(dtype=dtype)
    z.requires_grad_()
    velocity = model(t, z.contiguous(memory_format=layout), y)
    (velocity * torch.linspace(-1, 1, velocity.numel(), dtype=dtype).view(velocity.shape)).sum().backward()
    return {"z": z.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("name", NAMES)
def test_float64_gradients_against_finite_differences(name):
    model = small(name)
    with torch.no_grad():  # each direction moves all weights at once, one by one they would take a thousand forwards
        generator = torch.Generator().manual_seed(3)
        directions = [
            {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.std() for k, p in model.named_parameters()}
            for _ in range(2)
        ]
    found = gradients(model, torch.float64)
    t, z, y = inputs()
    weights = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view(z.shape)

    def value(direction, step):
        moved = {k: p + step * direction[k] for k, p in model.named_parameters()}
        return (torch.func.functional_call(model, moved, (t, z, y)) * weights).sum().item()

    for direction in directions:
        expected = sum((found[k] * v).sum().item() for k, v in direction.items())
        h = 1e-4  # error of the central differences: h^2 of a third derivative, and 1e-16 / h of rounding
        difference = (
            8 * (value(direction, h) - value(direction, -h)) - value(direction, 2 * h) + value(direction, -2 * h)
        ) / (12 * h)
        assert difference == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_float32_gradients_against_float64(name, backend, layout):
    with ops.use_backend("reference"):
        expected = gradients(small(name), torch.float64)
    model = small(name, torch.float32).to(memory_format=layout)
    with ops.use_backend(backend):
        found = gradients(model, torch.float32, layout)
    for key, value in found.items():
        assert gap(value, expected[key]) < 1e-4, key  # measured 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_training_makes_the_loss_fall(name):
    torch.manual_seed(0)
    model = create_model(name, **SIZES, **LABELS)
    data = torch.randn(8, 4, 1, 1).expand(-1, -1, 8, 8) * torch.linspace(-2, 2, 8)  # ramps
    y = torch.arange(8) % 5
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(12):
        loss = lfm_fast.flow_matching_loss(model, data, y, seed=0, indices=torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5  # of a velocity near zero: data and noise have variance
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_no_label_and_the_null_label_are_one(name):
    model, (t, z, y) = small(name), inputs()
    nothing = model(t, z)
    assert torch.equal(nothing, model(t, z, torch.full_like(y, model.null_label)))
    assert gap(model(t, z, y), nothing) > 1e-3
    some = torch.where(torch.tensor([True, False, False]), model.null_label, y)
    assert torch.equal(model(t, z, some)[0], nothing[0])
    weight = model.map_label.weight
    weight.zero_()  # what the null label leaves
    assert gap(nothing, model(t, z, y)) < 1e-13


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_without_label_dropout_there_is_no_null_label(name):
    model, (t, z, y) = small(name, label_dropout=0.0), inputs()
    assert model.null_label is None
    assert model(t, z).shape == model(t, z, y).shape
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, but y holds 5"):
        model(t, z, y * 0 + 5)
    unlabelled = small(name, num_classes=0, label_dropout=0.0)
    assert unlabelled.null_label == 0
    assert torch.equal(unlabelled(t, z), unlabelled(t, z, torch.zeros_like(y)))
    assert not [key for key in unlabelled.state_dict() if "label" in key]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_condition_is_more_channels(name):
    model, (t, z, y) = small(name, in_channels=7, out_channels=4), inputs()
    condition = inputs(channels=3)[1]
    assert torch.equal(model(t, z, y, condition=condition), model(t, torch.cat([z, condition], 1), y))
    assert model(t, z, y, condition=condition).shape == z.shape


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_stays_near(name):
    model, (t, z, y) = small(name), inputs()
    exact = model(t, z, y)
    single = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert gap(single(t.float(), z.float(), y), exact) < 0.05  # 2^-8 a layer; measured 0.02
    low = model.to(torch.bfloat16)
    assert low(t.float(), z.float(), y).dtype == torch.bfloat16
    assert gap(low(t.float(), z.float(), y), exact) < 0.05
    apart = low(torch.tensor([0.5, 0.5 + 2**-9]), z[:1].repeat(2, 1, 1, 1), y[:1].repeat(2))
    assert not torch.equal(apart[0], apart[1])  # times nearer than bfloat16 tells them apart


@torch.no_grad()
@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lfm_fast.optimize])
def test_frequencies_are_never_rounded_to_16_bits(change):
    model = create_model("ncsn++", **SIZES)
    expected, t = model.map_noise.freqs.clone(), torch.rand(3)
    features = model.map_noise(t)
    found = change(model).map_noise
    assert torch.equal(found.freqs, expected)
    assert torch.equal(found(t), features)
    assert gap(features, model.double().map_noise(t.double())) < 1e-4  # angles to 2 pi 50 in float32


@torch.no_grad()
def test_fresh_weights_are_as_published():
    torch.manual_seed(0)
    sizes = {"image_size": 64, "num_classes": 50}
    t, z, _ = inputs(dtype=torch.float32)
    model = create_model("adm", **sizes, model_channels=64)
    assert not model(t, z).any()
    assert model.map_label.weight.std() == pytest.approx(1, abs=0.02)
    block = model.enc["8x8_block0"]
    assert not block.conv1.weight.any()
    assert not model.dec["1x1_in0"].proj.weight.any()
    assert block.conv0.weight.std() == pytest.approx((3 * 9 * 64) ** -0.5, rel=0.05)  # uniform to 1 / sqrt(fan in)
    model = create_model("ncsn++", **sizes, model_channels=64, attn_resolutions=[8])
    assert 0 < model(t, z).abs().max() < 1e-3
    assert model.map_noise.freqs.std() == pytest.approx(16, rel=0.3)
    block = model.enc["8x8_block1"]
    assert block.conv0.weight.std() == pytest.approx((1 / (9 * 128)) ** 0.5, rel=0.05)  # of the mean of its fans
    assert block.qkv.weight.std() == pytest.approx((0.1 / 128) ** 0.5, rel=0.05)
    assert not block.qkv.bias.any()
    before = model.state_dict()["map_noise.freqs"].clone()
    model.initialise()
    assert not torch.equal(model.map_noise.freqs, before)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 4, 4, 2, 1), (1, 2)])
def test_resampling_against_its_sums(taps):
    x, kernel, padding = inputs()[1], filter_of(taps).double(), (len(taps) - 1) // 2
    down, padded = torch.zeros(3, 4, 4, 4, dtype=torch.float64), F.pad(x, (padding,) * 4)
    padded = F.pad(padded, (0, 2, 0, 2))
    for i, first in enumerate(taps):
        for j, second in enumerate(taps):
            down += padded[..., i : i + 8 : 2, j : j + 8 : 2] * first * second / sum(taps) ** 2
    torch.testing.assert_close(resample(x, "down", taps, kernel), down)
    small = torch.randn_like(down)
    # "up" is four times the transpose of "down": <up(s), x> = 4 <s, down(x)>
    up = resample(small, "up", taps, kernel)
    assert (up * x).sum().item() == pytest.approx(4 * (small * down).sum().item())
    for factor, maps, expected in (("down", x, down), ("up", small, up)):  # and by another way in 16 bits
        assert gap(resample(maps.bfloat16(), factor, taps, kernel), expected) < 0.02


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_the_auxiliary_input_is_convolved_then_filtered(taps):
    layer, x = AuxiliaryInput(4, 6, taps).double(), inputs()[1]
    wide = F.conv2d(x, layer.weight, padding=1 + (len(taps) - 1) // 2)
    kernel = filter_of(taps).double().expand(6, 1, -1, -1)
    expected = F.conv2d(wide, kernel, stride=2, groups=6) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_modulated_norm(layout):
    norm, x = GroupNorm(12, 1e-5).double(), inputs(channels=12)[1].contiguous(memory_format=layout)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    scale, shift = torch.randn(2, 3, 12, dtype=torch.float64)
    h = F.group_norm(x, 3, norm.weight, norm.bias, 1e-5)
    expected = F.silu(h * (1 + scale[..., None, None]) + shift[..., None, None])
    torch.testing.assert_close(norm.modulated(x, scale, shift), expected)


@torch.no_grad()
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(again):
    model, (t, z, y) = small("ncsn++"), inputs()
    assert torch.equal(again(model)(t, z, y), model(t, z, y))


def test_operations_are_those_of_the_layers():
    model = create_model("adm", image_size=64, model_channels=64, channel_mult=[1], num_blocks=1, attn_resolutions=[8])
    convolution, tokens = 9 * 64 * 64, 64
    block = 2 * tokens * convolution + 128 * 256  # two convolutions and the modulation
    attention = tokens * 4 * 64 * 64 + 2 * tokens * tokens * 64
    joined = tokens * (9 * 128 * 64 + convolution + 128 * 64) + 128 * 256 + attention  # with a skip of 1x1
    expected = 64 * 256 + 256 * 256 + 2 * tokens * 9 * 4 * 64
    expected += block + attention  # the encoder's block
    expected += block + attention + block + 2 * joined  # in0, in1 and the decoder's two
    assert model.flops_per_sample() == 2 * expected


def test_dropout_is_the_training_s():
    model, (t, z, y) = small("adm", dropout=0.5), inputs()
    assert torch.equal(model(t, z, y), small("adm")(t, z, y))
    model.train()
    assert gap(model(t, z, y), small("adm")(t, z, y)) > 1e-2


def test_another_filter_in_the_weights_is_refused():
    weights = small("ddpm++").state_dict()
    key = "enc.4x4_down.skip.resample_filter"
    with pytest.raises(RuntimeError, match=f"{key} is another filter than that of the taps 1, 1"):
        small("ddpm++").load_state_dict({**weights, key: weights[key] * 2})


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("adm", {"channel_mult": []}, "channel_mult is empty, but needs a number for every level"),
        ("adm", {"channel_mult": [1, 2, 0]}, "channel_mult must be a list of positive integers, but is .1, 2, 0."),
        ("adm", {"channel_mult": [1, 1, 1, 1, 1]}, "side 8 cannot be halved 4 times, as a channel_mult of 5 levels"),
        ("adm", {"num_blocks": 0}, "num_blocks must be a positive integer, but is 0"),
        ("adm", {"model_channels": 33}, "maps of 33 channels do not divide into 8 groups"),
        ("adm", {"model_channels": 72, "channel_mult": [2]}, "maps of 144 channels do not divide into 32 groups"),
        ("adm", {"attn_resolutions": "16"}, "attn_resolutions must be a list of positive integers, but is '16'"),
        ("adm", {"dropout": 1.0}, r"dropout must lie in \[0, 1\), but is 1.0"),
        ("adm", {"label_dropout": 0.1, "num_classes": 0}, "needs labels to drop"),
        ("adm", {"out_channels": 5}, "out_channels 5 must not exceed in_channels 4"),
        ("adm", {"embedding_type": "fourier"}, "ADM has no argument embedding_type"),
        ("ddpm++", {"embedding_type": "learned"}, "embedding_type is 'learned', expected 'positional' or 'fourier'"),
        ("ddpm++", {"encoder_type": "skip"}, "encoder_type is 'skip', expected 'standard' or 'residual'"),
        ("ddpm++", {"decoder_type": "skip"}, "decoder_type is 'skip', expected 'standard'"),
        ("ddpm++", {"resample_filter": [1, 2, 1]}, "resample_filter must be an even number of positive integers"),
        ("ddpm++", {"channel_mult_noise": 0}, "channel_mult_noise must be a positive integer"),
        ("ddpm++", {"model_channels": 2}, "the time's 2 features must be even and four or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_model(name, **{**SIZES, **arguments})


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_do_not_fit_are_refused(name):
    model, (t, z, y) = small(name), inputs()
    for arguments, sentence in (
        ((t, z[:, :3], y), "takes latents of shape .B, 4, 8, 8."),
        ((t[:2], z, y), "t must have shape .3,., one time per sample"),
        ((t, z, y[:2]), "y must be integer labels of shape .3,."),
        ((t, z, y + 5), "labels must lie in 0..5, but y holds 8"),
        ((t, z, y, z), "this network takes no condition"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(*arguments)

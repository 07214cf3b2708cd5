"""Autoencoders on their fastest path, against diffusers' own network and against float64."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_autoencoders import SHAPES, error, fast_ways, inputs, kl, pictures, small, ways, with_onednn
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lfm_fast
from lfm_fast.autoencoder import PIXELS_AT_ONCE, Autoencoder, load_autoencoder
from lfm_fast.models.packed_convolution import PackedConv2d

NETWORKS = {**{name: lambda name=name: kl(name) for name in SHAPES}, "small": small}


@torch.no_grad()
@pytest.mark.parametrize("kind", NETWORKS)
def test_float32_is_the_networks_own(kind):
    """Posterior and image within 1e-4; sums of a thousand products in another order are 1e-5 apart at most."""
    network = NETWORKS[kind]()
    images, latents = inputs(network)
    want = ways(network, images, latents, torch.float64)
    own = ways(network, images, latents)
    fast = lfm_fast.optimize(Autoencoder(network, "test"), "fp32")
    for got, exact, plain in zip(fast_ways(fast, images, latents), want, own):
        assert error(got, plain) < 1e-5
        assert error(got, exact) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", NETWORKS)
def test_bfloat16_is_no_further_from_float64_than_the_networks_own(kind):
    network = NETWORKS[kind]()
    images, latents = inputs(network, batch=4, height=64, width=64)
    want = ways(network, images, latents, torch.float64)
    own = ways(network, images, latents, torch.bfloat16)
    fast = lfm_fast.optimize(Autoencoder(network, "test"), "bf16")
    norms = [module for module in fast._network()[0].modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.weight.dtype for norm in norms} == {torch.float32}
    for got, exact, plain in zip(fast_ways(fast, images, latents), want, own):
        assert got.dtype is torch.bfloat16
        assert error(got, exact) < error(plain, exact) < 0.1


def test_the_small_vae_is_what_its_description_says():
    """By hand, in float64: pairs of convolutions beside a skip, means of two by two channels, repeated pixels."""
    network = small(block_out_channels=(16, 32), layers_per_block=1)
    weights = {name: value.double() for name, value in network.state_dict().items()}
    images, latents = (x.double() for x in inputs(network))

    def conv(x, name, **how):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **{"padding": 1, **how})

    def norm(x, name):
        return F.silu(F.group_norm(x, x.shape[1] // 16, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5))

    def block(x, name):
        h = conv(norm(x, f"{name}.norm1"), f"{name}.conv1")
        return x + conv(norm(h, f"{name}.norm2"), f"{name}.conv2")

    x = conv(conv(images, "encoder.0"), "encoder.1", stride=2)
    x = conv(norm(block(block(x, "encoder.2"), "encoder.3"), "encoder.4"), "encoder.6")
    mean, log_variance = x.chunk(2, dim=1)
    y = block(block(conv(latents, "decoder.0"), "decoder.1"), "decoder.2")
    y = conv(y.repeat_interleave(2, 2).repeat_interleave(2, 3), "decoder.4")
    y = conv(norm(block(y, "decoder.5"), "decoder.6"), "decoder.8")
    fast = lfm_fast.optimize(Autoencoder(network, "test"), "fp32")
    for got, exact in zip(fast_ways(fast, images, latents), (mean, log_variance.clamp(-20, 10), y)):
        assert error(got, exact) < 1e-5


def test_weights_state_dict_and_fingerprint_are_the_originals(tmp_path):
    plain = Autoencoder(kl(), "test")
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    for precision in ("fp32", "bf16"):
        fast = lfm_fast.optimize(plain, precision)
        fast.decode(fast.encode(pictures()).mode())
        assert fast.fingerprint == plain.fingerprint
        assert list(fast.state_dict()) == list(weights)
        assert all(torch.equal(value, weights[name]) for name, value in fast.state_dict().items())
        assert all(p is q for p, q in zip(fast.parameters(), plain.parameters(), strict=True))
    fast.save_pretrained(tmp_path)
    assert load_autoencoder(tmp_path).fingerprint == plain.fingerprint


def test_what_is_rounded_to_bfloat16_and_what_is_not():
    """Norms stay in float32; and of the convolutions behind doubled maps the sums of weights are rounded, once."""
    network = kl()
    fast = lfm_fast.optimize(Autoencoder(network, "test"), "bf16")._network()[0]
    norms = [module for module in fast.modules() if isinstance(module, nn.GroupNorm)]
    assert norms
    assert all(norm.weight.dtype is norm.bias.dtype is torch.float32 for norm in norms)
    weight = network.decoder.up_blocks[0].upsamplers[0].conv.weight
    rows = fast.decoder.up_blocks[0].upsamplers[0].rows
    found = torch.cat([conv.weight for conv in rows])[:: len(weight)]  # of the four phases, output 0
    assert torch.equal(found[0, :, 0, 0], weight[0, :, 0, 0].bfloat16())  # one number; the others are sums
    assert torch.equal(found[0, :, 1, 1], weight[0, :, 1:, 1:].sum((1, 2)).bfloat16())
    assert torch.equal(found[3, :, 0, 0], weight[0, :, :2, :2].sum((1, 2)).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("make", "least", "most"), [(kl, -30, 20), (small, -20, 10)])
def test_log_variances_are_bounded_as_the_network_bounds_them(make, least, most, precision):
    network = make()
    last = network.quant_conv if make is kl else network.encoder[-1]
    bias = last.bias.clone()
    for shift in (-100.0, 100.0):
        last.bias.copy_(bias + shift)
        got = fast_ways(lfm_fast.optimize(Autoencoder(network, "test"), precision), *inputs(network))[1]
        assert torch.equal(got, network.encode(inputs(network)[0]).latent_dist.logvar.to(got.dtype))
        assert bool((got == (least if shift < 0 else most)).all())


def test_another_scaling_factor_goes_with_it():
    autoencoder, images = Autoencoder(small(), "test"), pictures()
    autoencoder.scaling_factor = 0.5
    fast = lfm_fast.optimize(autoencoder, "fp32")
    assert torch.equal(fast.encode(images).mean, autoencoder.encode(images).mean)
    assert torch.equal(fast.decode(fast.encode(images).mode()), autoencoder.decode(fast.encode(images).mode()))


def test_a_pickled_one_is_its_weights_and_no_more():
    autoencoder = Autoencoder(kl(), "test")
    before = len(pickle.dumps(autoencoder))
    autoencoder.encode(pictures())
    assert len(pickle.dumps(autoencoder)) < 1.01 * before


@pytest.mark.parametrize("precision", [None, "fp32", "bf16"])
def test_weights_that_are_changed_or_loaded_are_used(precision):
    autoencoder, images = Autoencoder(small(), "test", precision), pictures()
    before = autoencoder.encode(images).mean
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.mul_(1.2)
    changed = autoencoder.encode(images).mean
    assert error(changed, before) > 0.05
    autoencoder.network.load_state_dict(small().state_dict())
    assert torch.equal(autoencoder.encode(images).mean, before)
    autoencoder.network.encoder[0] = copy.deepcopy(autoencoder.network.encoder[0])
    autoencoder.network.encoder[0].bias.add_(1)
    assert not torch.equal(autoencoder.encode(images).mean, before)


def test_weights_written_past_pytorchs_count_are_used():
    autoencoder, images = Autoencoder(small(), "test"), pictures()
    for k in range(len(list(autoencoder.parameters()))):
        before = autoencoder.encode(images).mean, autoencoder.decode(torch.ones(1, 4, 4, 4))
        parameter = list(autoencoder.parameters())[k]
        version = parameter._version
        parameter.data.mul_(1.5).add_(0.01)
        assert parameter._version == version
        after = autoencoder.encode(images).mean, autoencoder.decode(torch.ones(1, 4, 4, 4))
        assert not all(map(torch.equal, before, after))
        fresh = Autoencoder(copy.deepcopy(autoencoder.network), "fresh")
        assert torch.equal(fresh.encode(images).mean, after[0])
    made = autoencoder._faster
    autoencoder.encode(images)
    assert autoencoder._faster is made  # nothing was written
    autoencoder.network.encoder[0].bias.data.fill_(float("nan"))
    autoencoder.encode(images)
    made = autoencoder._faster
    autoencoder.encode(images)
    assert autoencoder._faster is made  # NaN is no change of itself


def test_tiles_asked_for_later_are_the_networks_own():
    network, images = kl(), pictures()
    autoencoder, low = Autoencoder(network, "test"), Autoencoder(network, "test", "bf16")
    before = autoencoder.encode(images).mean, low.encode(images).mean
    network.enable_tiling()
    with torch.no_grad():
        expected = network.encode(images).latent_dist.mean * autoencoder.scaling_factor
    assert torch.equal(autoencoder.encode(images).mean, expected)
    assert not torch.equal(before[0], expected)  # the fast form rounds otherwise
    with pytest.raises(ValueError, match=r"told to work in tiles; use it as it is, or disable its tiling\.$"):
        low.encode(images)
    network.disable_tiling()
    assert torch.equal(autoencoder.encode(images).mean, before[0])
    assert torch.equal(low.encode(images).mean, before[1])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_compute_the_same_on_weights_of_their_own(again):
    autoencoder, images = lfm_fast.optimize(Autoencoder(small(), "test")), pictures()
    expected = autoencoder.encode(images).mean
    other = again(autoencoder)
    assert torch.equal(other.encode(images).mean, expected)
    with torch.no_grad():
        other.network.encoder[0].bias.add_(1)
    assert not torch.equal(other.encode(images).mean, expected)
    assert torch.equal(autoencoder.encode(images).mean, expected)


def test_float64_is_computed_in_float64():
    network = kl()
    images, latents = inputs(network)
    autoencoder = Autoencoder(copy.deepcopy(network).double(), "test")
    mean, _, decoded = ways(network, images, latents, torch.float64)
    assert torch.equal(autoencoder.encode(images.double()).mean, mean.float() * autoencoder.scaling_factor)
    got = autoencoder.decode(latents.double() * autoencoder.scaling_factor)
    torch.testing.assert_close(got, decoded.float().clamp(-1, 1))


def test_made_and_called_in_inference_mode():
    images = pictures()
    expected = Autoencoder(small(), "test").encode(images).mean
    with torch.inference_mode():
        inside = Autoencoder(small(), "test")
        assert error(inside.encode(images).mean, expected) < 1e-5
        inside.network.encoder[0].bias.add_(1)
        assert error(inside.encode(images).mean, expected) > 1e-3


@with_onednn
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_first_call_in_inference_mode_leaves_it_as_fast_as_any(precision):
    """Weights made there could never be packed; and sums are written over what was made there, so bits agree."""
    images, first = pictures(), Autoencoder(small(), "test", precision)
    expected = Autoencoder(small(), "test", precision).encode(images)
    with torch.inference_mode():
        inside = first.encode(images)
    outside = first.encode(images)
    packed = [module for module in first._faster[1][0].encoder.modules() if isinstance(module, PackedConv2d)]
    assert packed
    assert all(module._order is not None for module in packed)
    for got in (inside, outside):
        assert torch.equal(got.mean, expected.mean)
        assert torch.equal(got.log_variance, expected.log_variance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_are_taken_in_parts(monkeypatch, precision):
    autoencoder = lfm_fast.optimize(Autoencoder(kl(), "test"), precision)
    images = pictures(batch=5, height=16, width=16)
    whole = autoencoder.encode(images)
    assert PIXELS_AT_ONCE["cpu"] >= 5 * 256
    sizes, run = [], autoencoder._run
    monkeypatch.setitem(PIXELS_AT_ONCE, "cpu", 2 * 256 + 255)
    monkeypatch.setattr(autoencoder, "_run", lambda name, x: sizes.append(len(x)) or run(name, x))
    parts = autoencoder.encode(images)
    decoded = autoencoder.decode(parts.mode())
    assert sizes == [2, 2, 1] * 2
    bound = {"fp32": 1e-5, "bf16": 3e-2}[precision]
    assert error(parts.mean, whole.mean) < bound
    assert error(parts.log_variance, whole.log_variance) < bound
    alone = torch.cat([autoencoder.decode(z[None]) for z in parts.mode()])
    assert error(decoded, alone) < bound


def test_memory_is_that_of_one_image(monkeypatch):
    autoencoder = Autoencoder(kl(), "test")
    monkeypatch.setitem(PIXELS_AT_ONCE, "cpu", 1)
    one, six = (torch.randn(batch, 4, 32, 32) for batch in (1, 6))
    autoencoder.decode(one)
    extra = peak(lambda: autoencoder.decode(six)) - peak(lambda: autoencoder.decode(one))
    results = 6 * 3 * 64 * 64 * 4  # bytes
    assert extra < 3 * results  # parts, whole and the latents; one image's maps take 16 channels of its pixels and more
    assert peak(lambda: autoencoder.decode(one)) > 3 * 16 * 64 * 64 * 4


def peak(call):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = most = 0
    for event in sorted(_memory_events(profiler), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _memory_events(profiler):
    return [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]


def test_an_empty_batch_gives_an_empty_one():
    autoencoder = Autoencoder(kl(), "test")
    assert autoencoder.encode(torch.zeros(0, 3, 16, 16)).mean.shape == (0, 4, 8, 8)
    assert autoencoder.decode(torch.zeros(0, 4, 8, 8)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("make", [kl, small])
def test_compiled_it_computes_the_same(make):
    autoencoder, images = lfm_fast.optimize(Autoencoder(make(), "test"), "fp32"), pictures(height=16, width=16)
    expected = autoencoder.encode(images)
    decoded = autoencoder.decode(expected.mode())
    autoencoder.compile(backend="eager", fullgraph=True)
    assert error(autoencoder.encode(images).mean, expected.mean) < 1e-5
    assert error(autoencoder.decode(expected.mode()), decoded) < 1e-5


def test_loaded_in_a_precision(tmp_path):
    network = kl()
    network.save_pretrained(tmp_path)
    fast = load_autoencoder(tmp_path, precision="bf16")
    assert fast.precision == "bf16"
    images = pictures()
    expected = lfm_fast.optimize(Autoencoder(network, "test"), "bf16").encode(images).mean
    assert torch.equal(fast.encode(images).mean, expected)
    assert error(fast.encode(images).mean, load_autoencoder(tmp_path).encode(images).mean) > 1e-4


@pytest.mark.parametrize("channels", [1, 4])
def test_a_decoder_behind_an_encoder_of_other_pictures_is_fast_too(channels):
    network = kl(in_channels=channels)
    latents = inputs(network)[1]
    with torch.no_grad():
        want = copy.deepcopy(network).double().decode(latents.double()).sample.clamp(-1, 1)
    for autoencoder in (Autoencoder(network, "test"), lfm_fast.optimize(Autoencoder(network, "test"), "fp32")):
        assert error(autoencoder.decode(latents * autoencoder.scaling_factor), want) < 1e-5


@with_onednn
def test_the_embedded_one_is_packed():
    autoencoder = load_autoencoder("embedded")
    autoencoder.encode(pictures())
    packed = [module for module in autoencoder._faster[1][0].modules() if isinstance(module, PackedConv2d)]
    assert len(packed) > 15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-2), ("tf32", 1e-2), ("bf16", 3e-2), ("fp16", 1e-2)])
def test_on_a_gpu_it_computes_the_same(precision, bound, compiled):
    """cuDNN takes TF32 for convolutions in float32 unless it is told otherwise, hence the bound there."""
    network = kl("four levels")
    images, latents = inputs(network)
    want = ways(network, images, latents, torch.float64)
    fast = lfm_fast.optimize(Autoencoder(network, "test").to("cuda"), precision)
    if compiled:
        fast.compile()
    for got, exact in zip(fast_ways(fast, images.cuda(), latents.cuda()), want):
        assert error(got.cpu(), exact) < bound

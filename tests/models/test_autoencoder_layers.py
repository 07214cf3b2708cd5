"""Layers of the autoencoders that compute in another way than the layers they stand for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lfm_fast.models.autoencoder_layers import Attention, Downsample, ResidualBlock, Subpixel, Upsample
from lfm_fast.models.packed_convolution import added_to, pack_convolutions, why_not

with_onednn = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 5), (3, 17, 5, 7)])
def test_four_convolutions_of_two_by_two_are_one_of_doubled_maps(shape, packed):
    conv = nn.Conv2d(shape[1], 19, 3, padding=1)
    fast = nn.Sequential(Subpixel(conv, conv.weight))
    if packed:
        pack_convolutions(fast)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    want = conv.double()(F.interpolate(x.double(), scale_factor=2, mode="nearest"))
    torch.testing.assert_close(fast(x).double(), want, atol=2e-6, rtol=1e-5)


@with_onednn
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 16, 5, 7)])
def test_a_sum_is_written_over_the_skip_and_rounded_once(shape, dtype):
    layer = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1).to(dtype))
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    skip = torch.randn(shape[0], 24, *shape[2:]).to(dtype).contiguous(memory_format=torch.channels_last)
    want = skip.double() + copy.deepcopy(layer[0]).double()(x.double())
    assert error(added_to(skip, layer[0], x), want) < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    pack_convolutions(layer)
    before = skip.clone()
    got = added_to(skip, layer[0], x)
    assert got.data_ptr() == skip.data_ptr()
    # one rounding to 8 bits: at most 2^-9 of each number, and 2^-8 where a product sum lies at the edge of two
    torch.testing.assert_close(got.double(), want, rtol=2**-8 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
    with torch.enable_grad():
        added_to(before.requires_grad_(), layer[0], x).sum().backward()
    assert bool((before.grad == 1).all())


@with_onednn
def test_a_skip_that_may_not_be_written_over_is_kept():
    """One made in inference mode, outside of it; one of another dtype; one whose gradient is wanted."""
    layer = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).requires_grad_(False)
    x = torch.randn(1, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    pack_convolutions(layer)
    with torch.inference_mode():
        made_there = x + 1
    for skip in (made_there, (x + 1).double(), (x + 1).requires_grad_()):
        before = skip.detach().clone()
        got = added_to(skip, layer[0], x)
        torch.testing.assert_close(got, before + layer[0](x))
        assert torch.equal(skip, before)


@torch.no_grad()
def test_a_fresh_block_passes_on_what_it_is_given():
    x = torch.randn(2, 16, 5, 7)
    for block in (ResidualBlock(16, 16, 4, 1e-5), ResidualBlock(16, 24, 4, 1e-5)):
        given = block.conv_shortcut(x) if hasattr(block, "conv_shortcut") else x
        assert error(block(x.clone()), given + block.conv2.bias[:, None, None]) < 1e-6


@torch.no_grad()
def test_attention_downsampling_and_upsampling_written_out():
    """In float64, by the formulas: no SiLU before the attention; zeros after the last row and column alone."""
    x = torch.randn(2, 8, 4, 6)
    attention, down, up = Attention(8, 2, 1e-5), Downsample(8), Upsample(8)
    tokens = F.group_norm(x.double(), 2, eps=1e-5).flatten(2).mT
    q, k, v = (
        F.linear(tokens, w.weight.double(), w.bias.double()) for w in (attention.to_q, attention.to_k, attention.to_v)
    )
    mixed = (q @ k.mT / 8**0.5).softmax(-1) @ v
    out = F.linear(mixed, attention.to_out[0].weight.double(), attention.to_out[0].bias.double())
    assert error(attention(x), x + out.mT.unflatten(2, (4, 6))) < 1e-6  # a few roundings of float32
    wide = torch.zeros(2, 8, 5, 7, dtype=torch.float64)
    wide[..., :4, :6] = x
    assert error(down(x), F.conv2d(wide, down.conv.weight.double(), down.conv.bias.double(), stride=2)) < 1e-6
    doubled = x.double().repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert error(up(x), F.conv2d(doubled, up.conv.weight.double(), up.conv.bias.double(), padding=1)) < 1e-6

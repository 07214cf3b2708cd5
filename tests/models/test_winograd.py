"""Convolutions with a quarter of the products, against float64 and against the layer that they stand for."""

import pytest
import torch
from torch import nn

from lfm_fast.models import winograd
from lfm_fast.models.winograd import Winograd, transforms, with_fewer_products

SHAPES = [(1, 128, 128, 4, 4), (3, 128, 160, 8, 20), (7, 129, 128, 16, 12), (1, 256, 128, 64, 36)]


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def layer(channels, out_channels, **options):
    torch.manual_seed(0)
    return nn.Conv2d(channels, out_channels, 3, padding=1, **options).requires_grad_(False)


def maps(*shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def test_the_transforms_are_a_convolution():
    """Four sums over three neighbours of six numbers, as the definition of a convolution has them, exactly."""
    to_products, to_weights, to_pixels = transforms()
    d, g = torch.randn(6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    want = torch.stack([d[i : i + 3] @ g for i in range(4)])
    torch.testing.assert_close(to_pixels @ ((to_weights @ g) * (to_products @ d)), want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("numbers", [winograd._NUMBERS, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_convolution(shape, numbers, bias, monkeypatch):
    """Whether taken whole or by rows of tiles; twice a plain convolution's rounding, which is 1e-6."""
    monkeypatch.setattr(winograd, "_NUMBERS", numbers)
    monkeypatch.setattr(winograd, "_FEWEST_TILES", 64 if numbers > 1 else 1)
    batch, channels, out_channels, *sides = shape
    conv, x = layer(channels, out_channels, bias=bias), maps(batch, channels, *sides)
    fast = Winograd(conv)
    want = conv.double()(x.double())
    conv.float()
    got = fast(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, want) < 3e-6
    skip = maps(batch, out_channels, *sides)
    expected = skip.double() + want
    summed = fast.added_to(skip, x)
    assert summed.data_ptr() == skip.data_ptr()
    assert error(summed, expected) < 3e-6


@pytest.mark.parametrize("sides", [(6, 8), (8, 7), (1, 1)])
def test_sides_that_are_no_multiples_of_four_are_the_layers_own(sides):
    conv, x = layer(128, 128), maps(2, 128, *sides)
    skip = maps(2, 128, *sides)
    fast, kept = Winograd(conv), skip.clone()
    assert torch.equal(fast(x), conv(x))
    assert torch.equal(fast.added_to(skip, x), kept + conv(x))


def test_no_maps_and_a_skip_in_another_order_are_the_layers_own():
    conv, x = layer(128, 128), maps(2, 128, 8, 8)
    fast, skip = Winograd(conv), maps(2, 128, 8, 8).contiguous()
    assert error(fast.added_to(skip, x), skip.double() + conv.double()(x.double())) < 3e-6
    conv.float()
    assert skip.is_contiguous()
    assert Winograd(conv)(x[:0]).shape == (0, 128, 8, 8)


def test_layers_that_are_not_worth_it_or_of_another_kind_stay():
    kept = [
        nn.Conv2d(64, 256, 3, padding=1),
        nn.Conv2d(128, 128, 3),
        nn.Conv2d(128, 128, 3, padding=1, stride=2),
        nn.Conv2d(128, 128, 3, padding=1, groups=2),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2),
        nn.Conv2d(128, 128, 3, padding=1, dilation=(2, 1)),
        nn.Conv2d(128, 128, 3, padding=(1, 0)),
        nn.Conv2d(128, 128, 3, padding=1, stride=(1, 2)),
        nn.Conv2d(128, 128, 1),
        nn.Conv2d(128, 128, 3, padding=1).bfloat16(),
    ]
    network = nn.Sequential(*kept, nn.Sequential(layer(128, 130)))
    with_fewer_products(network)
    assert list(network)[:-1] == kept
    assert isinstance(network[-1][0], Winograd)

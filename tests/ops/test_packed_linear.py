"""packed_linear on the processor's matrix tiles, against PyTorch's own linear layer in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_same_bits
from row_cases import ROWS

from lfm_fast import ops
from lfm_fast.ops.packed_linear import pack, parts_of, unpack

ROW = ROWS["packed_linear"]
TILES = ROW.named("cpp").available()  # why there are none
with_tiles = pytest.mark.skipif(TILES is not None, reason=str(TILES))


def layer(rows, inner, outer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inner, generator=generator).bfloat16()
    weight = (torch.randn(outer, inner, generator=generator) / max(inner, 1) ** 0.5).bfloat16()
    return x, weight, torch.randn(outer, generator=generator).bfloat16()


@pytest.mark.parametrize("shape", [(50, 70), (32, 32), (1, 1), (31, 33), (96, 16), (0, 5), (5, 0)])
def test_packing_keeps_every_weight_and_adds_zeros(shape):
    weight = torch.randn(shape).bfloat16()
    packed = pack(weight)
    assert_same_bits(unpack(packed, *shape), weight)
    assert packed.abs().float().sum() == pytest.approx(float(weight.abs().float().sum()), rel=1e-6)
    assert packed.is_contiguous()


def test_a_tile_holds_pairs_of_inputs_of_sixteen_outputs():
    """The order that the processor's manual gives for the right factor, written out."""
    weight = torch.arange(64 * 64).reshape(64, 64).float().remainder(251).bfloat16()
    packed = pack(weight)
    for panel, step, half, pair, column, i in itertools.product(
        range(2), range(2), range(2), (0, 7, 15), (0, 15), range(2)
    ):
        want = weight[32 * panel + 16 * half + column, 32 * step + 2 * pair + i]
        assert packed[panel, step, 0, half, pair, column, i] == want


# (rows, inputs, outputs): whole and cut tiles, strips and panels; several blocks, groups of panels and parts of a sum
SIZES = [
    (32, 32, 32),
    (33, 31, 17),
    (64, 96, 48),
    (1, 64, 16),
    (15, 40, 15),
    (300, 128, 80),
    (40, 1100, 40),
    (40, 1024, 70),
]
SIZES += [(300, 2080, 500), (600, 384, 1200)]


@with_tiles
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("rows", "inner", "outer"), SIZES)
def test_is_right(rows, inner, outer, gelu):
    """Sums of products of order 1 / inner in float32, one rounding to 8 bits, and the logistic function's 1.5e-4."""
    x, weight, bias = layer(rows, inner, outer)
    with ops.use_backend("cpp", ops="packed_linear"):
        got = ops.packed_linear(x, pack(weight), bias, outer, gelu)
    want = F.linear(x.double(), weight.double(), bias.double())
    want = F.gelu(want, approximate="tanh") if gelu else want
    assert_close(got, want, absolute=2e-4 if gelu else 2e-5, relative=2.0**-8, what=f"{rows} {inner} {outer}")


def float_layer(rows, inner, outer, seed=0):
    """Rows of very different size, so that none hides behind another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inner, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    weight = torch.randn(outer, inner, generator=generator) / max(inner, 1) ** 0.5
    return x, weight, torch.randn(outer, generator=generator)


def test_three_parts_are_the_number_itself():
    """24 bits are three times 8, at any size that leaves the last part a normal number."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-25, 30, 1000)
    assert_same_bits(sum(part.float() for part in reversed(parts_of(x, 3))), x)
    two = sum(part.double() for part in parts_of(x, 2))
    assert ((two - x).abs() <= x.double().abs() * 2.0**-17).all()
    assert_same_bits(unpack(pack(x.view(20, 50), 3), 20, 50), x.view(20, 50))


@with_tiles
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(("rows", "inner", "outer"), SIZES)
def test_float32_is_right_row_by_row(rows, inner, outer, parts, gelu):
    """Of |x| |W|: sums of `inner` products in float32, the products that three or two parts leave out (three of 2^-24
    or one of 2^-18, and with two parts what both factors lose), GELU, whose slope is at most 1.13, and its rounding."""
    x, weight, bias = float_layer(rows, inner, outer)
    with ops.use_backend("cpp", ops="packed_linear"):
        got = ops.packed_linear(x, pack(weight, parts), bias, outer, gelu)
    want = F.linear(x.double(), weight.double(), bias.double())
    want = F.gelu(want, approximate="tanh") if gelu else want
    size = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    bound = {3: 4 + inner**0.5, 2: 3 * 2**7}[parts] * 2.0**-24 * size
    assert ((got - want).abs() <= bound).all(), float(((got - want).abs() / bound).max())


@with_tiles
def test_float32_is_as_exact_as_pytorchs_own():
    x, weight, bias = float_layer(300, 384, 200)
    want = F.linear(x.double(), weight.double(), bias.double())
    ours = (ROW.kernels["cpp"](x, pack(weight, 3), bias, 200, False) - want).norm(dim=1)
    plain = (F.linear(x, weight, bias) - want).norm(dim=1)
    assert (ours < 2 * plain).double().mean() > 0.95


@with_tiles
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so_in_float32(value):
    x, weight, bias = float_layer(5, 40, 8)
    clean = ROW.kernels["cpp"](x, pack(weight, 3), bias, 8, False)
    x[2, 7] = value
    got = ROW.kernels["cpp"](x, pack(weight, 3), bias, 8, False)
    assert not got[2].isfinite().any()
    assert_same_bits(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@with_tiles
@pytest.mark.parametrize(("rows", "inner", "outer"), [(300, 96, 200), (40, 1100, 100), (3, 2080, 40)])
@pytest.mark.parametrize("parts", [1, 3])
def test_threads_do_not_change_a_bit(rows, inner, outer, parts):
    x, weight, bias = layer(rows, inner, outer) if parts == 1 else float_layer(rows, inner, outer)
    packed, before, results = pack(weight, parts), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ROW.kernels["cpp"](x, packed, bias, outer, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@with_tiles
def test_gelu_of_numbers_without_end():
    """One input passed through: what GELU makes of infinities and NaN, as PyTorch's own has it."""
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 0.0, -0.0, 20.0, -20.0]).bfloat16()[
        :, None
    ]
    got = ROW.kernels["cpp"](x, pack(torch.ones(1, 1)), None, 1, True)
    want = F.gelu(x.float(), approximate="tanh")
    torch.testing.assert_close(got.float(), want, rtol=2.0**-8, atol=1e-4, equal_nan=True)


@with_tiles
def test_a_row_that_is_nan_leaves_the_others_alone():
    x, weight, bias = layer(40, 64, 48)
    packed = pack(weight)
    clean = ROW.kernels["cpp"](x, packed, bias, 48, False)
    x[7, 3] = float("nan")
    got = ROW.kernels["cpp"](x, packed, bias, 48, False)
    assert got[7].isnan().all()
    others = torch.arange(40) != 7
    assert_same_bits(got[others], clean[others])


def test_a_gradient_is_refused():
    x, weight, bias = layer(2, 4, 3)
    with pytest.raises(ValueError, match="no gradient for x"):
        ops.packed_linear(x.requires_grad_(), pack(weight), bias, 3)


def test_weights_of_another_layer_are_refused():
    x, weight, bias = layer(2, 40, 3)
    with pytest.raises(ValueError, match=r"weight is \(1, 2, 1, 2, 16, 16, 2\), expected \(2, 2"):
        ops.packed_linear(x, pack(weight), None, 33)
    with pytest.raises(ValueError, match=r"expected \(1, 2, 2, 2, 16, 16, 2\) or \(1, 2, 3, 2, 16, 16, 2\)"):
        ops.packed_linear(x.float(), pack(weight), None, 3)
    with pytest.raises(ValueError, match=r"which packed_linear\.pack makes"):
        ops.packed_linear(x, weight, None, 3)
    with pytest.raises(ValueError, match=r"bias is \(3,\), expected \(4,\)"):
        ops.packed_linear(x, pack(torch.ones(4, 40)), bias, 4)

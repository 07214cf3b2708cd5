"""packed_linear_int8: whole numbers and their sums to the bit, and the layer they stand for in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_same_bits
from row_cases import ROWS

from lfm_fast import ops
from lfm_fast.ops.packed_linear_int8 import pack, quantise, unpack

ROW = ROWS["packed_linear_int8"]
TILES = ROW.named("cpp").available()  # why there are none
with_tiles = pytest.mark.skipif(TILES is not None, reason=str(TILES))


def layer(rows, inner, outer, seed=0):
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inner, generator=generator) * torch.logspace(-6, 6, max(rows, 1))[:rows, None]
    weight = torch.randn(outer, inner, generator=generator) / max(inner, 1) ** 0.5
    return x.bfloat16(), weight, torch.randn(outer, generator=generator).bfloat16()


@pytest.mark.parametrize("shape", [(50, 70), (32, 64), (1, 1), (31, 129), (96, 16), (0, 5), (5, 0)])
def test_packing_keeps_every_number_and_adds_zeros(shape):
    weight = torch.randn(shape)
    packed, scale = pack(weight)
    whole, size = quantise(weight)
    assert torch.equal(scale, size)
    assert torch.equal(unpack(packed, scale, shape[1]), whole.float() * scale[:, None])
    assert packed.abs().sum(dtype=torch.int64) == whole.abs().sum(dtype=torch.int64)
    assert packed.is_contiguous()
    again, same = pack(unpack(packed, scale, shape[1]))  # what a state dict goes through
    assert torch.equal(again, packed)
    torch.testing.assert_close(same, scale, rtol=2.0**-22, atol=0.0)


def test_a_tile_holds_two_pairs_of_inputs_of_sixteen_outputs():
    """The processor multiplies four neighbouring bytes of a lane; which four inputs they are is ours to say."""
    weight = torch.arange(64 * 128).reshape(64, 128).remainder(251).float() - 125.0
    weight[:, 0] = 127.0  # so that the scale is 1
    packed, scale = pack(weight)
    assert torch.equal(scale, torch.ones(64))
    for panel, step, half, row, column, i in itertools.product(
        range(2), range(2), range(2), (0, 7, 15), (0, 15), range(4)
    ):
        want = weight[32 * panel + 16 * half + column, 64 * step + 32 * (i // 2) + 2 * row + i % 2]
        assert packed[panel, step, half, row, column, i] == want


def test_numbers_are_rounded_to_the_nearest_of_255():
    rows = torch.randn(40, 300, dtype=torch.float64).float() * torch.logspace(-20, 20, 40)[:, None]
    whole, scale = quantise(rows)
    assert whole.abs().amax(-1).tolist() == [127] * 40
    off = (whole.double() * scale.double()[:, None] - rows.double()).abs() / scale.double()[:, None]
    assert off.max() <= 0.5 + 127 * 2.0**-24  # the scale itself is rounded to 24 bits


# (rows, inputs, outputs): whole and cut tiles, strips and panels; several blocks, groups of panels and parts of a sum
SIZES = [(32, 64, 32), (33, 63, 17), (64, 192, 48), (1, 65, 16), (15, 33, 15), (300, 128, 80), (40, 1, 40)]
SIZES += [(300, 2500, 500), (600, 384, 1200), (40, 4200, 70)]


@with_tiles
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("rows", "inner", "outer"), SIZES)
def test_its_whole_numbers_are_summed_exactly(rows, inner, outer, gelu):
    """Against int64. What is left: three roundings to 24 bits, one to 8, and the logistic function's 1.5e-4."""
    x, weight, bias = layer(rows, inner, outer)
    packed, scale = pack(weight)
    with ops.use_backend("cpp", ops="packed_linear_int8"):
        got = ops.packed_linear_int8(x, packed, scale, bias, outer, gelu)
    (a, size), (b, _) = quantise(x), quantise(weight)
    sums = a.to(torch.int64) @ b.to(torch.int64).t()
    want = sums.double() * size.double()[:, None] * scale.double() + bias.double()
    want = F.gelu(want, approximate="tanh") if gelu else want
    bound = {"absolute": 2e-4, "relative": 2.0**-8} if gelu else {"absolute": 1e-6, "relative": 2.0**-21}
    assert_close(got, want, **bound, what=f"{rows} {inner} {outer}")


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=with_tiles)])
def test_it_is_the_layer_up_to_the_rounding_of_its_factors(backend):
    """An error of up to half a scale in each factor: |y - x W^T| <= (s_x sum |w| + s_w sum |x|) / 2 + K s_x s_w / 4."""
    x, weight, _ = layer(70, 200, 90)
    packed, scale = pack(weight)
    with ops.use_backend(backend, ops="packed_linear_int8"):
        got = ops.packed_linear_int8(x, packed, scale, None, 90).double()
    size, columns = quantise(x)[1].double()[:, None], scale.double()
    want = x.double() @ weight.double().t()
    bound = (size * weight.double().abs().sum(1) + columns * x.double().abs().sum(1, True)) / 2 + 50 * size * columns
    off = (got - want).abs()
    assert (off <= bound + 2.0**-8 * want.abs()).all()
    assert off.norm() < 0.02 * want.norm()  # 255 steps over +-3.5 deviations: 0.8 % of each factor, on average


@with_tiles
def test_float32_biases_and_none():
    x, weight, bias = layer(5, 64, 40)
    packed, scale = pack(weight)
    kernel = ROW.kernels["cpp"]
    assert_same_bits(kernel(x, packed, scale, bias, 40, False), kernel(x, packed, scale, bias.float(), 40, False))
    zero = torch.zeros(40)
    assert_same_bits(kernel(x, packed, scale, None, 40, False), kernel(x, packed, scale, zero, 40, False))


@with_tiles
@pytest.mark.parametrize(("rows", "inner", "outer"), [(300, 96, 200), (40, 4200, 100), (3, 2080, 400)])
def test_threads_do_not_change_a_bit(rows, inner, outer):
    x, weight, bias = layer(rows, inner, outer)
    (packed, scale), before, results = pack(weight), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ROW.kernels["cpp"](x, packed, scale, bias, outer, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=with_tiles)])
def test_rows_of_zeros_tiny_numbers_and_none_at_all(backend):
    """A row of zeros gives the bias; one with an infinity or NaN gives NaN, and leaves the others alone."""
    x, weight, bias = layer(40, 70, 48)
    packed, scale = pack(weight)
    with ops.use_backend(backend, ops="packed_linear_int8"):
        clean = ops.packed_linear_int8(x, packed, scale, bias, 48)
        x[3], x[5], x[7, 3], x[9, 69] = 0.0, 1e-38, float("nan"), float("-inf")
        got = ops.packed_linear_int8(x, packed, scale, bias, 48)
    assert_same_bits(got[3], bias)
    assert_same_bits(got[5], bias)
    assert got[[7, 9]].isnan().all()
    others = torch.tensor([i for i in range(40) if i not in (3, 5, 7, 9)])
    assert_same_bits(got[others], clean[others])


def test_a_gradient_is_refused():
    x, weight, bias = layer(2, 4, 3)
    with pytest.raises(ValueError, match="no gradient for x"):
        ops.packed_linear_int8(x.requires_grad_(), *pack(weight), bias, 3)


def test_weights_of_another_layer_are_refused():
    x, weight, _ = layer(2, 70, 3)
    packed, scale = pack(weight)
    with pytest.raises(ValueError, match=r"weight is \(1, 2, 2, 16, 16, 4\), expected \(2, 2"):
        ops.packed_linear_int8(x, packed, scale, None, 33)
    with pytest.raises(ValueError, match="weight is bfloat16, expected int8"):
        ops.packed_linear_int8(x, weight.bfloat16(), scale, None, 3)
    with pytest.raises(ValueError, match="scale is bfloat16, expected float32"):
        ops.packed_linear_int8(x, packed, scale.bfloat16(), None, 3)
    with pytest.raises(ValueError, match=r"bias is \(4,\), expected \(3,\)"):
        ops.packed_linear_int8(x, packed, scale, torch.ones(4), 3)

"""group_norm_silu against PyTorch's own group_norm, silu and autograd, in both layouts and for any share of work."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_same_bits
from row_cases import ROWS

from lfm_fast import ops

FORMATS = (torch.contiguous_format, torch.channels_last)


def inputs(shape, dtype=torch.float32, memory_format=torch.contiguous_format, mean=0.5):
    g = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=g) * 1.5 + mean).to(dtype)
    weight, bias = torch.randn(shape[1], generator=g), torch.randn(shape[1], generator=g)
    return x.contiguous(memory_format=memory_format), weight, bias, torch.randn(shape, generator=g).to(dtype)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("silu", [True, False])
def test_it_is_pytorchs_group_norm_and_silu_with_their_gradients(silu, dtype, memory_format, backend):
    """Tolerance: results and gradients below 40 from sums of 300 terms in float32; 16 bits round once more.

    Gradients in weight and bias sum 600 terms below 20, with signs that differ.
    """
    x, weight, bias, factor = inputs((2, 12, 10, 15), dtype, memory_format)
    mine, theirs = ([t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2))
    theirs = [t.detach().double().requires_grad_() for t in theirs]
    y = ops.group_norm_silu(mine[0], 6, mine[1], mine[2], 1e-3, silu)
    want = F.group_norm(theirs[0], 6, theirs[1], theirs[2], 1e-3)
    want = F.silu(want) if silu else want
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    assert_close(y, want, absolute=1e-5, what="y")
    (y * factor).sum().backward()
    (want * factor.double()).sum().backward()
    for name, got, w in zip(("x", "weight", "bias"), mine, theirs):
        assert got.grad.dtype is got.dtype
        assert_close(got.grad, w.grad, absolute=1e-4, relative=1e-5, what=f"gradient in {name}")


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_groups_are_shared_between_threads_without_changing_a_bit(dtype, memory_format, silu, library):
    """One thread does group by group, many threads with few groups go over all chunks in each stage."""
    x, weight, bias, grad = inputs((1, 4, 97, 103), dtype, memory_format)
    forward, backward = ROWS["group_norm_silu"].kernels["cpp"], ROWS["group_norm_silu_backward"].kernels["cpp"]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for groups in (1, 2, 4):
                y, mean, rstd = forward(x, groups, weight, bias, 1e-5, silu)
                gradients = backward(grad, x, mean, rstd, weight, bias, groups, silu)
                found.append((groups, (y, mean, rstd, *gradients)))
    finally:
        torch.set_num_threads(before)
    for (groups, one), (others, another) in itertools.product(found[:3], found[3:]):
        if groups == others:
            for a, b in zip(one, another):
                assert_same_bits(a, b, f"{groups} groups")


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_mean_far_from_zero_costs_no_digits(memory_format, library):
    """Sums of squares would: mean 1000 and deviation 1.5 leave no digit of the variance in float32.

    What stays is the rounding of x itself and of its mean: 2^-24 of 1000 beside 1.5.
    """
    x, weight, bias, _ = inputs((2, 8, 40, 60), memory_format=memory_format, mean=1000.0)
    with ops.use_backend("cpp", ops="group_norm_silu"):
        got = ops.group_norm_silu(x, 4, weight, bias, 1e-5, False)
    want = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)
    assert_close(got, want, absolute=1000 * 2.0**-23 * weight.abs().max().item())


def test_gradients_are_wanted_of_parameters_alone(backend):
    x, weight, bias, factor = inputs((2, 4, 5, 3))
    weight.requires_grad_()
    (ops.group_norm_silu(x, 2, weight, bias) * factor).sum().backward()
    wide = weight.detach().double().requires_grad_()
    (F.silu(F.group_norm(x.double(), 2, wide, bias.double())) * factor).sum().backward()
    assert_close(weight.grad, wide.grad, absolute=1e-4)


def test_channels_last_comes_in_and_goes_out_without_a_copy(library):
    """The kernel itself writes channels_last, also beside a gradient that is not in it."""
    x, weight, bias, grad = inputs((2, 4, 5, 3), memory_format=torch.channels_last)
    y, mean, rstd = ROWS["group_norm_silu"].kernels["cpp"](x, 2, weight, bias, 1e-5, True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for other in (grad, grad.contiguous(memory_format=torch.channels_last)):
        kernel = ROWS["group_norm_silu_backward"].kernels["cpp"]
        found = kernel(other, x, mean, rstd, weight, bias, 2, True)
        want = kernel(grad, x.contiguous(), mean, rstd, weight, bias, 2, True)
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        for a, b in zip(found, want):
            assert_close(a, b, absolute=1e-5, relative=1e-5)


WRONG = [
    ({"num_groups": 3}, "num_groups is 3, expected a positive divisor of the 4 channels of x"),
    ({"num_groups": 0}, "num_groups is 0, expected a positive divisor"),
    ({"num_groups": 2.0}, "num_groups is a float: pass an int"),
    ({"weight": torch.ones(3)}, r"weight is \(3,\), expected \(4,\): one value per channel"),
    ({"bias": torch.ones(4).double()}, "bias is float64 but x is not"),
    ({"x": torch.ones(4)}, r"x is \(4,\), expected \(B, C, ...\)"),
    ({"eps": -1.0}, "eps is -1.0, expected a number >= 0"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_a_wrong_argument_is_named(changes, sentence):
    good = {"x": torch.ones(3, 4, 5), "num_groups": 2, "weight": torch.ones(4), "bias": torch.ones(4), "eps": 1e-5}
    with pytest.raises(ValueError, match=sentence) as caught:
        ops.group_norm_silu(**{**good, **changes})
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["grad_y", "mean", "rstd", "weight", "bias"])
def test_the_compiled_backward_refuses_what_does_not_fit(name, library):
    row = ROWS["group_norm_silu_backward"]
    args = list(row.bind(**row.arguments(**row.cases[0])))
    position = row.argument_names.index(name)
    for spoil in (lambda x: x[:-1], lambda x: x.to(torch.int32), lambda x: x[None]):
        with pytest.raises(RuntimeError, match=name):
            row.kernels["cpp"](*args[:position], spoil(args[position]), *args[position + 1 :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_silu_in_16_bits_is_silu_rounded_once_for_every_number(memory_format, dtype):
    """With weights of 0 the bias alone is what SiLU is taken of: all numbers of 16 bits, of which the compiled kernel
    makes infinity from 2.3e38 on, and others. Half a unit in the last place and 2^-8 of that, or the distance of the
    smallest numbers, and 0 where e^-x is 2^128 and more."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    values = torch.cat([values[values.abs() <= 2.3e38], torch.linspace(-130, 130, 4001), torch.tensor([-3e38, -6e4])])
    x = torch.randn(1, len(values), 2, 2).to(dtype).contiguous(memory_format=memory_format)
    y = ops.group_norm_silu(x, 1, torch.zeros(len(values)), values)
    want = F.silu(values.double())[:, None].expand(-1, 4)
    least = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 128 * 2.0**-128)
    bound = want.abs() * (torch.finfo(dtype).eps / 2 * (1 + 2**-8)) + least
    assert bool(((y.double().flatten(2)[0] - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_silu_of_what_is_no_number(memory_format, dtype):
    values = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf")])
    x = torch.randn(1, 4, 2, 2).to(dtype).contiguous(memory_format=memory_format)
    y = ops.group_norm_silu(x, 1, torch.zeros(4), values)[0, :, 0, 0]
    assert torch.equal(y.isnan()[:3], torch.tensor([True, True, False]))
    assert y[2] == float("inf")
    assert y[3] == 0 if dtype is torch.bfloat16 else y[3].isnan()  # the limit, or what -inf / inf is


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_no_nan_of_a_parameter_is_rounded_to_a_number(memory_format, silu):
    """Rounding adds to the bits of a number, and these NaN have no room for more."""
    full = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    x = torch.randn(1, 2, 5, 7).bfloat16().contiguous(memory_format=memory_format)
    for weight, bias in ((full, torch.zeros(2)), (torch.ones(2), full)):
        assert bool(ops.group_norm_silu(x, 1, weight, bias, silu=silu).isnan().all())


@pytest.mark.parametrize("positions", [(3, 5), (64, 65)])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_channels_innermost_far_from_zero_and_with_numbers_that_stand_out(positions, offset):
    """Sums are of distances from the mean of a chunk's first row, so that neither an offset nor a first pixel that
    stands out costs more than a few bits."""
    x = torch.randn(2, 8, *positions, generator=torch.Generator().manual_seed(0)) + offset
    x[0, :, 0, 0] = offset + 1000
    x = x.contiguous(memory_format=torch.channels_last)
    got, want = ops.group_norm_silu(x, 2), F.silu(F.group_norm(x.double(), 2))
    # numbers of float32 of this size are 2^-23 of it apart, and the norm divides them by 1 at least
    torch.testing.assert_close(got.double(), want, atol=1e-5 + offset * 2**-22, rtol=1e-4)

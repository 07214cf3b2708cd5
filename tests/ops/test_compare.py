"""The comparison helper accepts what it should and names what it refuses."""

import math

import pytest
import torch
from compare import assert_close, assert_same_bits


def test_names_the_worst_pair_and_the_share():
    want = torch.zeros(2, 5)
    got = want.clone()
    got[0, 1], got[1, 3] = 0.5, -2.0
    with pytest.raises(AssertionError, match=r"2 of 10 elements \(20.00%\).*worst at \(1, 3\): got -2.0, expected 0.0"):
        assert_close(got, want, absolute=0.1)


def test_bounds_are_inclusive_and_relative_to_the_expectation():
    assert_close(torch.tensor([101.0]), torch.tensor([100.0]), relative=0.01)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([101.1]), torch.tensor([100.0]), relative=0.01)


@pytest.mark.parametrize(("got", "want"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, -math.inf), (1.0, math.inf)])
def test_non_finite_values_never_pass_for_finite_ones(got, want):
    with pytest.raises(AssertionError, match=r"100\.00%"):
        assert_close(torch.tensor([got]), torch.tensor([want]), absolute=1e30, relative=1.0)


def test_equal_non_finite_values_pass():
    values = torch.tensor([math.nan, math.inf, -math.inf])
    assert_close(values, values.clone())


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(3), torch.zeros(3, 1))


def test_half_a_unit_is_granted_to_16_bit_floats_only():
    want = torch.tensor([1.0 + 2**-9], dtype=torch.float64)
    assert_close(want.bfloat16(), want)
    with pytest.raises(AssertionError):
        assert_close(want.bfloat16().float(), want)


def test_bits_tell_zeros_apart():
    assert_same_bits(torch.tensor([0.0, math.nan]), torch.tensor([0.0, math.nan]))
    with pytest.raises(AssertionError, match="1 of 1"):
        assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))

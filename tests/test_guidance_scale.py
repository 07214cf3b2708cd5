"""The one parameter gamma: a number, one per sample, a function of time or a table, in an interval."""

import math

import pytest
import torch

import lfm_fast
from lfm_fast.guidance import LinearGuidance, Rows
from lfm_fast.guidance.scale import Scale, sums

B, NULL = 4, 9
Z = torch.randn(B, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([1, 2, 3, 4])
T = torch.tensor([0.9, 0.5, 0.3, 0.1], dtype=torch.float64)
EACH = torch.tensor([1.0, 2.0, 1.0, -0.5])


def scales(scale, t=T, time=None, samples=None):
    """(gamma, rows) as a list and the numbers of those guided, None standing for all."""
    found, rows = scale(samples, t, Z[: len(t)], time)
    assert found is None or (found.dtype == Z.dtype and found.shape == t.shape)
    return found if found is None else found.tolist(), rows if rows is None else rows.numbers


def test_a_number_and_one_per_sample():
    assert scales(Scale(2.5)) == ([2.5] * B, None)
    assert scales(Scale(torch.tensor(2.5))) == ([2.5] * B, None)
    assert scales(Scale(1.0)) == (None, None)
    assert scales(Scale(0.0, none=0.0)) == (None, None)
    assert scales(Scale(EACH)) == ([1.0, 2.0, 1.0, -0.5], [1, 3])
    assert scales(Scale(EACH + 4)) == ([5.0, 6.0, 5.0, 3.5], None)
    assert scales(Scale(torch.ones(B))) == (None, None)
    assert [Scale(x).trivial for x in (1, 1.0, torch.ones(B), 2.0, EACH, lambda t: t)] == [True] * 3 + [False] * 3


def test_the_interval_is_of_each_samples_own_time():
    assert scales(Scale(2.5, (0.3, 0.5))) == ([1.0, 2.5, 2.5, 1.0], [1, 2])
    assert scales(Scale(EACH, (0.05, 0.5))) == ([1.0, 2.0, 1.0, -0.5], [1, 3])
    assert scales(Scale(EACH, (0.2, 0.5))) == ([1.0, 2.0, 1.0, 1.0], [1])
    assert scales(Scale(EACH, (0.2, 0.4))) == (None, None)
    assert scales(Scale(2.5, (0.2, 0.4)), time=0.4) == ([2.5] * B, None)  # the time that all share says all
    assert scales(Scale(2.5, (0.2, 0.4)), time=0.41) == (None, None)


def test_what_is_of_one_sample_follows_it_into_a_smaller_batch():
    scale = Scale(EACH, (0.2, 1.0))
    for numbers, expected in (([3, 1], ([1.0, 2.0], [1])), ([0, 2], (None, None)), ([1], ([2.0], None))):
        assert scales(scale, T[numbers], samples=Rows(numbers, torch.tensor(numbers))) == expected
    assert scales(scale) == ([1.0, 2.0, 1.0, 1.0], [1])  # the whole batch again
    part = Scale(EACH).part(torch.tensor([3, 0]))
    assert scales(part, T[:2]) == ([-0.5, 1.0], [0])


def test_nothing_is_made_anew_while_nothing_changes():
    scale = Scale(EACH)
    first, again = scale(None, T, Z), scale(None, T - 0.1, Z)
    assert first[0] is again[0]
    assert first[1] is again[1]
    assert scale(None, T, Z.float())[0].dtype == torch.float32


TABLE = ((0.2, 1.0), (0.4, 3.0), (0.8, 1.0))


def test_a_table_is_linear_between_its_times_and_constant_beyond():
    for rows in (TABLE, list(reversed(TABLE)), [list(row) for row in TABLE]):
        scale = Scale(rows)
        found, rows = scales(scale)
        assert found == pytest.approx([1.0, 2.5, 2.0, 1.0], rel=1e-15)
        assert rows == [1, 2]
        for time, gamma in ((0.0, None), (0.2, None), (0.3, 2.0), (0.4, 3.0), (0.6, 2.0), (0.8, None), (1.0, None)):
            at = scales(scale, time=time)
            assert at == (None, None) if gamma is None else at[0] == pytest.approx([gamma] * B, rel=1e-15)
    assert scales(Scale(((0.5, 7.0),))) == ([7.0] * B, None)


@pytest.mark.parametrize("method", ["euler", "heun", "torchdiffeq:midpoint"])
def test_a_function_of_time_costs_two_forwards_only_where_it_guides(method):
    def gamma(t):
        return torch.where((t > 0.26) & (t < 0.66), 1.0 + 4 * t, 1.0)

    def model(t, z, y):
        return z * t[:, None, None] + torch.where(y == NULL, 0.25, y)[:, None, None]

    def by_hand(t, z):
        s = gamma(t)[:, None, None]
        return s * model(t, z, Y) + (1 - s) * model(t, z, torch.full_like(Y, NULL))

    settings = {"method": method, "num_steps": 10, "return_stats": True}
    guided = {"y": Y, "null_label": NULL, **settings}
    expected, plain = lfm_fast.sample(by_hand, Z, **settings)
    inside = {"euler": 4, "heun": 8, "torchdiffeq:midpoint": 8}[method]  # evaluations at 0.65 to 0.3
    for how in ({"guidance_scale": gamma}, {"guidance": LinearGuidance(gamma)}):
        found, stats = lfm_fast.sample(model, Z, **how, **guided)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert stats.forwards.tolist() == (plain.nfe + inside).tolist()
    both = {"guidance_scale": gamma, "guidance_interval": (0.46, 1.0)}
    assert lfm_fast.sample(model, Z, **both, **guided)[1].forwards.tolist() == (plain.nfe + inside // 2).tolist()


def test_a_function_may_be_of_numbers_in_any_shape_and_type():
    assert scales(Scale(lambda t: 2)) == ([2.0] * B, None)
    assert scales(Scale(lambda t: 1 + 2 * (t > 0.4))) == ([3.0, 3.0, 1.0, 1.0], [0, 1])
    assert scales(Scale(lambda t: 1 + 2 * (t > 0.4)), time=0.5) == ([3.0] * B, None)


def unused(*arguments, **more):
    raise AssertionError("the model must not be called")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ((), "expected .*each t once"),
        ((1.0, 2.0, 3.0, 4.0), r"one number per sample is a tensor \(B,\)"),
        (((0.5, 1.0), (0.5, 2.0)), "each t once"),
        (((0.5, math.nan),), "finite numbers"),
        (torch.ones(2), r"\(2,\) torch.float32, expected a number, \(4,\) floating.* the same for all channels"),
        (torch.ones(1, 2, 1), r"\(1, 2, 1\) .*the same for all channels"),
        (torch.ones(B, 1), r"\(4, 1\) .*one number per sample"),
        (torch.ones(B, dtype=torch.int64), "torch.int64, expected a number"),
        (torch.tensor(True), "torch.bool"),
        (True, "guidance_scale is True"),
        (None, "guidance_scale is None"),
        (1 + 1j, r"guidance_scale is \(1\+1j\)"),
        (math.sin, "failed as a function of a tensor of times"),
        (lambda t: t[:2], r"returned \(2,\)"),
        (lambda t: 1 / t, "expected 11 finite numbers"),
        (lambda t: "3", "failed as a function"),
    ],
)
def test_what_is_no_scale_is_refused_before_any_forward(scale, message):
    for how in ({"guidance_scale": scale}, {"guidance_scale": scale, "method": "euler", "num_steps": 2}):
        with pytest.raises(ValueError, match=message) as caught:
            lfm_fast.sample(unused, Z, y=Y, null_label=NULL, **how)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("numel", [30, 1000, 70_000])
def test_a_samples_sum_is_the_same_to_the_bit_whoever_else_is_in_the_batch(numel):
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(5, 2, numel // 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
        torch.set_num_threads(4)  # a sum of one long row is shared out among them
        try:
            whole = sums(x)
            for rows in ([0], [4], [1, 3], [2, 0, 4]):
                assert torch.equal(sums(x[rows]), whole[rows]), rows
        finally:
            torch.set_num_threads(threads)
        torch.testing.assert_close(whole.double(), x.double().sum((1, 2)), rtol=1e-5, atol=1e-3)


def test_a_scale_by_sample_is_the_one_that_was_given():
    scale = torch.tensor([1.0, 2.0, 3.0])
    guidance, expected = LinearGuidance(scale), LinearGuidance(scale.clone())
    scale.copy_(torch.tensor([2.0, 1.0, 1.0]))
    y, z1 = torch.tensor([1, 2, 3]), torch.ones(3, 2)

    def model(t, z, y=None):
        return -z if y is None else y[:, None] - z

    found, known = (
        lfm_fast.sample(model, z1, y=y, guidance=g, method="euler", num_steps=2) for g in (guidance, expected)
    )
    assert torch.equal(found, known)

"""Time grids."""

from itertools import pairwise

import pytest
import torch

from lfm_fast.solvers.grids import time_grid


def test_uniform_has_one_time_more_than_steps_and_hits_the_decimals():
    assert time_grid("uniform", 10) == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert time_grid(None, 2, 0.0, 1.0) == [0.0, 0.5, 1.0]
    assert time_grid(None, 1, 0.7, 0.2) == [0.7, 0.2]


def test_lfm_has_as_many_times_as_num_steps():
    times = time_grid("lfm", 50)
    assert len(times) == 50
    assert (times[0], times[-1]) == (1.0, 1e-5)
    expected = torch.linspace(1.0, 1e-5, 50, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(times, dtype=torch.float64), expected, rtol=1e-14, atol=0)
    assert time_grid("lfm", 3, 0.0, 1.0)[::2] == [1e-5, 1.0]


def test_the_largest_shifts_still_make_a_grid():
    for shift in (1e-6, 1e6):
        times = time_grid(("shift", shift), 1000)
        assert all(after < before for before, after in pairwise(times))


@pytest.mark.parametrize("shift", [0.5, 1, 3.0])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.8, 0.1)])
def test_shift(shift, start, end):
    times = time_grid(("shift", shift), 8, start, end)
    assert len(times) == 9
    assert (times[0], times[-1]) == (start, end)
    u = [t / (shift - (shift - 1) * t) for t in times]  # undo t = s u / (1 + (s - 1) u)
    steps = torch.tensor(u, dtype=torch.float64).diff()
    torch.testing.assert_close(steps, steps.mean().expand(8), rtol=1e-12, atol=0)
    if (start, shift) == (1.0, 3.0):
        assert times[4] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


def test_a_tensor_is_taken_as_it_is_and_only_moved_inside_the_path():
    given = torch.tensor([1.0, 0.6, 0.5, 0.0])
    assert time_grid(given, 99) == given.double().tolist()
    assert time_grid([0.25, 0.5], 99, 0.25, 0.5) == [0.25, 0.5]
    assert time_grid(given.flip(0), 99) == given.flip(0).double().tolist()
    assert time_grid(given, 99, limits=(1e-5, 1.0))[-1] == 1e-5
    assert time_grid("uniform", 4, limits=(1e-5, 1.0))[-1] == 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", 10), "time_grid is 'cosine', expected 'uniform'"),
        ((7, 10), "time_grid is 7"),
        ((("shift",), 10), "time_grid is"),
        ((("shift", 0.0), 10), "has to be a positive number"),
        ((("shift", "2"), 10), "has to be a positive number"),
        ((("shift", 1e308), 10), "has to be a positive number, from 1e-6 to 1e6"),
        ((("shift", 10**400), 10), "has to be a positive number"),
        ((("shift", float("nan")), 10), "has to be a positive number"),
        ((torch.tensor([True, False]), 3), "bool or complex"),
        ((torch.tensor([1, 0.5j]), 3), "bool or complex"),
        (([True, 0.5, 0.0], 3), "bool or complex"),
        (([1, 0.5j], 3), "bool or complex"),
        (("lfm", 1), "give 2 or more"),
        (("uniform", 10, 0.5, 0.5), "nothing to integrate"),
        ((torch.tensor([1.0, 0.5, 0.5, 0.0]), 3), "strictly monotone"),
        ((torch.tensor([1.0, 0.2, 0.5]), 3), "strictly monotone"),
        ((torch.tensor([1.0, float("nan")]), 3), "strictly monotone"),
        ((torch.zeros(2, 2), 3), "expected a 1-D one"),
        ((torch.tensor([1.0]), 3), "at least two"),
        ((torch.tensor([1.5, 0.0]), 3), "expected times in"),
        (([1.0, None], 3), "no number"),
        ((torch.tensor([0.9, 0.0]), 3, 0.5), "t_start is 0.5, time_grid has 0.9 there"),
        ((torch.tensor([0.9, 0.0]), 3, 0.9, 0.5), "t_end is 0.5"),
        ((torch.tensor([0.9, 0.0]), 3, 0.90001), "t_start is 0.90001, time_grid has 0.9 there"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        time_grid(*arguments)


def test_two_times_beyond_the_path_are_refused():
    with pytest.raises(ValueError, match="more than one time outside"):
        time_grid(torch.tensor([1.0, 1e-6, 0.0]), 3, limits=(1e-5, 1.0))

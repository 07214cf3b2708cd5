"""Time grids."""

import json
from itertools import pairwise

import pytest
import torch

import lfm_fast
from lfm_fast.flow.paths import Linear, VarianceExploding, VariancePreserving, VariancePreservingTrig
from lfm_fast.solvers.grids import from_text, is_table, time_grid

PATHS = [
    Linear(),
    Linear(sigma_min=1e-5),
    VariancePreserving(),
    VariancePreservingTrig(),
    VarianceExploding(0.01, 50.0),
]


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


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.81, 0.09)])
def test_quadratic_is_even_in_the_root_of_t(start, end):
    times = time_grid("quadratic", 7, start, end)
    assert (times[0], times[-1], len(times)) == (start, end, 8)
    steps = torch.tensor(times, dtype=torch.float64).sqrt().diff()
    torch.testing.assert_close(steps, steps.mean().expand(7), rtol=1e-12, atol=0)


@pytest.mark.parametrize("width", [1e-3, 0.1, 2, 1e3])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.81, 0.09)])
def test_logit_is_even_in_a_widened_logit_of_t(width, start, end):
    times = time_grid(("logit", width), 7, start, end)
    assert (times[0], times[-1], len(times)) == (start, end, 8)
    t = torch.tensor(times, dtype=torch.float64)
    steps = ((t + width) / (1 - t + width)).log().diff()
    # of times near 1 rounded to 1e-16, each divided by a width of 1e-3; or of a logarithm of all but 1, by its 1e-3
    torch.testing.assert_close(steps, steps.mean().expand(7), rtol=1e-10, atol=0)
    if (start, width) == (1.0, 0.1):
        assert times == time_grid("logit", 7)
        torch.testing.assert_close(t + t.flip(0), torch.ones(8, dtype=torch.float64))  # both ends are as dense


def test_karras_is_that_of_diffusers_from_where_the_noise_is_80_times_the_data():
    """On the straight path sigma / alpha = t / (1 - t): 80 at t = 80 / 81."""
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(18)
    times = torch.tensor(time_grid("karras", 18, 80 / 81, 0.0, Linear()), dtype=torch.float64)
    # its sigmas are float32, from float32 powers of 7: a relative 1e-6
    torch.testing.assert_close(times / (1 - times), scheduler.sigmas.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("rho", [1.0, 7.0])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2)])
def test_karras_is_even_in_a_power_of_noise_per_data(path, rho, start, end):
    times = time_grid(("karras", rho), 9, start, end, path)
    assert len(times) == 10
    assert (times[0], times[-1]) == tuple(min(max(t, path.t_min), path.t_max) for t in (start, end))
    noisy_first = times if start > end else times[::-1]
    assert all(after < before for before, after in pairwise(noisy_first))
    t = torch.tensor(noisy_first, dtype=torch.float64)
    ratio = (path.sigma(t) / path.alpha(t)).clamp(0.002, 80.0)
    last = 9 if ratio[-1] > 0.002 else 8  # where the ends are beyond the paper's, the last step is from its sigma_min
    roots = ratio[: last + 1] ** (1 / rho)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(last), rtol=1e-9, atol=1e-12)


def test_karras_of_one_step_and_of_many():
    assert time_grid("karras", 1, path=Linear()) == [1.0, 0.0]
    assert len(set(time_grid("karras", 1000, path=Linear()))) == 1001


def test_a_file_holds_times(tmp_path):
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"times": [1.0, 0.4, 0.0], "method": "heun"}))
    for kind in (file, str(file)):
        assert is_table(kind)
        assert time_grid(kind, 99) == [1.0, 0.4, 0.0]
    z = lfm_fast.noise(2, (3,))
    by_file, by_list = (lfm_fast.sample(lambda t, z: z, z, method="euler", time_grid=g) for g in (file, [1, 0.4, 0]))
    assert torch.equal(by_file, by_list)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("[1", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1, 0]", "holds no times"),
        ('{"times": 1}', "no times"),
    ],
)
def test_a_file_without_times_is_refused(content, says, tmp_path):
    file = tmp_path / "times.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=f"{file}.*{says}"):
        time_grid(str(file), 3)


def test_a_command_lines_words():
    assert from_text("karras") == "karras"
    assert from_text("karras:3") == ("karras", 3.0)
    assert from_text("a:b.json") == "a:b.json"
    with pytest.raises(ValueError, match="expected a number after shift:"):
        from_text("shift:x")


def test_a_tensor_is_taken_as_it_is_and_only_moved_inside_the_path():
    given = torch.tensor([1.0, 0.6, 0.5, 0.0])
    assert time_grid(given, 99) == given.double().tolist()
    assert time_grid([0.25, 0.5], 99, 0.25, 0.5) == [0.25, 0.5]
    assert time_grid(given.flip(0), 99) == given.flip(0).double().tolist()
    assert time_grid(given, 99, path=VariancePreserving())[-1] == 1e-5
    assert time_grid("uniform", 4, path=VariancePreserving())[-1] == 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", 10), "time_grid is 'cosine', expected 'uniform'"),
        ((7, 10), "time_grid is 7"),
        ((("shift",), 10), "time_grid is"),
        ((("quadratic", 2.0), 10), "time_grid is"),
        (((), 10), "expected a 1-D one"),
        ((("karras", 0.5), 10, 1.0, 0.0, Linear()), "rho has to be a number from 1 to 1000"),
        ((("karras", float("nan")), 10, 1.0, 0.0, Linear()), "rho has to be"),
        (("karras", 10, 1e-3, 0.0, Linear()), "does not cross"),
        (("karras", 10), "needs a path"),
        ((("logit", 0.0), 10), "a has to be a number from 0.001 to 1000"),
        ((("logit", "x"), 10), "a has to be a number"),
        ((("logit", 1.0, 2.0), 10), "time_grid is"),
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
        time_grid(torch.tensor([1.0, 1e-6, 0.0]), 3, path=VariancePreserving())


@pytest.mark.parametrize(
    ("step", "ends", "count", "last"),
    [(0.25, (1.0, 0.0), 4, 0.25), (0.3, (1.0, 0.0), 4, 0.1), (0.1, (1.0, 0.0), 10, 0.1), (1.0, (0.6, 0.1), 1, 0.5),
     (0.4, (0.0, 1.0), 3, 0.2)],
)  # fmt: skip
def test_steps_of_a_size(step, ends, count, last):
    times = torch.tensor(time_grid(("step", step), 99, *ends), dtype=torch.float64)
    sizes = times.diff().abs()
    assert (times[0], times[-1], len(sizes)) == (*ends, count)
    torch.testing.assert_close(sizes[:-1], torch.full((count - 1,), step, dtype=torch.float64))
    assert float(sizes[-1]) == pytest.approx(last)


@pytest.mark.parametrize("step", [0, -0.1, 2, "0.1", True, float("nan")])
def test_a_step_that_is_none(step):
    with pytest.raises(ValueError, match="a step is a number from 1e-06 to 1"):
        time_grid(("step", step), 10)

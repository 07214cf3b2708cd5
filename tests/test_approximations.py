"""Approximations: what they compute, for whom they ask the network, and what they refuse."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import lfm_fast
from lfm_fast.approximations import Reuse, SmallThenLarge, compare
from lfm_fast.cli import main
from lfm_fast.guidance import APG, CFGZeroStar, LinearGuidance

SHAPE = (6,)


def curved(t, z, y=None):
    """Smooth and nonlinear, each element by itself, so that no batch size changes a bit; labels are rates."""
    rate = torch.zeros_like(t) if y is None else 0.3 * y
    return z * (0.5 - t)[:, None] + ((1 + rate)[:, None] * (z + t[:, None])).cos()


def noise(count, seed=0):
    return lfm_fast.noise(count, SHAPE, seed=seed).double()


class ByHand:
    """The velocity of one sample (1, D) as the docstring of Reuse writes it."""

    def __init__(self, threshold):
        self.threshold, self.known, self.rate, self.curvature, self.computed = threshold, [], None, math.inf, 0

    def __call__(self, t, z):
        guess, error = None, math.inf
        if len(self.known) == 2:
            (t_2, z_2, v_2), (t_1, z_1, v_1) = self.known
            s = (t - t_1) / (t_1 - t_2)
            guess = v_1 + s * (v_1 - v_2)
            apart = (z - z_1 - s * (z_1 - z_2)).norm() / z_1.norm()
            bend = abs((t - t_1) * (t - t_2))
            error = self.rate * apart + (self.curvature * bend if bend else 0.0)
        if error < self.threshold:
            return guess
        velocity = curved(torch.tensor([t], dtype=z.dtype), z)
        self.computed += 1
        if self.known and t == self.known[-1][0]:
            self.known[-1] = (t, z, velocity)
            return velocity
        if guess is not None:
            missed = (velocity - guess).norm() / velocity.norm()
            self.curvature = max(0.0, float(missed - self.rate * apart)) / bend
        if self.known:
            _, z_1, v_1 = self.known[-1]
            self.rate = (velocity - v_1).norm() / velocity.norm() / ((z - z_1).norm() / z.norm())
        self.known = [*self.known[-1:], (t, z, velocity)]
        return velocity


@pytest.mark.parametrize(("method", "threshold"), [("euler", 0.02), ("heun", 0.0008), ("heun", 0.02)])
def test_reuse_is_its_formula(method, threshold):
    z_1, reuse, field = noise(1), Reuse(threshold=threshold), ByHand(threshold)
    times = torch.linspace(1, 0, 41, dtype=torch.float64).tolist()
    z_0, stats = lfm_fast.sample(curved, z_1, method=method, time_grid=times, guidance=reuse, return_stats=True)
    z = z_1
    for t, after in pairwise(times):
        velocity, dt = field(t, z), after - t
        if method == "heun":
            velocity = 0.5 * (velocity + field(after, z + dt * velocity))
        z = z + dt * velocity
    asked = int(stats.nfe[0])
    assert 0.1 * asked < field.computed < 0.95 * asked
    assert (reuse.tally.computed, int(stats.forwards[0]), reuse.tally.asked) == (field.computed, field.computed, asked)
    torch.testing.assert_close(z_0, z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["euler", "heun", "ab2"])
def test_a_threshold_of_zero_changes_nothing(method):
    z_1 = noise(3)
    exact, z_0 = (lfm_fast.sample(curved, z_1, method=method, num_steps=9, guidance=g) for g in (None, Reuse(1.0, 0)))
    assert torch.equal(exact, z_0)


def test_what_is_linear_in_time_is_extrapolated_exactly():
    def linear(t, z):
        return (1 + 4 * t)[:, None] * torch.arange(1.0, 7.0, dtype=z.dtype)

    reuse, settings = Reuse(threshold=0.01), {"method": "euler", "num_steps": 50}
    exact, z_0 = (lfm_fast.sample(linear, noise(2), guidance=g, **settings) for g in (None, reuse))
    torch.testing.assert_close(z_0, exact, rtol=1e-12, atol=1e-12)
    assert reuse.tally.saved > 0.5


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "unipc"])
def test_the_error_is_of_the_size_of_the_threshold(method):
    saved = []
    for threshold in (0.002, 0.02):
        found = compare(
            noise(8),
            {"guidance": None},
            {"guidance": Reuse(threshold=threshold)},
            model=curved,
            method=method,
            num_steps=60,
        )
        assert found.errors.max() < threshold  # of each velocity; in a unit of time they add up to as much
        saved.append(1 - found.forwards[1] / found.forwards[0])
    assert 0.1 < saved[0] < saved[1]


@pytest.mark.parametrize("null_label", [None, 5])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_samples_are_approximated_each_by_itself(method, null_label):
    """Under guidance, with a scale and a label of each, together as alone."""
    z_1, y, scale = noise(5), torch.tensor([0, 3, 1, 4, 2]), torch.tensor([1.0, 3.0, 2.0, 1.5, 4.0])
    known = {"method": method, "num_steps": 30, "null_label": null_label, "return_stats": True}

    def solve(rows):
        reuse = Reuse(LinearGuidance(scale[rows]), threshold=0.02)
        return *lfm_fast.sample(curved, z_1[rows], y=y[rows], guidance=reuse, **known), reuse.tally

    together, stats, tally = solve(torch.arange(5))
    alone = [solve(torch.tensor([row])) for row in range(5)]
    assert torch.equal(together, torch.cat([z_0 for z_0, _, _ in alone]))
    assert stats.forwards.tolist() == [int(found.forwards) for _, found, _ in alone]
    assert tally.computed == sum(found.computed for _, _, found in alone)
    asked = stats.forwards // torch.where(scale == 1, 1, 2)
    assert int(asked.sum()) == tally.computed < 0.8 * tally.asked
    assert len(set(asked.tolist())) > 1, "every sample was asked for at the same times: the batch decided"


def test_a_flow_samples_image_by_image_in_batches():
    flow = lfm_fast.LatentFlow.from_pretrained("embedded")
    scale, known = torch.tensor([1.0, 3.0, 2.0]), {"y": [0, 8, 4], "method": "euler", "num_steps": 6}
    whole = flow.sample(3, guidance=Reuse(LinearGuidance(scale), threshold=0), **known)
    parts = flow.sample(3, guidance=(reuse := Reuse(LinearGuidance(scale), threshold=0)), batch_size=2, **known)
    exact = flow.sample(3, guidance=LinearGuidance(scale), **known)
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-4)  # products of other batch sizes round otherwise
    torch.testing.assert_close(parts, exact, rtol=0, atol=1e-4)
    assert (reuse.tally.asked, reuse.tally.computed) == (18, 18)


def test_no_velocity_is_carried_over_an_end_of_the_interval():
    """Between 0.3 and 0.7 guidance adds a constant; a guess from the other side is off by all of it."""

    def model(t, z, y=None):
        return torch.full_like(z, 5.0 if y is None else 1.0)

    z_1, y = noise(2), torch.tensor([1, 1])
    guidance, settings = LinearGuidance(2.0, (0.3, 0.7)), {"y": y, "method": "euler", "num_steps": 40}
    reuse = Reuse(guidance, threshold=0.1)
    exact, z_0 = (lfm_fast.sample(model, z_1, guidance=g, **settings) for g in (guidance, reuse))
    torch.testing.assert_close(z_0, exact, rtol=1e-12, atol=1e-12)
    assert reuse.tally.computed <= 2 * 3 * 3  # on each of the three sides


def test_arguments_of_a_whole_batch_are_computed_for_all_or_none():
    z_1, shift = noise(4), torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]
    sizes = []

    def model(t, z, y=None, shift=None):
        sizes.append(len(z))
        return curved(t, z) + shift

    reuse = Reuse(threshold=0.02)
    found = compare(
        z_1, {"guidance": None}, {"guidance": reuse}, model=model, method="euler", num_steps=40,
        model_kwargs={"shift": shift},
    )  # fmt: skip
    assert set(sizes) == {4}
    assert reuse.tally.saved > 0.1
    assert found.errors.max() < 0.02


def test_the_steps_that_guidance_leaves_out_stay_left_out():
    y, guidance = torch.tensor([1, 2]), CFGZeroStar(2.0, zero_steps=3)
    settings = {"y": y, "method": "euler", "num_steps": 10, "return_stats": True}
    z_0, stats = lfm_fast.sample(curved, noise(2), guidance=Reuse(guidance, threshold=0), **settings)
    exact, _ = lfm_fast.sample(curved, noise(2), guidance=guidance, **settings)
    assert int(stats.nfe[0]) == 7
    torch.testing.assert_close(z_0, exact, rtol=1e-12, atol=1e-12)


def test_a_model_may_write_its_next_velocity_over_the_last():
    buffer = torch.empty(2, *SHAPE, dtype=torch.float64)

    def model(t, z):
        return buffer[: len(z)].copy_(curved(t, z))

    settings = {"method": "euler", "num_steps": 40}
    plain, buffered = (
        lfm_fast.sample(m, noise(2), guidance=Reuse(threshold=0.02), **settings) for m in (curved, model)
    )
    assert torch.equal(plain, buffered)


@pytest.mark.parametrize(
    ("make", "settings", "says"),
    [
        (lambda: Reuse(threshold=-1), {}, "threshold is -1"),
        (lambda: Reuse(threshold=float("nan")), {}, "threshold is nan"),
        (lambda: Reuse("much"), {}, "guidance_scale is 'much'"),
        (lambda: Reuse(2.0), {}, "no labels y"),
        (lambda: Reuse(), {"method": "dopri5"}, "dopri5 judges its steps by evaluations"),
        (lambda: Reuse(APG(2.0, momentum=-0.5)), {"y": torch.tensor([0, 1])}, "APG remembers its steps"),
        (lambda: SmallThenLarge(curved, curved, 1.5), {}, "switch is 1.5"),
        (lambda: SmallThenLarge(None, curved), {}, "model is 'NoneType'"),
    ],
)
def test_mistakes_are_said_before_the_model_is_called(make, settings, says):
    def untouched(t, z, y=None):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=says):
        lfm_fast.sample(untouched, noise(2), guidance=make(), **{"method": "euler", "num_steps": 4, **settings})


def near_noise(t, z, y=None):
    return curved(t, z, y) + 1


def piecewise(t, z, y=None):
    return torch.where((t > 0.4)[:, None], near_noise(t, z, y), curved(t, z, y))


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_small_network_first_is_a_field_in_two_pieces(method, guided):
    """By sample where an adaptive method gives each its time; with both sets of labels in one batch."""
    model = SmallThenLarge(near_noise, curved, 0.4)
    settings = {"method": method, "num_steps": 10, "return_stats": True}
    if guided:
        settings |= {"y": torch.tensor([3, 0, 2]), "guidance_scale": 2.0, "null_label": 5}
    (expected, _), (z_0, stats) = (lfm_fast.sample(m, noise(3), **settings) for m in (piecewise, model))
    assert torch.equal(z_0, expected)
    assert model.tally.asked == int(stats.forwards.sum())
    assert 0.2 < model.tally.saved < 0.9
    if method == "euler":
        assert model.tally.saved == pytest.approx(0.6)  # 1.0 to 0.5; 0.4 is the large one's


def test_rows_of_both_sides_of_the_switch_go_to_their_networks():
    model, y = SmallThenLarge(near_noise, curved, 0.4), torch.tensor([1, 2, 3, 4])
    t, z = torch.tensor([0.9, 0.1, 0.4, 0.5], dtype=torch.float64), noise(4)
    assert torch.equal(model(t, z, y), piecewise(t, z, y))
    assert torch.equal(model(t, z), piecewise(t, z))
    assert (model.tally.asked, model.tally.computed) == (8, 4)

    def shifted(t, z, y=None, shift=0.0):
        return z + shift

    both = SmallThenLarge(shifted, lambda t, z, shift: -z - shift, 0.4)
    shift = torch.arange(4.0, dtype=torch.float64)[:, None]
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
    assert torch.equal(both(t, z, shift=shift), sign * (z + shift))


def test_networks_of_two_precisions():
    class Constant(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, dtype=dtype))

        def forward(self, t, z, y=None):
            assert z.dtype == self.weight.dtype
            return z * self.weight

    model = SmallThenLarge(Constant(torch.bfloat16), Constant(torch.float32), 0.5)
    z_1 = lfm_fast.noise(2, SHAPE)
    z_0 = lfm_fast.sample(model, z_1, method="euler", num_steps=10)
    torch.testing.assert_close(z_0, z_1 * 0.9**10, rtol=1e-2, atol=1e-2)  # bfloat16 keeps 8 bits
    t = torch.tensor([0.9, 0.1])
    assert model(t, z_1).dtype == torch.float32


def test_a_comparison_says_what_was_saved_and_lost():
    small = SmallThenLarge(near_noise, curved, 0.5)
    z_1, known = noise(4), {"method": "heun", "num_steps": 8}
    found = compare(z_1, {"model": curved}, {"model": small}, **known)
    exact, z_0 = (lfm_fast.sample(m, z_1, **known) for m in (curved, small))
    torch.testing.assert_close(found.errors, (z_0 - exact).norm(dim=1) / exact.norm(dim=1))
    assert found.forwards == (64, 64)
    reuse = compare(z_1, {"guidance": None}, {"guidance": Reuse(threshold=0.05)}, model=curved, **known)
    words = str(reuse)
    assert f"{1 - reuse.forwards[1] / 64:.0%} of 64 network rows saved" in words
    assert f"median {reuse.errors.median():.1e}" in words
    assert f"90th percentile {reuse.errors.quantile(0.9):.1e}" in words


def test_the_command_prints_what_reuse_saved_and_its_error(tmp_path, capsys):
    picture = ["--num-images", "2", "--class", "Flags", "--num-steps", "8", "--output", str(tmp_path / "a.png")]
    assert main(["sample", *picture, "--reuse", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "network rows saved" in said
    assert "error against the exact solve: median" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--reuse", "-1"], "threshold is -1"),
        (["--reuse", "0.1", "--method", "dopri5"], "dopri5 judges its steps by evaluations"),
    ],
)
def test_mistakes_of_the_command_are_one_sentence(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--num-images", "1", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class OnPath(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, t, z, y=None):
        return z


def test_small_then_large_is_sampled_on_the_path_of_its_networks():
    path, z1 = lfm_fast.paths.VariancePreserving(), torch.ones(1, 2)
    model = SmallThenLarge(OnPath(path), OnPath(path))
    expected = lfm_fast.sample(OnPath(path), z1, method="dpmpp_2m", num_steps=5)
    assert torch.equal(lfm_fast.sample(model, z1, method="dpmpp_2m", num_steps=5), expected)
    assert not hasattr(SmallThenLarge(lambda t, z: z, lambda t, z: z), "path")


def test_small_then_large_refuses_networks_of_two_paths():
    with pytest.raises(ValueError, match=r"VariancePreserving.*path"):
        SmallThenLarge(OnPath(lfm_fast.paths.Linear()), OnPath(lfm_fast.paths.VariancePreserving()))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_wrapped_network_keeps_its_path(wrap):
    model, z1 = OnPath(lfm_fast.paths.VariancePreserving()), torch.ones(1, 2)
    expected = lfm_fast.sample(model, z1, method="dpmpp_2m", num_steps=5)
    assert torch.equal(lfm_fast.sample(wrap(model), z1, method="dpmpp_2m", num_steps=5), expected)


@pytest.mark.parametrize("kwargs", [{}, {"shift": 0.0}])
def test_two_networks_may_write_to_one_buffer(kwargs):
    buffer = torch.empty(4, 3)

    def writing(factor):
        def model(t, z, y=None, shift=0.0):
            return torch.add(factor * z, shift, out=buffer[: len(z)])

        return model

    t, z = torch.tensor([0.9, 0.1, 0.8, 0.2]), torch.ones(4, 3)
    both = SmallThenLarge(writing(1.0), writing(2.0), switch=0.5)
    assert both(t, z, **kwargs)[:, 0].tolist() == [1.0, 2.0, 1.0, 2.0]


def test_what_an_approximation_refuses_costs_no_exact_solve():
    calls = []

    def counted(t, z, y=None):
        calls.append(1)
        return z

    with pytest.raises(ValueError, match="judges its steps"):
        compare(
            torch.ones(2, 3), {"guidance": None}, {"guidance": Reuse(threshold=0.1)}, model=counted, method="dopri5"
        )
    assert not calls

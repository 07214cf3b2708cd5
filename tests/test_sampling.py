"""lfm_fast.sample: the contract of its arguments, its results and its refusals."""

import math

import pytest
import torch
from torchdiffeq import odeint

import lfm_fast
from lfm_fast.flow.paths import Linear, VarianceExploding, VariancePreserving, VariancePreservingTrig
from lfm_fast.models import DiT
from lfm_fast.solvers import METHODS

FIXED = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


class Counting:
    """A velocity -z + y / 4 that counts its calls and keeps their times."""

    def __init__(self):
        self.calls, self.rows, self.times = 0, 0, []

    def __call__(self, t, z, y=None):
        self.calls, self.rows = self.calls + 1, self.rows + len(z)
        self.times.append(t[0].item())
        return -z if y is None else -z + y.float().reshape(-1, *[1] * (z.ndim - 1)) / 4


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    model = DiT(image_size=8, hidden_size=64, depth=2, num_heads=2, num_classes=5, label_dropout=0.1).eval()
    for parameter in model.parameters():  # a new DiT is the zero velocity
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def z1(batch_size=3, shape=(2, 4), **arguments):
    return lfm_fast.noise(batch_size, shape, seed=5, **arguments)


def test_sample_i_of_a_seed_is_the_same_picture_for_any_batch_size(dit):
    y = torch.arange(64) % 5
    settings = {"method": "heun", "num_steps": 25, "guidance_scale": 2.0, "null_label": 5}
    noise = lfm_fast.noise(64, (4, 8, 8), seed=1)
    whole = lfm_fast.sample(dit, noise, y=y, **settings)
    assert (whole - noise).abs().max() > 0.5  # the network does something
    for batch_size in (16, 7):
        for first in range(0, 64, batch_size):
            rows = slice(first, min(first + batch_size, 64))
            part = lfm_fast.noise(rows.stop - first, (4, 8, 8), seed=1, first_index=first)
            assert torch.equal(part, noise[rows])
            # a matrix product may sum in another order for another batch; 50 evaluations on values of about 4
            result = lfm_fast.sample(dit, part, y=y[rows], **settings)
            torch.testing.assert_close(result, whole[rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "path", [Linear(), VariancePreserving(), VariancePreservingTrig(), VarianceExploding(0.05, 10.0)], ids=repr
)
@pytest.mark.parametrize("method", ["heun", "rk4", "dopri5", "torchdiffeq:heun3"])
def test_the_exact_velocity_of_gaussian_data_gives_its_samples(path, method):
    """z_0 ~ N(m, s^2): the flow maps z at t = 1 to mean_0 + std_0 (z - mean_1) / std_1."""
    m, s = 0.7, 0.4

    def moments(t):
        return path.alpha(t) * m, ((path.alpha(t) * s) ** 2 + path.sigma(t) ** 2).sqrt()

    def velocity(t, z):
        mean, std = (x[:, None] for x in moments(t))
        d_mean = path.d_alpha(t)[:, None] * m
        d_var = 2 * (path.alpha(t) * path.d_alpha(t) * s**2 + path.sigma(t) * path.d_sigma(t))[:, None]
        return d_mean + d_var / (2 * std**2) * (z - mean)

    start = z1(6, (5,), dtype=torch.float64)
    (mean_1, std_1), (mean_0, std_0) = (moments(torch.tensor(t, dtype=torch.float64)) for t in (1.0, path.t_min))
    start = mean_1 + std_1 * start
    result = lfm_fast.sample(velocity, start, path=path, method=method, num_steps=400, atol=1e-7, rtol=1e-7)
    expected = mean_0 + std_0 * (start - mean_1) / std_1
    # second order at dt = 1/400 with velocities that change by 10 per unit of time; beyond that 30 times less is left
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-3 if method == "heun" else 1e-4)
    back = lfm_fast.sample(
        velocity, result, path=path, method=method, num_steps=400, t_start=0.0, t_end=1.0, atol=1e-7, rtol=1e-7
    )
    torch.testing.assert_close(back, start, rtol=0, atol=2e-2 * float(std_1))


@pytest.mark.parametrize(("method", "per_step"), FIXED.items())
def test_nfe_of_fixed_methods(method, per_step):
    model = Counting()
    z0, stats = lfm_fast.sample(model, z1(), method=method, num_steps=6, return_stats=True)
    assert model.calls == stats.calls == 6 * per_step
    assert stats.nfe.tolist() == stats.forwards.tolist() == [6 * per_step] * 3
    assert stats.accepted.tolist() == [6] * 3
    assert stats.rejected.tolist() == [0] * 3
    assert stats.reached.tolist() == [True] * 3
    assert (stats.nfe.dtype, stats.reached.dtype) == (torch.int64, torch.bool)
    assert stats.seconds > 0
    # z' = -z from 1 to 0 grows by e; euler's 6 steps by (7/6)^6
    assert (z0 / z1()).mean().item() == pytest.approx(math.e, rel=0.1)


def test_guidance_is_reported_beside_nfe_and_skipped_outside_its_interval():
    y, settings = (
        torch.tensor([0, 1, 2]),
        {"guidance_scale": 3.0, "method": "euler", "num_steps": 10, "return_stats": True},
    )
    model = Counting()
    _, stats = lfm_fast.sample(model, z1(), y=y, null_label=0, **settings)
    assert (stats.nfe[0], stats.forwards[0], stats.calls, model.calls, model.rows) == (10, 20, 10, 10, 60)
    model = Counting()
    _, stats = lfm_fast.sample(model, z1(), y=y, **settings)
    assert (stats.nfe[0], stats.forwards[0], stats.calls, model.calls, model.rows) == (10, 20, 20, 20, 60)
    for interval, inside in (((0.3, 0.7), 5), ((0.0, 0.55), 5), ((0.95, 1.0), 1), ((0.72, 0.78), 0)):
        for method in ("euler", "torchdiffeq:euler"):
            model = Counting()
            _, stats = lfm_fast.sample(
                model, z1(), y=y, null_label=0, guidance_interval=interval, **{**settings, "method": method}
            )
            assert (stats.nfe[0], stats.forwards[0], model.rows) == (10, 10 + inside, 3 * (10 + inside)), interval


@pytest.mark.parametrize("method", ["heun", "dopri5"])
def test_guided_velocity_is_the_blend_of_both(method):
    y, scale = torch.tensor([0, 2, 8]), torch.tensor([1.0, 2.5, 0.0])
    result, stats = lfm_fast.sample(
        Counting(), z1(), y=y, guidance_scale=scale, method=method, num_steps=40, return_stats=True
    )
    # z' = -z + scale y / 4 from t = 1 to 0 has the solution c + (z1 - c) e with c = scale y / 4
    c = (scale * y / 4)[:, None, None]
    torch.testing.assert_close(result, c + (z1() - c) * math.e, rtol=0, atol=5e-3 if method == "heun" else 1e-3)
    assert (stats.forwards == stats.nfe * torch.tensor([1, 2, 2])).all()


def test_a_guidance_object_takes_the_place_of_the_scale():
    seen = []

    def half(network, t, z, time=None):  # no linear blend: it returns the velocity alone
        seen.append(time)
        return 0.5 * network.conditional(t, z), None, None

    result, stats = lfm_fast.sample(Counting(), z1(), guidance=half, method="euler", num_steps=4, return_stats=True)
    torch.testing.assert_close(result, z1() * (1 + 0.5 / 4) ** 4)
    assert seen == [1.0, 0.75, 0.5, 0.25]
    assert stats.forwards.tolist() == [4, 4, 4]


WITHOUT_NOISE = [name for name in METHODS if name not in ("euler_maruyama", "sde_heun")]


@pytest.mark.parametrize("method", [*WITHOUT_NOISE, "torchdiffeq:rk4", "torchdiffeq:scipy_solver"])
def test_trajectory_holds_both_ends(method):
    model = Counting()
    states = lfm_fast.sample(model, z1(), method=method, num_steps=8, trajectory=True)
    assert states.shape == (9, 3, 2, 4)
    assert torch.equal(states[0], z1())
    torch.testing.assert_close(
        states[-1], lfm_fast.sample(model, z1(), method=method, num_steps=8), rtol=1e-4, atol=1e-4
    )
    growth = (states[1:] / states[:-1]).mean(dim=(1, 2, 3))  # e^(1/8) each, by euler 1 + 1/8
    torch.testing.assert_close(growth, torch.full((8,), math.exp(1 / 8)), rtol=0.01, atol=0)


@pytest.mark.parametrize("method", ["heun", "torchdiffeq:dopri5", "torchdiffeq:rk4"])
def test_callback_is_told_every_step_and_progress_draws_a_bar(method, capsys):
    seen = []
    z0, stats = lfm_fast.sample(
        Counting(), z1(), method=method, num_steps=5, return_stats=True, progress=True,
        callback=lambda step, t, z: seen.append((step, t, z)),
    )  # fmt: skip
    assert [step for step, _, _ in seen] == list(range(1, int(stats.accepted[0]) + 1))
    times = [t for _, t, _ in seen]
    assert times == sorted(times, reverse=True)
    assert all(isinstance(t, float) for t in times)
    assert times[-1] == 0.0
    assert torch.equal(seen[-1][2], z0)
    bar = capsys.readouterr().err
    assert "sampling" in bar
    assert ("5/5" in bar) == (method != "torchdiffeq:dopri5"), "full at the end, where the number of steps is known"


def test_grids_reach_the_solver():
    def times(**arguments):
        model = Counting()
        lfm_fast.sample(model, z1(), method="euler", **arguments)
        return model.times

    assert times(num_steps=4) == [1.0, 0.75, 0.5, 0.25]
    assert len(times(num_steps=10, time_grid="lfm")) == len(times(num_steps=10, compat="lfm")) == 9
    assert times(num_steps=2, time_grid=("shift", 3.0)) == [1.0, 0.75]
    assert times(time_grid=torch.tensor([0.5, 0.25, 0.125])) == [0.5, 0.25]
    assert times(num_steps=2, t_start=0.25, t_end=0.75) == [0.25, 0.5]
    model = Counting()
    lfm_fast.sample(model, z1(), method="heun", num_steps=2, path=VariancePreserving())
    assert model.times[-1] == pytest.approx(1e-5)


def test_half_a_way_and_back():
    half = lfm_fast.sample(Counting(), z1(), method="rk4", t_start=1.0, t_end=0.5)
    rest = lfm_fast.sample(Counting(), half, method="rk4", t_start=0.5, t_end=0.0)
    torch.testing.assert_close(rest, z1() * math.e, rtol=1e-5, atol=1e-5)
    there = lfm_fast.sample(Counting(), rest, method="rk4", t_start=0.0, t_end=1.0)
    torch.testing.assert_close(there, z1(), rtol=1e-5, atol=1e-5)


def test_default_is_dopri5_with_torchdiffeqs_numbers_under_compat(dit):
    noise, y = lfm_fast.noise(2, (4, 8, 8)), torch.tensor([0, 3])
    with torch.no_grad():
        expected = odeint(lambda t, z: dit(t.expand(2), z, y), noise, torch.tensor([1.0, 0.0]), rtol=1e-5, atol=1e-5)[
            -1
        ]
    # theirs keeps its times in float32 where ours come from float64: rounding
    torch.testing.assert_close(lfm_fast.sample(dit, noise, y=y, compat="lfm"), expected, rtol=0, atol=1e-5)
    # landing on t = 0 instead of reading the state off a step beyond it: the same within the tolerance
    torch.testing.assert_close(lfm_fast.sample(dit, noise, y=y), expected, rtol=0, atol=1e-4)


def test_max_nfe_stops_an_adaptive_method_where_it_is():
    with pytest.warns(UserWarning, match=r"dopri5 used its max_nfe = 15 evaluations before t = 0: 3 of 3"):
        z, stats = lfm_fast.sample(Counting(), z1(), atol=1e-9, rtol=1e-9, max_nfe=15, return_stats=True)
    assert stats.reached.tolist() == [False] * 3
    assert stats.nfe.tolist() == [14] * 3  # another attempt would be 6 more
    assert 1.0 < (z / z1()).mean().item() < math.e
    _, stats = lfm_fast.sample(Counting(), z1(), method="rk4", num_steps=10, max_nfe=40, return_stats=True)
    assert stats.reached.all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_state_is_at_least_float32_and_z1_is_left_alone(dtype, expected):
    noise = z1(dtype=dtype)
    kept = noise.clone()
    for method in ("heun", "dopri5"):
        assert lfm_fast.sample(Counting(), noise, method=method, num_steps=2).dtype == expected
    assert torch.equal(noise, kept)


def test_a_bfloat16_network_is_stepped_in_float32(dit):
    import copy

    half, noise, y = copy.deepcopy(dit).bfloat16(), lfm_fast.noise(2, (4, 8, 8)), torch.tensor([0, 3])
    settings = {"y": y, "guidance_scale": 1.5, "null_label": 5, "method": "heun", "num_steps": 10}
    result, exact = (lfm_fast.sample(model, noise, **settings) for model in (half, dit))
    assert result.dtype == torch.float32
    assert half.training is False
    # 8 bits of velocity, guided 1.5-fold, and z rounded on its way into the network: some 2^-8 of values about 4
    torch.testing.assert_close(result, exact, rtol=0, atol=0.05)


@pytest.mark.filterwarnings("ignore:dopri5 used its max_nfe")
def test_the_result_is_never_the_memory_of_z1():
    noise = z1()
    kept = noise.clone()
    z0 = lfm_fast.sample(Counting(), noise, max_nfe=1)  # no step is done: the state is the one it started from
    assert torch.equal(z0, kept)
    z0.zero_()
    lfm_fast.sample(Counting(), noise, method="heun", num_steps=2, callback=lambda step, t, z: z.zero_())
    assert torch.equal(noise, kept)


@pytest.mark.parametrize("method", ["heun", "rk4", "dopri5", "torchdiffeq:rk4"])
@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "null_label": 3}])
def test_a_model_that_uses_its_memory_again_changes_nothing(method, guided):
    buffers, plain = {}, Counting()

    def careless(t, z, y):
        result = plain(t, z, y)
        for given in (t, z) if y is None else (t, z, y):
            given.zero_()
        return buffers.setdefault(len(z), torch.empty_like(z)).copy_(result)

    noise, y = z1(), torch.arange(3)
    settings = {"y": y, "method": method, "num_steps": 4, "t_start": 0.0, "t_end": 1.0, **guided}
    assert torch.equal(lfm_fast.sample(careless, noise, **settings), lfm_fast.sample(Counting(), noise, **settings))
    assert torch.equal(noise, z1())
    assert y.tolist() == [0, 1, 2]
    with torch.inference_mode():
        inside = lfm_fast.sample(careless, z1(), **settings)
    assert torch.equal(inside, lfm_fast.sample(Counting(), noise, **settings))


@pytest.mark.parametrize("result", [(torch.zeros(3, 2, 4),), None, torch.zeros(3, 2, 4, dtype=torch.complex64)])
@pytest.mark.parametrize("method", ["heun", "dopri5"])
def test_what_is_no_velocity_is_refused(method, result):
    with pytest.raises(ValueError, match="The model returned"):
        lfm_fast.sample(lambda t, z: result, z1(), method=method)


def test_no_graph_is_recorded_and_the_mode_of_the_model_stays():
    model = torch.nn.Linear(4, 4).train()
    z0 = lfm_fast.sample(lambda t, z: model(z), z1().requires_grad_(), method="euler", num_steps=2)
    assert not z0.requires_grad
    assert model.training
    torch.nn.functional.mse_loss(model(z0), z0).backward()  # a sample may serve in a later graph
    assert model.weight.grad is not None


def test_model_kwargs_and_further_inputs_reach_the_model():
    result = lfm_fast.sample(
        lambda t, z, gain=1.0, offset=0.0: gain * z + offset, z1(), method="euler", num_steps=1,
        model_kwargs={"gain": 2.0, "offset": torch.arange(3.0)[:, None, None]},
    )  # fmt: skip
    torch.testing.assert_close(result, z1() - 2 * z1() - torch.arange(3.0)[:, None, None])


def refuse(*args, **kwargs):
    raise AssertionError("the model was called before the arguments were checked")


Y3 = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "model is 'NoneType', expected a module or function"),
        ({"z1": torch.zeros(3, dtype=torch.int64)}, r"z1 is \(3,\) torch.int64"),
        ({"z1": torch.zeros(0, 4)}, "at least one sample"),
        ({"z1": [1.0]}, "z1 is 'list'"),
        ({"z1": torch.zeros(3, 4).to(torch.float8_e4m3fn)}, "z1 is .* torch.float8_e4m3fn, expected"),
        ({"y": Y3.bool()}, "torch.bool, expected"),
        ({"y": Y3.to(torch.complex64)}, "torch.complex64, expected"),
        ({"y": torch.zeros(3)}, r"y is \(3,\) torch.float32, expected \(3,\) integer"),
        ({"y": Y3[:2]}, r"y is \(2,\)"),
        ({"y": Y3 - 1}, "the label -1"),
        ({"y": [0, 1, 2]}, "y is 'list'"),
        ({"y": Y3.to("meta")}, "y is on meta and z1 on cpu"),
        ({"guidance_scale": 2.0}, "there are no labels y"),
        ({"guidance_scale": "2"}, "guidance_scale is '2'"),
        ({"guidance_scale": float("nan"), "y": Y3}, "expected finite"),
        ({"guidance_scale": torch.ones(2), "y": Y3}, r"guidance_scale is \(2,\)"),
        ({"guidance_scale": torch.tensor([1, 2, 3]), "y": Y3}, "torch.int64"),
        ({"guidance_scale": torch.tensor([1.0, math.inf, 1.0]), "y": Y3}, "expected finite"),
        ({"null_label": -1}, "null_label is -1"),
        ({"null_label": 1.5}, "null_label is 1.5"),
        ({"null_label": 2**63}, "more than torch.int64 holds"),
        ({"null_label": 300, "y": Y3.to(torch.uint8)}, "null_label is 300, more than torch.uint8 holds"),
        ({"guidance_scale": 10**400, "y": Y3}, "expected finite"),
        ({"guidance": refuse, "guidance_interval": (0.2, 0.8)}, "guidance_interval were given"),
        ({"method": ["heun"]}, r"method is \['heun'\]"),
        ({"method": None}, "method is None"),
        ({"compat": ["lfm"]}, "compat is"),
        ({"indices": torch.tensor([0, 1, -1])}, "indices holds -1"),
        ({"time_grid": torch.tensor([1, 0.5j])}, "bool or complex"),
        ({"time_grid": ("shift", 1e308)}, "from 1e-6 to 1e6"),
        ({"model_kwargs": {1: 2}}, "the key 1, expected names"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is"),
        ({"guidance_interval": (0.0, 2.0)}, "guidance_interval is"),
        ({"guidance_interval": 0.5}, "guidance_interval is"),
        ({"method": "unipic"}, r"method is 'unipic' \(nearest: unipc\); there are euler, midpoint, heun, rk4, ab2"),
        ({"method": "Euler-Maruyama"}, r"\(nearest: euler_maruyama.*torchdiffeq:NAME with NAME one of"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 2.0}, "num_steps is 2.0"),
        ({"num_steps": None}, "num_steps is None"),
        ({"time_grid": "cosine"}, "time_grid is 'cosine'"),
        ({"time_grid": torch.zeros(3)}, "strictly monotone"),
        ({"time_grid": ("shift", 3.0), "method": "torchdiffeq:explicit_adams"}, "equidistant"),
        ({"atol": -1e-5}, "atol is -1e-05"),
        ({"rtol": float("nan")}, "rtol is nan"),
        ({"atol": 0, "rtol": 0}, "atol and rtol are both 0"),
        ({"max_nfe": 0}, "max_nfe is 0"),
        ({"max_nfe": 7, "method": "heun", "num_steps": 4}, "heun with 4 steps makes 8 evaluations, max_nfe is 7"),
        ({"max_nfe": 7, "method": "torchdiffeq:rk4", "num_steps": 4}, "makes 16 evaluations"),
        ({"max_nfe": 7, "method": "torchdiffeq:scipy_solver"}, "cannot be stopped"),
        ({"max_nfe": 7, "trajectory": True}, "leave one of the two out"),
        ({"t_start": 1.5}, "t_start is 1.5"),
        ({"t_end": -0.1}, "t_end is -0.1"),
        ({"t_end": None}, "t_end is None"),
        ({"t_end": 1.0}, "nothing to integrate"),
        ({"path": "linear"}, "path is 'linear'"),
        ({"guidance": 1.5}, "guidance is 1.5"),
        ({"guidance": refuse, "guidance_scale": 2.0}, "give one of them"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"indices": torch.arange(2)}, r"indices is \(2,\)"),
        ({"compat": "sit"}, "compat is 'sit'"),
        ({"model_kwargs": [1]}, "model_kwargs is 'list'"),
        ({"model_kwargs": {"y": Y3}}, "give labels as y="),
        ({"callback": 3}, "callback is 3"),
    ],
)
def test_errors_come_in_one_sentence_before_any_forward(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        lfm_fast.sample(**{"model": refuse, "z1": z1(), **arguments})
    assert "\n" not in str(caught.value)


def test_a_label_the_network_does_not_have_is_refused_by_its_sentence(dit):
    with pytest.raises(ValueError, match="label"):
        lfm_fast.sample(dit, lfm_fast.noise(2, (4, 8, 8)), y=torch.tensor([0, 7]), method="euler", num_steps=1)

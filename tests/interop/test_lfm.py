"""LFM's signature, grids and quirk, against torchdiffeq called as the reference calls it, and against plain loops."""

from argparse import Namespace
from itertools import pairwise

import pytest
import torch
from torchdiffeq import odeint

import lfm_fast
from lfm_fast.interop.lfm import sample_from_model

B, NULL = 3, 5
Y = torch.tensor([0, 2, 4])


def velocity(t, z, y=None):
    """Nonlinear, different for every label and time; no label is the null label."""
    y = torch.full((len(z),), NULL) if y is None else y
    rate = (1 + y.to(z) / 3).reshape(-1, 1, 1, 1) * (1 + t.expand(len(z)).to(z)).reshape(-1, 1, 1, 1)
    return torch.sin(rate * z) + 0.3 * z.roll(1, dims=1)


def noise(count=B):
    return lfm_fast.noise(count, (4, 4, 4), seed=1, dtype=torch.float64)


FIXED = [(name, step) for name in ("euler", "midpoint", "rk4", "heun2", "heun3") for step in (0.05, 0.07)]


@pytest.mark.parametrize(("method", "step_size"), [*FIXED, ("explicit_adams", 0.01), ("implicit_adams", 0.01)])
def test_fixed_methods_are_torchdiffeqs_with_its_step_size(method, step_size):
    """0.07 does not divide 1: the last step is shorter. Only the order of additions differs, 1e-16 each."""
    args = Namespace(method=method, step_size=step_size, perturb=False, atol=1e-3, rtol=1e-3, num_steps=3)
    got = sample_from_model(velocity, noise(), {"y": Y}, args)
    t = torch.tensor([1.0, 0.0], dtype=torch.float64)
    options = {"step_size": step_size}
    want = odeint(lambda t, z: velocity(t, z, Y), noise(), t, method=method, options=options, atol=1e-3, rtol=1e-3)
    assert got.shape == want.shape == (2, B, 4, 4, 4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun", "fehlberg2", "dopri8"])
def test_adaptive_methods_are_torchdiffeqs_to_the_bit(method):
    """Its own steps, past t = 0 and back by interpolation, and its own error of the whole batch."""
    args = Namespace(method=method, atol=1e-4, rtol=1e-4, step_size=0.01)
    got = sample_from_model(velocity, noise(), {"y": Y}, args)
    t = torch.tensor([1.0, 0.0], dtype=torch.float64)
    want = odeint(lambda t, z: velocity(t, z, Y), noise(), t, method=method, atol=1e-4, rtol=1e-4)
    assert torch.equal(got, want)


def guided(t, z, scale):
    return velocity(t, z) + scale * (velocity(t, z, Y) - velocity(t, z))


@pytest.mark.parametrize("where", ["model_kwargs", "args", "both"])
@pytest.mark.parametrize("doubled", [True, False])
def test_guidance_as_lfms_scripts_ask_for_it(where, doubled):
    args = Namespace(method="rk4", step_size=0.1, cfg_scale=1.0 if where == "model_kwargs" else 1.5)
    model_kwargs = {"y": torch.cat([Y, torch.full((B,), NULL)]) if doubled else Y}
    model_kwargs |= {} if where == "args" else {"cfg_scale": 1.5}
    x_0, rows = noise(), []

    def model(t, z, y):
        rows.append(len(z))
        return velocity(t, z, y)

    got = sample_from_model(model, torch.cat([x_0, x_0]) if doubled else x_0, model_kwargs, args)
    t, options = torch.tensor([1.0, 0.0], dtype=torch.float64), {"step_size": 0.1}
    want = odeint(lambda t, z: guided(t, z, 1.5), x_0, t, method="rk4", options=options)
    if doubled:
        assert got.shape == (2, 2 * B, 4, 4, 4)
        assert rows == [2 * B] * 40  # 3 states, evaluated with and without their labels
        for half in got.chunk(2, dim=1):
            torch.testing.assert_close(half, want, rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_what_is_not_doubled_is_not_halved():
    """Six samples of their own noise, six labels."""
    args, y = Namespace(method="euler", step_size=0.25, cfg_scale=2.0), torch.tensor([0, 1, 2, 3, 3, 3])
    got = sample_from_model(velocity, noise(6), {"y": y}, args)
    want = lfm_fast.sample(velocity, noise(6), y=y, guidance_scale=2.0, method="euler", num_steps=4)
    torch.testing.assert_close(got[-1], want)
    twice = torch.cat([noise(), noise()])  # equal halves, but nothing to guide
    plain = sample_from_model(velocity, twice, {"y": y}, Namespace(method="euler", step_size=0.25))
    torch.testing.assert_close(plain[-1], lfm_fast.sample(velocity, twice, y=y, method="euler", num_steps=4))


def test_a_network_of_ours_runs_with_its_own_null_label():
    torch.manual_seed(0)
    model = lfm_fast.DiT(image_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=5, label_dropout=0.1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_0, args = noise().float(), Namespace(method="midpoint", step_size=0.5)
    got = sample_from_model(model.eval(), x_0, {"y": Y, "cfg_scale": 1.5}, args)[-1]
    want = lfm_fast.sample(model, x_0, y=Y, guidance_scale=1.5, null_label=5, method="midpoint", num_steps=2)
    assert torch.equal(got, want)
    rows = []
    model.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    sample_from_model(model, x_0, {"y": Y, "cfg_scale": 1.5}, args)
    assert rows == [2 * B] * 4  # one forward of both


def by_hand(num_points, heun_steps):
    """LFM's grid of N points over [1, 1e-5], Heun on its first steps and Euler on the rest."""
    z, times = noise(), torch.linspace(1, 1e-5, num_points, dtype=torch.float64)
    for n, (now, after) in enumerate(pairwise(times)):
        k1 = velocity(now, z, Y)
        k2 = velocity(after, z + (after - now) * k1, Y) if n < heun_steps else k1
        z = z + (after - now) * (k1 + k2) / 2
    return z


@pytest.mark.parametrize(
    ("method", "num_points", "heun_steps", "evaluations"),
    [("euler", 12, 0, 11), ("heun", 50, 49, 98), ("lfm:heun40", 50, 39, 88), ("lfm:heun40", 40, 39, 78)],
)
def test_lfms_own_sampler_as_it_should_have_been_and_as_it_was(method, num_points, heun_steps, evaluations):
    settings = {"method": method, "num_steps": num_points, "compat": "lfm", "return_stats": True}
    z0, stats = lfm_fast.sample(velocity, noise(), y=Y, **settings)
    torch.testing.assert_close(z0, by_hand(num_points, heun_steps), rtol=0, atol=1e-12)
    assert stats.nfe.tolist() == [evaluations] * B
    with pytest.raises(ValueError, match=f"makes {evaluations} evaluations"):
        lfm_fast.sample(velocity, noise(), y=Y, max_nfe=evaluations - 1, **settings)


def called(*_, **__):
    raise AssertionError("the model was called")


DOUBLE = torch.cat([noise(), noise()])


@pytest.mark.parametrize(
    ("x_0", "model_kwargs", "args", "says"),
    [
        (noise(), {}, Namespace(), "args has no method"),
        (noise(), {}, Namespace(method="euler"), "args has no step_size"),
        (noise(), {}, Namespace(method="dopri5", atol=1e-5), "args has no rtol"),
        (noise(), {}, Namespace(method="heun", num_steps=3), "torchdiffeq's: dopri5.*compat='lfm'"),
        (noise(), {}, Namespace(method=None), "args.method is None"),
        (noise(), {}, Namespace(method="euler", step_size=0.0), "a step is a number from 1e-06 to 1"),
        (noise(), None, Namespace(method="euler", step_size=0.1), "model_kwargs is 'NoneType', expected a dict"),
        (noise(), {"y": Y, "cfg_scale": 2.0}, Namespace(method="euler", step_size=0.1, cfg_scale=1.5), "give one"),
        (noise(), {"cfg_scale": 2.0}, Namespace(method="euler", step_size=0.1), "no labels y to be guided by"),
        ("noise", {}, Namespace(method="euler", step_size=0.1), "z1 is 'str'"),
        (
            DOUBLE, {"y": torch.arange(6), "cfg_scale": 2.0}, Namespace(method="euler", step_size=0.1),
            r"y ends with the labels \[3, 4, 5\], expected one null label",
        ),
        (
            DOUBLE, {"y": torch.tensor([0, 1, 2, 5, 5, 5]), "cfg_scale": 2.0, "mask": 1},
            Namespace(method="euler", step_size=0.1), "model_kwargs holds mask beside doubled labels",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_gets_a_sentence_and_no_call(x_0, model_kwargs, args, says):
    with pytest.raises(ValueError, match=says):
        sample_from_model(called, x_0, model_kwargs, args)

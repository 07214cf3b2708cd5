"""Networks in other projects' conventions sample the exact flow of a mixture of Gaussians, as ours do."""

import math

import pytest
import torch
from mixture import flowed, posterior, start

import lfm_fast
from lfm_fast.flow.paths import Linear, VariancePreserving, VariancePreservingTrig
from lfm_fast.interop.discrete import DiscretePath, linear_betas
from lfm_fast.interop.dit import DiTVelocity, ThreeChannelGuidance
from lfm_fast.interop.flow_matching import FlowMatchingVelocity
from lfm_fast.interop.sit import SiTVelocity
from lfm_fast.interop.torchcfm import TorchCFMVelocity

Y = torch.tensor([0, 1, 0, 1])
NULL = 2


def per_sample(value, z):
    return value.reshape(-1, *[1] * (z.ndim - 1))


def straight(x, s, y):
    """Their straight path: x = s data + (1 - s) noise, velocity data - noise."""
    data, noise = posterior(x, s, 1 - s, y)
    return data - noise


def trigonometric(x, s, y):
    """SiT's GVP: x = sin(pi s / 2) data + cos(pi s / 2) noise."""
    alpha, sigma = torch.sin(math.pi * s / 2), torch.cos(math.pi * s / 2)
    data, noise = posterior(x, alpha, sigma, y)
    return per_sample(math.pi / 2 * sigma, x) * data - per_sample(math.pi / 2 * alpha, x) * noise


def beside_sigmas(network):
    """Learned sigmas in the second half of the channels: numbers that must not matter."""
    return lambda x, t, y: torch.cat([network(x, t, y), torch.full_like(x, 77.0)], dim=1)


def sit_noise(x, s, y):
    return posterior(x, s, 1 - s, y)[1]


def sit_data(x, s, y):
    return posterior(x, s, 1 - s, y)[0]


def sit_score(x, s, y):
    return -sit_noise(x, s, y) / per_sample(1 - s, x)


def smooth(t):
    """(alpha, sigma) of VariancePreserving(0.1, 20) from its formula."""
    log = -(0.1 * t + 0.5 * 19.9 * t * t)
    return torch.exp(log / 2), torch.sqrt(-torch.expm1(log))


def of_table(kind):
    """What a network of a 1000-step table predicts at timestep i, with alpha and sigma of t = (i + 1) / 1000."""

    def network(x, timestep, y):
        alpha, sigma = smooth((timestep + 1) / 1000)
        data, noise = posterior(x, alpha, sigma, y)
        v = per_sample(alpha, x) * noise - per_sample(sigma, x) * data
        return {"noise": noise, "data": data, "v": v, "score": -noise / per_sample(sigma, x)}[kind]

    return network


TABLE = smooth(torch.arange(1, 1001, dtype=torch.float64) / 1000)[0] ** 2
STRAIGHT, NEARLY = ((0.0, 1.0), (1.0, 0.0)), ((0.001, 0.999), (0.99, 0.01))
INSIDE = {"t_start": 0.999, "t_end": 0.01}
SMOOTH = tuple((float(a), float(b)) for a, b in (smooth(torch.tensor(t, dtype=torch.float64)) for t in (1.0, 0.001)))

# name -> (field, its path, further arguments, (alpha, sigma) at both ends, what the error comes from)
FIELDS = {
    "sit": (SiTVelocity(straight), Linear(), {}, STRAIGHT),
    "sit with sigmas": (SiTVelocity(beside_sigmas(straight)), Linear(), {}, STRAIGHT),
    "sit gvp": (SiTVelocity(trigonometric, path=VariancePreservingTrig()), VariancePreservingTrig(), {}, STRAIGHT),
    "sit noise": (SiTVelocity(sit_noise, predicts="noise"), Linear(), INSIDE, NEARLY),
    "sit data": (SiTVelocity(sit_data, predicts="data"), Linear(), INSIDE, NEARLY),
    "sit score": (SiTVelocity(sit_score, predicts="score"), Linear(), INSIDE, NEARLY),
    "flow_matching": (
        FlowMatchingVelocity(lambda x, t, label: straight(x, t, label), labels="label"), Linear(), {}, STRAIGHT,
    ),
    "flow_matching, nested labels": (
        FlowMatchingVelocity(lambda x, t, extra: straight(x, t, extra["a"]), labels=lambda y: {"extra": {"a": y}}),
        Linear(), {}, STRAIGHT,
    ),
    "flow_matching, x_1": (
        FlowMatchingVelocity(lambda x, t, y: sit_data(x, t, y), labels="y", predicts="data", path=Linear()),
        Linear(), INSIDE, NEARLY,
    ),
    "torchcfm": (TorchCFMVelocity(lambda t, x, y: straight(x, t, y)), Linear(), {}, STRAIGHT),
    **{
        f"dit {kind}": (DiTVelocity(of_table(kind), alphas_cumprod=TABLE, predicts=kind), None, {}, SMOOTH)
        for kind in ("noise", "data", "v", "score")
    },
    "dit with sigmas": (DiTVelocity(beside_sigmas(of_table("noise")), alphas_cumprod=TABLE), None, {}, SMOOTH),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_samples_are_those_of_the_exact_flow(name):
    """RK4 with these steps errs by 5e-7 on the straight path, by 3e-6 on that of the table."""
    field, _, arguments, (begin, end) = FIELDS[name]
    z1 = start(4, 2, 2)
    z0 = lfm_fast.sample(field, z1, y=Y, method="rk4", num_steps=25, **arguments)
    torch.testing.assert_close(z0, flowed(z1, Y, begin, end), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FIELDS)
def test_the_velocity_is_ours(name):
    """The same posterior means, on our side of the convention, in float64."""
    field, path, *_ = FIELDS[name]
    t, z = torch.tensor([0.9, 0.5, 0.25, 0.01], dtype=torch.float64), start(4, 4, 3, seed=1)
    path = path or VariancePreserving()
    data, noise = posterior(z, path.alpha(t), path.sigma(t), Y)
    want = per_sample(path.d_alpha(t), z) * data + per_sample(path.d_sigma(t), z) * noise
    torch.testing.assert_close(field(t, z, Y), want, rtol=1e-7 if name.startswith("dit") else 1e-10, atol=1e-10)


def test_the_published_table_of_dit_at_its_own_timesteps():
    """Only whole timesteps are asked for, every tenth of the thousand: Heun's steps then leave 2e-4."""
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    seen = []

    def network(x, timestep, y):
        seen.append(float(timestep[0]))
        entry = table[timestep.round().long()]
        assert torch.allclose(timestep, timestep.round(), atol=1e-9)
        return beside_sigmas(lambda x, i, y: posterior(x, entry.sqrt(), (1 - entry).sqrt(), y)[1])(x, timestep, y)

    field, z1 = DiTVelocity(network), start(4, 2, 2)
    nodes = torch.tensor([*range(1000, 10, -10), 8, 6, 4, 2, 1], dtype=torch.float64) / 1000
    z0 = lfm_fast.sample(field, z1, y=Y, method="heun", time_grid=nodes)
    assert round(seen[0]) == 999
    assert round(seen[-1]) == 0
    ends = [(float(table[i].sqrt()), float((1 - table[i]).sqrt())) for i in (999, 0)]
    torch.testing.assert_close(z0, flowed(z1, Y, *ends), rtol=0, atol=4e-4)


def test_the_discrete_path_is_its_table_and_its_own_derivative():
    table = linear_betas()
    path, nodes = DiscretePath(table), torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(path.alpha(nodes) ** 2, table, rtol=1e-12, atol=0)
    t = torch.tensor([0.0011, 0.1234, 0.5, 0.77777, 0.9999], dtype=torch.float64, requires_grad=True)
    for value, slope in ((path.alpha(t), path.d_alpha(t)), (path.sigma(t), path.d_sigma(t))):
        torch.testing.assert_close(torch.autograd.grad(value.sum(), t)[0], slope.detach(), rtol=1e-9, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones(5, dtype=torch.float64))
        assert bool((path.alpha(torch.linspace(0, 1, 4001, dtype=torch.float64)).diff() < 0).all())
    assert path.t_min == 0.001


def test_a_table_with_a_jump_keeps_falling():
    """A spline through it would rise beside the jump; the monotone cubic has the table and its own derivative too."""
    table = torch.tensor([0.99, 0.98, 0.97, 0.1, 0.09, 0.08], dtype=torch.float64)
    path, nodes = DiscretePath(table), torch.arange(1, 7, dtype=torch.float64) / 6
    torch.testing.assert_close(path.alpha(nodes) ** 2, table, rtol=1e-12, atol=0)
    assert bool((path.alpha(torch.linspace(0, 1, 601, dtype=torch.float64)).diff() < 0).all())
    t = torch.tensor([0.21, 0.55, 0.98], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        torch.autograd.grad(path.alpha(t).sum(), t)[0], path.d_alpha(t).detach(), rtol=1e-9, atol=0
    )


def test_points_join_time_as_a_last_column():
    def network(points):
        return straight(points[:, :2], points[:, 2], torch.zeros(len(points), dtype=torch.int64))

    z1, y = start(4, 2), torch.zeros(4, dtype=torch.int64)
    z0 = lfm_fast.sample(TorchCFMVelocity(network, joined=True), z1, method="rk4", num_steps=50)
    torch.testing.assert_close(z0, flowed(z1, y, *STRAIGHT), rtol=0, atol=1e-6)


def test_guidance_goes_through_the_adapters_null_label():
    """The null label is what y=None means, whether `sample` names it or not."""
    field, z1 = SiTVelocity(straight, null_label=NULL), start(4, 4, 3)
    t = torch.full((4,), 0.4, dtype=torch.float64)
    torch.testing.assert_close(field(t, z1), field(t, z1, torch.full((4,), NULL)))
    settings = {"y": Y, "guidance_scale": 2.0, "method": "heun", "num_steps": 5}
    named = lfm_fast.sample(field, z1, null_label=NULL, **settings)
    torch.testing.assert_close(lfm_fast.sample(field, z1, **settings), named)
    v = 2 * field(t, z1, Y) - field(t, z1)
    once = lfm_fast.sample(field, z1, y=Y, guidance_scale=2.0, method="euler", time_grid=[0.4, 0.3])
    torch.testing.assert_close(once, z1 - 0.1 * v)


@pytest.mark.parametrize("scale", [3.0, torch.tensor([1.0, 3.0, 0.5, 1.0], dtype=torch.float64)], ids=["one", "each"])
def test_three_channels_are_guided_and_the_fourth_is_not(scale):
    field, z1 = DiTVelocity(beside_sigmas(of_table("noise")), alphas_cumprod=TABLE, null_label=NULL), start(4, 4, 3)
    dt, t = -0.1, torch.full((4,), 0.6, dtype=torch.float64)
    cond, uncond = field(t, z1, Y), field(t, z1)
    s = torch.as_tensor(scale, dtype=torch.float64).expand(4)[:, None, None]
    want = torch.cat([uncond[:, :3] + s * (cond[:, :3] - uncond[:, :3]), cond[:, 3:]], dim=1)
    settings = {"y": Y, "method": "euler", "time_grid": [0.6, 0.5], "return_stats": True}
    guidance = ThreeChannelGuidance(scale)
    for null_label in (NULL, None):
        z0, stats = lfm_fast.sample(field, z1, guidance=guidance, null_label=null_label, **settings)
        torch.testing.assert_close(z0, z1 + dt * want)
        expected = [2] * 4 if isinstance(scale, float) else [1, 2, 2, 1]
        assert stats.forwards.tolist() == expected
    outside = ThreeChannelGuidance(scale, interval=(0.0, 0.5))
    z0, stats = lfm_fast.sample(field, z1, guidance=outside, null_label=NULL, **settings)
    torch.testing.assert_close(z0, z1 + dt * cond)
    assert stats.forwards.tolist() == [1] * 4


def test_three_channels_of_each_sample_on_its_own_steps():
    """dopri5 takes finished samples out of the batch: scales and labels go with the samples that stay."""
    field, z1 = SiTVelocity(straight, null_label=NULL), start(4, 4, 2)
    z1[1] *= 0.1
    scales = torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64)
    settings = {"null_label": NULL, "method": "dopri5", "atol": 1e-3, "rtol": 1e-3, "return_stats": True}
    together, stats = lfm_fast.sample(field, z1, y=Y, guidance=ThreeChannelGuidance(scales), **settings)
    assert len(set(stats.nfe.tolist())) > 1
    for i in range(4):
        guidance = ThreeChannelGuidance(float(scales[i]))
        alone, cost = lfm_fast.sample(field, z1[i : i + 1], y=Y[i : i + 1], guidance=guidance, **settings)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-12)
        assert cost.forwards[0] == stats.forwards[i]


def test_a_network_in_half_precision_gets_its_type_and_the_state_keeps_its_own():
    """The velocity is made of the float32 state, not of what the network was given of it."""
    seen = []

    class Net(torch.nn.Linear):
        def forward(self, x, timestep, y):
            seen.append((x.dtype, timestep.dtype))
            return super().forward(x)

    field = DiTVelocity(Net(3, 3).to(torch.bfloat16), null_label=0)
    z = start(4, 4, 3).float()
    t = torch.full((4,), 0.3)
    got = lfm_fast.sample(field, z, method="euler", time_grid=[0.3, 0.2])
    assert seen == [(torch.bfloat16, torch.float32)]
    noise = field.network(z.to(torch.bfloat16), t, None).float()
    torch.testing.assert_close(got, z - 0.1 * field.path.velocity_from_noise(noise, z, t))


def called(*_, **__):
    raise AssertionError("the network was called")


Z, T = torch.zeros(2, 4, 2, 2), torch.tensor([0.5, 0.4])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: SiTVelocity("network"), "network is a str, expected a module or function"),
        (lambda: SiTVelocity(called, predicts="epsilon"), "predicts is 'epsilon', expected one of velocity, noise"),
        (lambda: SiTVelocity(called, path="linear"), "path is 'linear', expected an object of lfm_fast.paths"),
        (lambda: SiTVelocity(called, null_label=1.5), "null_label is 1.5, expected a label"),
        (lambda: FlowMatchingVelocity(called, predicts="data"), "of data is no velocity without the path"),
        (lambda: FlowMatchingVelocity(called, labels=3), "labels is 3, expected the name of an extra"),
        (lambda: FlowMatchingVelocity(called)(T, Z, torch.tensor([1, 2])), "not which extra of the model they are"),
        (lambda: SiTVelocity(called)(T, Z), "called without labels and has no null_label"),
        (lambda: DiTVelocity(called)(T, Z), "DiTVelocity was called without labels"),
        (lambda: DiTVelocity(called, predicts="velocity"), "is no noise-predicting DiT"),
        (lambda: DiTVelocity(called, alphas_cumprod=torch.tensor([0.5, 0.6])), "has to fall from step to step"),
        (lambda: DiTVelocity(called, alphas_cumprod=torch.ones(2, 2)), "expected a table of at least two steps"),
        (lambda: TorchCFMVelocity(called, joined=True)(T, Z), r"joined=True is for points \(B, D\)"),
        (lambda: ThreeChannelGuidance(2.0, channels=0), "channels is 0, expected how many are guided"),
        (lambda: SiTVelocity(called, predicts="noise")(torch.tensor(1.0), Z), "divided by alpha.* a t_start"),
        (lambda: SiTVelocity(called, predicts="data")(torch.tensor(0.0), Z), "divided by sigma.* a t_end"),
        (lambda: lfm_fast.sample(DiTVelocity(called), Z, path=Linear()), "the model says it was trained on .*Discrete"),
        (lambda: DiTVelocity(called, null_label=0)(torch.tensor(0.0), Z), r"known in \[0\.001, 1\] only"),
        (lambda: TorchCFMVelocity(lambda t, x: x.repeat(1, 2, 1, 1))(T, Z), "returned 8 channels for 4; if"),
        (lambda: TorchCFMVelocity(lambda t, x: x[:1])(T, Z), r"returned a velocity \(1, 4, 2, 2\) for a state"),
        (lambda: TorchCFMVelocity(lambda t, x: (x,))(T, Z), "The model returned 'tuple'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_gets_a_sentence_and_no_call(call, says):
    with pytest.raises(ValueError, match=says):
        call()

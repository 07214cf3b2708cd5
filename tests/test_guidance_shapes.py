"""Rescale, APG, CFG-Zero* and autoguidance: against the papers' formulas, written on data and in float64."""

import copy
from itertools import pairwise

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import nn

import lfm_fast
from lfm_fast.flow.paths import Linear, VarianceExploding, VariancePreserving, VariancePreservingTrig
from lfm_fast.guidance import APG, Autoguidance, CFGZeroStar, GuidedField, LinearGuidance, Network, Rescale, Rows, Run
from lfm_fast.models import DiT

B, NULL = 4, 9
GENERATOR = torch.Generator().manual_seed(0)
Z, WEIGHTS, PATTERN = (torch.randn(shape, generator=GENERATOR, dtype=torch.float64) for shape in ((B, 2, 3, 5), 5, 30))
PATTERN = PATTERN.view(2, 3, 5)
Y = torch.tensor([1, 2, 3, 4])
T = torch.tensor([0.9, 0.5, 0.3, 0.1], dtype=torch.float64)
SCALES = torch.tensor([3.0, 1.0, -0.5, 7.5], dtype=torch.float64)
PATHS = [Linear(), VariancePreserving(), VariancePreservingTrig(), VarianceExploding(0.05, 10.0)]
# the same formula written in another order; some tens of operations on values below 100, a rounding of 1e-16 each
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def model(t, z, y=None):
    """Its own velocity for every label; nothing that two labels share cancels."""
    labels = (torch.zeros(len(z)) if y is None else y).double()[:, None, None, None]
    return torch.sin(z * WEIGHTS + labels) + t[:, None, None, None] * PATTERN * torch.cos(labels)


def conditional(t, z):
    return model(t, z, Y)


def unconditional(t, z):
    return model(t, z, torch.full_like(Y, NULL))


def column(values):
    return values[:, None, None, None]


def begun(guidance, path=None, method="euler", adaptive=False, batch_size=B):
    return guidance.begin(
        Run(
            model=model,
            batch_size=batch_size,
            y=Y,
            null_label=NULL,
            path=path or Linear(),
            method=method,
            adaptive=adaptive,
        )
    )


def evaluated(guidance, t=T, z=Z, path=None):
    """The velocity that a solver would make of it."""
    return blended(*GuidedField(Network(model, z, Y, NULL), begun(guidance, path))(t, z))


def blended(velocity, other, scale):
    return velocity if other is None else column(scale) * velocity + (1 - column(scale)) * other


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_is_that_of_the_paper(phi):
    v, u = conditional(T, Z), unconditional(T, Z)
    guided = u + column(SCALES) * (v - u)
    found = evaluated(Rescale(SCALES, phi))
    torch.testing.assert_close(found, rescale_noise_cfg(guided, v, phi), **CLOSE)
    if phi == 1.0:
        spread = (1, 2, 3)
        torch.testing.assert_close(found.std(spread), v.std(spread), **CLOSE)
    if phi == 0.0:
        torch.testing.assert_close(found, evaluated(LinearGuidance(SCALES)), **CLOSE)


@pytest.mark.parametrize("constant", [0.0, 2.0])
def test_rescale_of_no_spread_is_finite(constant):
    field = GuidedField(Network(lambda t, z, y=None: torch.full_like(z, constant), Z, Y, NULL), Rescale(3.0, 1.0))
    assert torch.equal(field(T, Z)[0], torch.full_like(Z, constant))
    one = Z[:, :1, :1, :1]  # a single number has no spread either
    field = GuidedField(Network(lambda t, z, y: z * column(y), one, Y, NULL), Rescale(3.0, 1.0))
    torch.testing.assert_close(field(T, one)[0], one * column(3.0 * Y - 2.0 * NULL), **CLOSE)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize(("eta", "threshold"), [(1.0, None), (0.0, None), (0.3, 1.5), (1.0, 0.5), (0.0, 1e3)])
def test_apg_is_that_of_the_paper_on_the_predicted_data(path, eta, threshold):
    data, without = (path.data_from_velocity(v(T, Z), Z, T) for v in (conditional, unconditional))
    guided = torch.cat(
        [
            normalized_guidance(
                data[i : i + 1], without[i : i + 1], float(SCALES[i]) - 1.0, None, eta, threshold or 0.0, True
            )
            for i in range(B)
        ]
    )
    found = evaluated(APG(SCALES, eta, threshold), path=path)
    # back through data costs a factor of 1 / sigma, 20 here
    torch.testing.assert_close(found, path.velocity_from_data(guided, Z, T), rtol=1e-10, atol=1e-10)
    if eta == 1.0 and threshold is None:
        torch.testing.assert_close(found, evaluated(LinearGuidance(SCALES)), **CLOSE)


def test_apg_holds_back_what_is_parallel_and_what_is_too_long():
    path, unguided = Linear(), conditional(T, Z)
    data = path.data_from_velocity(unguided, Z, T)
    push = evaluated(APG(2.0)) - unguided
    assert ((push * data).flatten(1).sum(1).abs() < 1e-10).all()
    pushed = path.data_from_velocity(evaluated(APG(2.0, 1.0, 0.25)), Z, T) - data
    torch.testing.assert_close(pushed.flatten(1).norm(dim=1), torch.full((B,), 0.25, dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_apg_is_finite_where_the_data_is_the_state(momentum):
    """At t = 0 no velocity changes the predicted data, and any velocity of it is asked for all the same."""
    guidance = begun(APG(3.0, 0.0, 0.1, momentum))
    field, now = GuidedField(Network(model, Z, Y, NULL), guidance), torch.zeros(B, dtype=torch.float64)
    field(T, Z)  # something to remember
    guidance.stepped and guidance.stepped()
    found = field(now, Z)[0]
    v, push = conditional(now, Z), conditional(now, Z) - unconditional(now, Z)
    share = (push * Z).flatten(1).sum(1) / Z.flatten(1).square().sum(1)
    torch.testing.assert_close(found, v + 2.0 * (push - column(share) * Z), **CLOSE)


def euler_on_data(path, times, momentum, eta, threshold, scale):
    """The paper's loop: predictions of data, one buffer, Euler steps."""
    buffer, z = MomentumBuffer(momentum), Z.clone()
    for before, after in pairwise(times):
        t = torch.full((B,), before, dtype=torch.float64)
        data, without = (path.data_from_velocity(v(t, z), z, t) for v in (conditional, unconditional))
        guided = normalized_guidance(data, without, scale - 1.0, buffer, eta, threshold, True)
        z = z + (after - before) * path.velocity_from_data(guided, z, t)
    return z


@pytest.mark.parametrize("path", [Linear(), VariancePreservingTrig()], ids=repr)
@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_the_momentum_of_apg_is_that_of_the_paper_where_a_step_is_one_evaluation(path, threshold):
    guidance = APG(3.0, 0.25, threshold or None, momentum=-0.6)
    settings = {"y": Y, "null_label": NULL, "path": path, "method": "euler", "num_steps": 8, "guidance": guidance}
    expected = euler_on_data(path, [1.0 - k / 8 for k in range(9)], -0.6, 0.25, threshold, 3.0)
    plain = lfm_fast.sample(model, Z, **{**settings, "guidance": APG(3.0, 0.25, threshold or None)})
    assert (expected - plain).abs().max() > 0.1  # it makes a difference
    for _ in range(2):  # and nothing of one call is left for the next
        # diffusers sums the norm of all samples' elements; 8 steps on values of about 4
        torch.testing.assert_close(lfm_fast.sample(model, Z, **settings), expected, rtol=1e-10, atol=1e-10)


def stages_on_data(method, times, momentum):
    """Runge-Kutta steps under APG(3, eta=1): every stage adds what the steps before have left, as a velocity."""
    kept, z = torch.zeros_like(Z), Z.clone()
    for before, after in pairwise(times):
        h, start = after - before, z
        push = momentum * -kept / before  # D = z - t v, so a difference of data is -t times one of velocities
        first, kept = stage(before, start, push)
        if method == "heun":
            z = start + h / 2 * (first + stage(after, start + h * first, push)[0])
        else:
            z = start + h * stage(before + h / 2, start + h / 2 * first, push)[0]
    return z


def stage(time, z, push):
    """The velocity, and the difference of predicted data."""
    t = torch.full((B,), time, dtype=torch.float64)
    v, u = conditional(t, z), unconditional(t, z)
    return v + 2.0 * (v - u + push), -time * (v - u + push)


@pytest.mark.parametrize("method", ["heun", "midpoint", "torchdiffeq:midpoint", "torchdiffeq:heun2"])
def test_all_stages_of_a_step_share_one_momentum(method):
    guidance = APG(3.0, eta=1.0, momentum=-0.6)
    settings = {"y": Y, "null_label": NULL, "method": method, "num_steps": 8, "guidance": guidance}
    expected = stages_on_data(method.removeprefix("torchdiffeq:").rstrip("2"), [1.0 - k / 8 for k in range(9)], -0.6)
    torch.testing.assert_close(lfm_fast.sample(model, Z, **settings), expected, rtol=1e-11, atol=1e-11)
    steps = []
    lfm_fast.sample(model, Z, callback=lambda step, t, z: steps.append(step), **settings)
    assert steps == list(range(1, 9))  # the callback is called as it always is


@pytest.mark.parametrize("method", ["ab2", "ab3", "dpmpp_2m", "unipc", "rk4", "sde_heun"])
def test_a_momentum_is_of_one_call_in_every_method_of_fixed_steps(method):
    guidance = APG(3.0, 0.5, 2.0, -0.5)
    settings = {"y": Y, "null_label": NULL, "method": method, "num_steps": 6}
    first = lfm_fast.sample(model, Z, guidance=guidance, **settings)
    guidance(Network(model, Z, Y, NULL), T, Z)  # one that was not begun keeps what it saw
    second = lfm_fast.sample(model, Z, guidance=guidance, **settings)
    assert first.isfinite().all()
    assert torch.equal(first, second)
    assert not torch.allclose(first, lfm_fast.sample(model, Z, guidance=APG(3.0, 0.5, 2.0), **settings), atol=1e-3)


def test_one_object_serves_integrations_that_run_at_once():
    settings = {"y": Y, "null_label": NULL, "num_steps": 5, "guidance": APG(3.0, 0.5, momentum=-0.5)}
    expected = lfm_fast.sample(model, Z, method="heun", **settings)

    def another(step, t, z):
        lfm_fast.sample(model, -z, method="euler", path=VariancePreservingTrig(), **settings)

    assert torch.equal(lfm_fast.sample(model, Z, method="heun", callback=another, **settings), expected)


def test_the_momentum_stays_as_it_is_outside_the_interval():
    guidance, seen = begun(APG(3.0, 1.0, None, -0.5, (0.0, 0.6))), []
    field = GuidedField(Network(model, Z, Y, NULL), guidance)
    for time in (0.5, 0.8, 0.25):
        t = torch.full((B,), time, dtype=torch.float64)
        seen.append(field.at(time)(t, Z)[0])
        guidance.stepped()
    kept = stage(0.5, Z, 0.0)[1]
    torch.testing.assert_close(seen[1], conditional(torch.full((B,), 0.8, dtype=torch.float64), Z), **CLOSE)
    torch.testing.assert_close(seen[2], stage(0.25, Z, -0.5 * -kept / 0.25)[0], **CLOSE)


def test_the_fitted_scale_of_cfg_zero_star_is_that_of_the_paper():
    v, u = conditional(T, Z), unconditional(T, Z)
    fitted = column((v * u).flatten(1).sum(1) / u.flatten(1).square().sum(1))
    theirs = cfg_zero_star_scale(v.flatten(1), u.flatten(1), eps=0.0).flatten()
    torch.testing.assert_close(theirs.double(), fitted.flatten(), rtol=1e-5, atol=1e-5)  # in float32
    expected = (1 - column(SCALES)) * fitted * u + column(SCALES) * v
    torch.testing.assert_close(evaluated(CFGZeroStar(SCALES)), expected, **CLOSE)
    rest = v - fitted * u  # what no multiple of u can fit
    assert ((rest * u).flatten(1).sum(1).abs() < 1e-10).all()
    still = Network(lambda t, z, y: z * (y != NULL)[:, None, None, None], Z, Y, NULL)
    torch.testing.assert_close(blended(*GuidedField(still, CFGZeroStar(3.0))(T, Z)), 3.0 * Z, **CLOSE)


@pytest.mark.parametrize("method", ["euler", "heun", "ab2", "dpmpp_2m", "dopri5", "torchdiffeq:rk4", "euler_maruyama"])
def test_zero_steps_leave_the_state_as_it_is_and_begin_behind_them(method):
    settings = {"y": Y, "null_label": NULL, "method": method, "return_stats": True, "trajectory": True}
    found, stats = lfm_fast.sample(model, Z, num_steps=10, guidance=CFGZeroStar(2.0, zero_steps=3), **settings)
    rest = torch.tensor([1 - k / 10 for k in range(3, 11)], dtype=torch.float64)
    fitted = CFGZeroStar(2.0, zero_steps=0)
    expected, later = lfm_fast.sample(model, Z, t_start=0.7, time_grid=rest, guidance=fitted, **settings)
    assert len(found) == 11
    for k in range(4):
        assert torch.equal(found[k], Z)
    torch.testing.assert_close(found[3:], expected, rtol=1e-9, atol=1e-9)  # 0.7 is written in two ways
    assert torch.equal(stats.nfe, later.nfe)
    assert torch.equal(stats.forwards, 2 * stats.nfe)


def test_autoguidance_leads_away_from_the_weaker_network():
    def weak(t, z, y=None):
        return 0.5 * model(t, z, y) + 1.0

    v, w = conditional(T, Z), 0.5 * conditional(T, Z) + 1.0
    expected = column(SCALES) * v + (1 - column(SCALES)) * w
    network = Network(model, Z, Y)  # no null label is needed
    guided = GuidedField(network, begun(Autoguidance(weak, SCALES)))
    torch.testing.assert_close(blended(*guided(T, Z)), expected, **CLOSE)
    assert network.forwards.tolist() == [2, 1, 2, 2]
    assert network.calls == 2
    outside = GuidedField(network, begun(Autoguidance(weak, SCALES, (0.2, 0.4))))
    torch.testing.assert_close(blended(*outside(T, Z))[:2], v[:2], **CLOSE)
    assert network.forwards.tolist() == [3, 2, 4, 3]


class Velocity(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, t, z, y=None):
        return self.network(z)


def test_the_weaker_network_may_have_weights_of_another_type():
    networks = [nn.Conv2d(2, 2, 1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]

    for strong, weak in (networks, networks[::-1]):
        with torch.no_grad():
            v, w = (Velocity(x)(T.to(x.weight.dtype), Z.to(x.weight.dtype)).float() for x in (strong, weak))
            field = GuidedField(Network(Velocity(strong), Z.float(), Y), begun(Autoguidance(Velocity(weak), SCALES)))
            found = blended(*(x.float() for x in field(T.float(), Z.float())))
        scales = column(SCALES).float()
        torch.testing.assert_close(found, scales * v + (1 - scales) * w, rtol=1e-5, atol=1e-5)


def test_the_weaker_network_may_write_to_the_memory_of_the_other():
    memory = torch.empty_like(Z)

    def network(t, z, y):
        return memory.copy_(model(t, z, y))

    def weak(t, z, y):
        return memory.copy_(model(t, z, 2 * y))

    found = blended(*GuidedField(Network(network, Z, Y), begun(Autoguidance(weak, 3.0)))(T, Z))
    torch.testing.assert_close(found, 3.0 * model(T, Z, Y) - 2.0 * model(T, Z, 2 * Y), **CLOSE)


def test_autoguidance_prepares_both_networks_and_works_without_labels():
    torch.manual_seed(0)
    strong = DiT(image_size=4, hidden_size=48, depth=2, num_heads=2, num_classes=5).double().eval()
    weak = DiT(image_size=4, hidden_size=24, depth=1, num_heads=2, num_classes=5).double().eval()
    products = []
    for network in (strong, weak):
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
        network.final_layer.adaLN_modulation[1].register_forward_hook(lambda *seen: products.append(len(seen[2])))
    z1 = lfm_fast.noise(B, (4, 4, 4), dtype=torch.float64)
    for y, labels in ((Y, 4), (None, 1)):
        products.clear()
        settings = {"y": y, "method": "heun", "num_steps": 3, "return_stats": True}
        guidance = Autoguidance(weak, 2.0)
        found, stats = lfm_fast.sample(strong, z1, guidance=guidance, **settings)
        assert products == [4 * labels] * 2  # four times, each label: one product for each network
        assert stats.forwards.tolist() == [12] * B

        def by_hand(t, z, y=None):
            return 2.0 * strong(t, z, y) - weak(t, z, y)

        torch.testing.assert_close(found, lfm_fast.sample(by_hand, z1, **settings)[0], rtol=1e-10, atol=1e-10)


class OfTheirOwn:
    """A network of some of the samples, as a solver has it that lets others rest."""

    def __new__(cls, network, numbers):
        some = copy.copy(network)
        some.samples = Rows(numbers, torch.tensor(numbers))
        some.y = network.y[numbers]
        return some


MANY = [
    LinearGuidance(SCALES),
    LinearGuidance(SCALES, (0.2, 0.6)),
    LinearGuidance(((0.0, 1.0), (0.4, 3.0), (0.8, 1.0))),
    Rescale(SCALES, 0.7, (0.0, 0.6)),
    APG(SCALES, 0.2, 1.0),
    CFGZeroStar(SCALES, interval=(0.2, 1.0)),
    Autoguidance(lambda t, z, y=None: 0.5 * z + column(y.double()), SCALES),
]


@pytest.mark.parametrize("guidance", MANY, ids=lambda guidance: type(guidance).__name__)
@pytest.mark.parametrize("joint", [True, False])
def test_a_sample_is_guided_as_it_is_alone_whoever_else_is_in_the_batch(guidance, joint):
    guidance = copy.copy(guidance)
    guidance.joint = joint
    whole = evaluated(guidance)
    network = Network(model, Z, Y, NULL)
    field = begun(guidance)
    blended(*field(network, T, Z))
    before = network.forwards
    for numbers in ([2], [3, 0], [1], [0, 1, 2, 3], [1, 2], [2]):
        found = blended(*field(OfTheirOwn(network, numbers), T[numbers], Z[numbers]))
        assert torch.equal(found, whole[numbers]), numbers
    assert torch.equal(network.forwards, before + before * torch.tensor([2, 3, 4, 2]))


@pytest.mark.parametrize("method", ["heun", "ab2", "dopri5"])
@pytest.mark.parametrize("guidance", MANY, ids=lambda guidance: type(guidance).__name__)
def test_a_solve_of_a_batch_is_the_solves_of_its_samples(guidance, method):
    settings = {"null_label": NULL, "method": method, "num_steps": 4, "atol": 1e-6, "rtol": 1e-6, "return_stats": True}
    whole, stats = lfm_fast.sample(model, Z, y=Y, guidance=guidance, **settings)
    for i in range(B):
        one = torch.tensor([i])
        alone, own = lfm_fast.sample(model, Z[one], y=Y[one], guidance=guidance.part(one), **settings)
        assert torch.equal(alone, whole[one])
        assert torch.equal(own.forwards, stats.forwards[one])
        assert torch.equal(own.nfe, stats.nfe[one])


@pytest.mark.parametrize("kind", [LinearGuidance, Rescale, APG, CFGZeroStar])
def test_half_precision_velocities_are_shaped_in_the_type_of_the_state(kind):
    def half(t, z, y=None):
        return model(t.double(), z.double(), y).bfloat16()

    def same(t, z, y=None):
        return half(t, z, y).double()

    z, t = Z.float(), T.float()
    found = blended(*GuidedField(Network(half, z, Y, NULL), begun(kind(SCALES.float())))(t, z))
    network = Network(same, z.double(), Y, NULL)
    expected = blended(*GuidedField(network, begun(kind(SCALES)))(t.double(), z.double()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)  # float32's rounding on values of 30

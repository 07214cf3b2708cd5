"""KnownLatents: whatever the solver, the network sees known latents on their path, and they are there in the end."""

import pytest
import torch

import lfm_fast
from lfm_fast.flow.paths import Linear, VarianceExploding, VariancePreserving
from lfm_fast.guidance import APG, KnownLatents, LinearGuidance
from lfm_fast.solvers import METHODS

B, SHAPE = 5, (2, 4, 4)
Z_1 = lfm_fast.noise(B, SHAPE, seed=1)
Z_0 = lfm_fast.noise(B, SHAPE, seed=2)
KNOWN = torch.rand(B, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
Y = torch.tensor([1, 2, 3, 4, 5])
PATHS = [Linear(), Linear(sigma_min=1e-5), VariancePreserving(), VarianceExploding(0.01, 5.0)]


class Model:
    """A velocity that mixes places, and as far as samples go nothing else; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, t, z, y=None):
        self.asked.append((t.clone(), z.clone()))
        labels = 0.0 if y is None else 0.1 * y[:, None, None, None]
        return z.mean((1, 2, 3), keepdim=True) - 0.5 * z + labels


def sampled(model, guidance, path=PATHS[0], **settings):
    return lfm_fast.sample(model, path.prior(Z_1), guidance=guidance, path=path, **{"num_steps": 12, **settings})


@pytest.mark.parametrize("method", [*METHODS, "torchdiffeq:dopri5"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_network_sees_known_latents_on_their_path(method, path):
    """At every evaluation: alpha z_0 + sigma z_1 to a rounding of the solver's, the rest being its own."""
    model = Model()
    sampled(model, KnownLatents(Z_0, KNOWN, Z_1), path, method=method)
    assert len(model.asked) >= 12
    for t, z in model.asked:
        if len(t) == B:  # else some have arrived: see below
            expected = path.interpolate(Z_0, Z_1, t)[0]
            assert torch.equal(z[KNOWN.expand_as(z)], expected[KNOWN.expand_as(z)])
            assert float(t.min()) > 0.5 or not torch.allclose(z, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"y": Y, "null_label": 0}], ids=["plain", "guided"])
def test_known_latents_are_what_they_are_and_others_feel_them(method, settings):
    """On the straight path their velocity is constant, so only roundings are left; stochastic methods add noise, which
    the network does not see."""
    inner = LinearGuidance(torch.tensor([1.0, 2.0, 1.0, 3.0, 2.0])) if settings else None
    z = sampled(Model(), KnownLatents(Z_0, KNOWN, Z_1, inner), method=method, **settings)
    known = KNOWN.expand_as(z)
    if not METHODS[method].stochastic:
        torch.testing.assert_close(z[known], Z_0[known], atol=2e-5, rtol=0)
    other = sampled(Model(), KnownLatents(Z_0 + 1.0, KNOWN, Z_1, inner), method=method, **settings)
    assert (other[~known] - z[~known]).abs().min() > 0.05


@pytest.mark.parametrize("method", ["heun", "ab3", "dopri5"])
def test_nothing_known_is_plain_sampling(method):
    nothing = torch.zeros(1, dtype=torch.bool)
    z = sampled(Model(), KnownLatents(Z_0, nothing, Z_1), method=method)
    assert torch.equal(z, lfm_fast.sample(Model(), Z_1, method=method, num_steps=12))


@pytest.mark.parametrize("inner", [LinearGuidance(2.0), LinearGuidance(torch.arange(5.0)), APG(3.0)])
def test_each_sample_has_its_own(inner):
    """Samples on their own, in parts, and with steps of their own give what they give together."""
    for method, tolerance in (("heun", 1e-6), ("dopri5", 1e-6)):
        settings = {"method": method, "null_label": 0}
        whole = KnownLatents(Z_0, KNOWN, Z_1, inner)
        together = sampled(Model(), whole, y=Y, **settings)
        for rows in torch.arange(B).split(2):
            z = lfm_fast.sample(Model(), Z_1[rows], y=Y[rows], guidance=whole.part(rows), num_steps=12, **settings)
            torch.testing.assert_close(z, together[rows], atol=tolerance, rtol=0)
    assert whole.num_samples == B


def test_the_guidance_inside_is_told_everything():
    heard = []

    class Inner:
        zero_steps = 3

        def begin(self, run):
            heard.append("begun")
            return self

        def prepare(self, network, times):
            heard.append(len(times))

        def stepped(self):
            heard.append("step")

        def __call__(self, network, t, z, time=None):
            return network.conditional(t, z, time), None, None

    sampled(Model(), KnownLatents(Z_0, KNOWN, Z_1, Inner()), method="euler")
    assert heard == ["begun", 9] + 9 * ["step"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((Z_0, KNOWN, Z_1[:2]), r"z_1 is \(2, 2, 4, 4\)"),
        ((Z_0.long(), KNOWN, Z_1), "z_0 is .* expected floating"),
        ((Z_0, KNOWN.float(), Z_1), "expected a bool tensor"),
        ((Z_0, KNOWN[:2], Z_1), "does not go with"),
        ((Z_0, None, Z_1), "known is a NoneType"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        KnownLatents(*arguments)


def test_another_batch_is_refused():
    with pytest.raises(ValueError, match="of 2 samples, but 5 are sampled"):
        sampled(Model(), KnownLatents(Z_0[:2], KNOWN[:2], Z_1[:2]))

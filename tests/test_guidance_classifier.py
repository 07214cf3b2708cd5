"""Classifier guidance where everything is known: a mixture of Gaussians, its velocities and its exact classifier."""

import math

import pytest
import torch
from torch import nn

import lfm_fast
from lfm_fast.flow.paths import Linear, VarianceExploding, VariancePreserving, VariancePreservingTrig
from lfm_fast.guidance import ClassifierGuidance, GuidedField, Network, Run

CLASSES, SHAPE, B = 3, (2, 3), 5
GENERATOR = torch.Generator().manual_seed(0)
MEANS, NOISE = (torch.randn((n, *SHAPE), generator=GENERATOR, dtype=torch.float64) for n in (CLASSES, B))
SPREADS = torch.tensor([0.3, 0.6, 1.1], dtype=torch.float64)
PRIOR = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 1, 0])
PATHS = [
    Linear(),
    Linear(sigma_min=1e-2),
    VariancePreserving(),
    VariancePreservingTrig(),
    VarianceExploding(0.05, 10.0),
]


class Mixture:
    """z_0 ~ sum_c PRIOR_c N(MEANS_c, SPREADS_c^2 I) on a path: all of it in closed form."""

    def __init__(self, path):
        self.path = path

    def logits(self, t, z):
        """log p(c) + log N(z; alpha mean_c, (alpha spread_c)^2 + sigma^2), (B, C): log p(c | z) but for a constant."""
        alpha, sigma = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        variance = (alpha * SPREADS) ** 2 + sigma**2
        far = (z[:, None] - alpha[..., None, None] * MEANS).flatten(2).square().sum(2)
        return PRIOR.log() - far / (2 * variance) - math.prod(SHAPE) / 2 * variance.log()

    def of_each_class(self, t, z):
        """E[u_t | z, c], (B, C, ...): of a Gaussian, linear in z."""
        alpha, sigma, d_alpha, d_sigma = (x[:, None] for x in self.path.coefficients(t))
        variance = (alpha * SPREADS) ** 2 + sigma**2
        growth = (alpha * d_alpha * SPREADS**2 + sigma * d_sigma) / variance
        alpha, d_alpha, growth = (x[..., None, None] for x in (alpha, d_alpha, growth))
        return d_alpha * MEANS + growth * (z[:, None] - alpha * MEANS)

    def __call__(self, t, z, y=None):
        velocities = self.of_each_class(t, z)
        if y is not None:
            return velocities[torch.arange(len(z)), y]
        return (self.logits(t, z).softmax(1)[..., None, None] * velocities).sum(1)


def field(guidance, path, model=None, y=Y, null_label=None, z=NOISE):
    model = model or Mixture(path)
    run = Run(model=model, batch_size=len(z), y=y, null_label=null_label, path=path, method="euler")
    return GuidedField(Network(model, z, y, null_label), guidance.begin(run))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_exact_classifier_makes_the_conditional_velocity_of_the_unconditional_one(path):
    mixture = Mixture(path)
    for times in ([0.9, 0.7, 0.5, 0.3, 0.1], [0.99, 1e-3, 0.25, 0.75, 0.999]):
        t = torch.tensor(times, dtype=torch.float64)
        found, *rest = field(ClassifierGuidance(mixture.logits), path)(t, NOISE)
        assert rest == [None, None]
        # h of up to 1e3 times a gradient of rounding 1e-16 times values of about 10
        torch.testing.assert_close(found, mixture(t, NOISE, Y), rtol=1e-10, atol=1e-10)
        assert (found - mixture(t, NOISE)).abs().max() > 1e-2  # the classifier did something


@pytest.mark.parametrize("path", [VariancePreserving(), VarianceExploding(0.05, 10.0)], ids=repr)
@pytest.mark.parametrize("method", ["heun", "ab3", "dopri5"])
def test_sampling_with_the_exact_classifier_is_sampling_the_conditional_flow(path, method):
    mixture, settings = Mixture(path), {"path": path, "method": method, "num_steps": 12, "y": Y, "return_stats": True}
    start = path.prior(NOISE)
    found, stats = lfm_fast.sample(mixture, start, guidance=ClassifierGuidance(mixture.logits), **settings)
    expected, plain = lfm_fast.sample(mixture, start, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(stats.forwards, stats.nfe)
    assert torch.equal(stats.nfe, plain.nfe)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_are_finite_and_the_term_is_zero_where_nothing_of_the_data_is_left(path, dtype):
    mixture, z = Mixture(path), NOISE.to(dtype)

    def steep(t, z):  # a classifier without a gradient at the ends, where one divides by alpha or sigma
        return mixture.logits(t.double(), (z / (path.alpha(t) * path.sigma(t))[:, None, None]).double())

    for classifier in (mixture.logits, steep):
        guided = field(ClassifierGuidance(classifier, 3.0), path, lambda t, z, y=None: 2 * z, z=z)
        for time in (1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item(), path.t_min):
            t = torch.full((B,), time, dtype=dtype)
            blind = float(path.alpha(torch.tensor(time, dtype=torch.float64))) < 1e-7
            if classifier is steep and not blind:
                continue
            for at in (guided, guided.at(time)):
                found = at(t, z)[0]
                assert found.isfinite().all()
                assert not blind or torch.equal(found, 2 * z)
    mixed = torch.tensor([1.0, 0.5, 1.0, 0.25, 0.75], dtype=dtype)  # of each sample its own time
    found = field(ClassifierGuidance(steep), path, lambda t, z, y=None: 2 * z, z=z)(mixed, z)[0]
    assert found.isfinite().all()
    assert ((found != 2 * z).flatten(1).any(1) == (path.alpha(mixed) > 1e-7)).all()


@pytest.mark.parametrize("scale", [torch.tensor([1.0, 0.0, -2.0, 0.5, 0.0]), 3.0, ((0.0, 0.0), (1.0, 4.0))])
def test_the_scale_is_linear_by_sample_and_time_and_zero_asks_no_classifier(scale):
    path, rows = Linear(), []
    mixture = Mixture(path)

    def counting(t, z):
        rows.append(len(z))
        return mixture.logits(t, z)

    t = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.0], dtype=torch.float64)
    guided = field(ClassifierGuidance(counting, scale), path)
    used = 4 * t if isinstance(scale, tuple) else torch.as_tensor(scale, dtype=torch.float64).expand(B)
    unguided, conditional = mixture(t, NOISE), mixture(t, NOISE, Y)
    expected = unguided + used[:, None, None] * (conditional - unguided)
    torch.testing.assert_close(guided(t, NOISE)[0], expected, rtol=1e-12, atol=1e-12)
    assert rows == [int((used != 0).sum())]
    assert guided.network.forwards.tolist() == [1] * B
    inside = field(ClassifierGuidance(counting, scale, (0.4, 0.8)), path)
    rows.clear()
    used = torch.where((t > 0.4) & (t < 0.8), used, 0.0)
    expected = unguided + used[:, None, None] * (conditional - unguided)
    torch.testing.assert_close(inside(t, NOISE)[0], expected, rtol=1e-12, atol=1e-12)
    assert rows == [int((used != 0).sum())]
    rows.clear()
    inside.at(0.9)(torch.full((B,), 0.9, dtype=torch.float64), NOISE)
    assert rows == []


def test_a_null_label_is_what_the_model_gets():
    seen = []

    def model(t, z, y):
        seen.append(y.tolist())
        return 0 * z

    field(ClassifierGuidance(Mixture(Linear()).logits), Linear(), model, null_label=7)(torch.full((B,), 0.5), NOISE)
    assert seen == [[7] * B]


def test_a_network_without_labels_is_guided_in_its_sampling_form():
    torch.manual_seed(0)
    network = lfm_fast.models.DiT(image_size=4, hidden_size=24, depth=1, num_heads=2).double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    products = []
    network.final_layer.adaLN_modulation[1].register_forward_hook(lambda *seen: products.append(len(seen[2])))
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 9)).double()
    z1, settings = lfm_fast.noise(B, (4, 4, 4), dtype=torch.float64), {"method": "heun", "num_steps": 4}
    guidance = ClassifierGuidance(lambda t, z: classifier(z), 2.0)
    found = lfm_fast.sample(network, z1, y=Y + 6, guidance=guidance, **settings)
    assert products == [5]  # five times, one label

    def by_hand(t, z):
        with torch.enable_grad():
            x = z.clone().requires_grad_()
            gradient = torch.autograd.grad(classifier(x).log_softmax(1)[torch.arange(B), Y + 6].sum(), x)[0]
        h = torch.where(t < 1, t / (1 - t), 0.0)
        return network(t, z) - 2.0 * h[:, None, None, None] * gradient

    torch.testing.assert_close(found, lfm_fast.sample(by_hand, z1, **settings), rtol=1e-10, atol=1e-10)
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_gradients_are_there_in_every_mode_and_type(mode, weights):
    torch.manual_seed(0)
    classifier = nn.Linear(6, CLASSES).to(weights)
    seen = []

    def model(t, z, y=None):
        assert not torch.is_grad_enabled()
        return 0 * z

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = classifier

        def forward(self, t, z):
            seen.append((t.dtype, z.dtype))
            t.zero_()  # they are its own
            return self.linear(z.flatten(1))

    with mode():
        z = NOISE.float().clone()
        found = lfm_fast.sample(
            model, z, y=Y.clone(), guidance=ClassifierGuidance(Classifier()), num_steps=3, method="euler"
        )
        assert not found.requires_grad
    assert set(seen) == {(torch.float32, weights)}
    probability = classifier.weight.double()[Y] - classifier.weight.double().mean(0)  # not far from uniform
    assert (((found - z).flatten(1).double() * probability).sum(1) > 0).all()


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (lambda t, z: z, r"logits \(5, 2, 3\), expected \(5, K\)"),
        (lambda t, z: z.flatten(1)[:2], r"returned \(2, 6\)"),
        (lambda t, z: z.flatten(1).argmax(1), "torch.int64"),
        (lambda t, z: (z, z), "returned 'tuple'"),
        (lambda t, z: z.flatten(1).detach(), "no gradient"),
        (lambda t, z: z.flatten(1)[:, :2], "the label 2, but the classifier knows 2 classes"),
    ],
)
def test_what_are_no_logits_is_refused(classifier, message):
    with pytest.raises(ValueError, match=message) as caught:
        field(ClassifierGuidance(classifier), Linear())(torch.full((B,), 0.5), NOISE)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_is_refused_before_any_forward():
    def refuse(*arguments, **more):
        raise AssertionError("called")

    with pytest.raises(ValueError, match="classifier is 'NoneType'"):
        ClassifierGuidance(None)
    with pytest.raises(ValueError, match="there are no labels y"):
        lfm_fast.sample(refuse, NOISE, guidance=ClassifierGuidance(refuse))
    with pytest.raises(ValueError, match=r"guidance_scale is \(2,\)"):
        lfm_fast.sample(refuse, NOISE, y=Y, guidance=ClassifierGuidance(refuse, torch.ones(2)))

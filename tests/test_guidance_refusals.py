"""Guidance that cannot be is refused in one sentence, before the model is called."""

import pytest
import torch

import lfm_fast
from lfm_fast.guidance import APG, Autoguidance, CFGZeroStar, LinearGuidance, Rescale
from lfm_fast.interop.discrete import linear_betas
from lfm_fast.interop.dit import DiTVelocity
from lfm_fast.models import DiT

B, NULL = 4, 9
Z, Y = torch.ones(B, 2, 3, 5), torch.tensor([1, 2, 3, 4])


def unused(t, z, y=None):
    raise AssertionError("the model must not be called")


class OnAnotherPath:
    path = lfm_fast.paths.VariancePreserving()

    def __call__(self, t, z, y=None):
        raise AssertionError("the model must not be called")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rescale(2.0, 1.5), "factor is 1.5"),
        (lambda: Rescale(2.0, "0.7"), "factor is '0.7'"),
        (lambda: APG(2.0, float("nan")), "eta is nan"),
        (lambda: APG(2.0, norm_threshold=0), "norm_threshold is 0"),
        (lambda: APG(2.0, momentum=-1.0), "momentum is -1.0"),
        (lambda: CFGZeroStar(2.0, 0.04), "zero_steps is 0.04"),
        (lambda: CFGZeroStar(2.0, True), "zero_steps is True"),
        (lambda: Autoguidance(None, 2.0), "expected a module or function"),
        (lambda: LinearGuidance(2.0, joint="always"), "joint is 'always'"),
    ],
)
def test_what_no_guidance_can_be_made_of_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": APG(2.0, momentum=-0.5), "method": "dopri5"}, "dopri5 tries its steps"),
        ({"guidance": APG(2.0, momentum=-0.5), "method": "torchdiffeq:bosh3"}, "torchdiffeq:bosh3 tries its steps"),
        ({"guidance": CFGZeroStar(2.0, 5), "method": "euler", "num_steps": 5}, "the first 5 of 5 steps"),
        ({"guidance": Rescale(torch.ones(3)), "method": "euler"}, r"guidance_scale is \(3,\) .* expected .*\(4,\)"),
        ({"guidance": APG(torch.ones(3)), "guidance_scale": 2.0}, "Both guidance and guidance_scale"),
        ({"guidance": CFGZeroStar(2.0), "y": None}, "there are no labels y"),
        ({"guidance": Autoguidance(OnAnotherPath(), 2.0)}, "weak_model .*VariancePreserving.*Linear"),
        ({"guidance": Autoguidance(unused, torch.ones(5))}, r"guidance_scale is \(5,\)"),
    ],
)
def test_what_an_integration_cannot_have_is_refused_before_any_forward(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        lfm_fast.sample(unused, Z, **{"y": Y, "null_label": NULL, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [LinearGuidance, Rescale, APG, CFGZeroStar])
def test_a_network_without_a_null_label_has_nothing_to_be_guided_by(kind):
    network = DiT(image_size=4, hidden_size=24, depth=1, num_heads=2, num_classes=5)
    network.forward = unused
    z1 = lfm_fast.noise(B, (4, 4, 4))
    with pytest.raises(ValueError, match="no null label"):
        lfm_fast.sample(network, z1, y=Y, guidance=kind(2.0), method="euler", num_steps=2)
    with pytest.raises(ValueError, match="no null label"):
        lfm_fast.sample(network, z1, y=Y, guidance_scale=2.0, method="euler", num_steps=2)


def test_a_weak_model_of_the_same_path_serves_whatever_its_table_was_kept_in():
    tables = (linear_betas(), linear_betas().float())
    strong, weak = (DiTVelocity(lambda x, t, y: x, alphas_cumprod=table, null_label=NULL) for table in tables)
    z0 = lfm_fast.sample(strong, Z, y=Y, guidance=Autoguidance(weak, 2.0), method="euler", num_steps=2)
    torch.testing.assert_close(z0, lfm_fast.sample(strong, Z, y=Y, method="euler", num_steps=2), rtol=1e-3, atol=1e-3)

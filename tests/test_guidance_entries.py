"""Further arguments of a model that hold one entry per sample go with their samples."""

import pytest
import torch
from torch import nn

import lfm_fast
from lfm_fast.models import DiT

B = 5
Z = lfm_fast.noise(B, (2, 4, 4), seed=3, dtype=torch.float64)
CONDITION = torch.linspace(-2, 2, B, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1])


class Pulled:
    """dz/dt = c z + y for a number c of each sample; keeps what it was called with."""

    sample_arguments = ("condition",)

    def __init__(self):
        self.rows = []

    def __call__(self, t, z, y=None, condition=None):
        self.rows.append(len(z))
        assert len(condition) == len(z)
        return condition.view(-1, 1, 1, 1) * z + (0 if y is None else y.view(-1, 1, 1, 1))


class Plain(Pulled):
    """The same, but the library is not told that the numbers are by sample."""

    sample_arguments = ()


@pytest.mark.parametrize("method", ["heun", "dopri5", "bosh3"])
@pytest.mark.parametrize("scale", [1.0, torch.tensor([2.0, 1.0, 3.0, 1.0, 0.5])])
@pytest.mark.parametrize("null_label", [None, 3])
def test_samples_that_leave_take_their_entries_along(method, scale, null_label):
    model, plain = Pulled(), Plain()
    settings = {"method": method, "num_steps": 6, "y": Y, "guidance_scale": scale, "null_label": null_label}
    settings["model_kwargs"] = {"condition": CONDITION}
    found, stats = lfm_fast.sample(model, Z, **settings, return_stats=True)
    want = lfm_fast.sample(plain, Z, **settings)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    one_by_one = [lfm_fast.sample(Pulled(), Z[i : i + 1], **_of_sample(settings, i)) for i in range(B)]
    assert torch.equal(found, torch.cat(one_by_one))
    if method != "heun":
        assert stats.nfe.unique().numel() > 1
        assert min(model.rows) < max(model.rows), "finished samples were evaluated to the end"
        assert set(plain.rows) == {B}
    if null_label is not None and method == "heun":
        guided = B if isinstance(scale, float) else int((scale != 1).sum())
        assert set(model.rows) == ({B} if isinstance(scale, float) else {B + guided})


def _of_sample(settings, i):
    scale = settings["guidance_scale"]
    one = {"y": Y[i : i + 1], "model_kwargs": {"condition": CONDITION[i : i + 1]}}
    return {**settings, **one, "guidance_scale": scale if isinstance(scale, float) else scale[i : i + 1]}


def test_a_conditioned_network_keeps_its_sampling_form():
    torch.manual_seed(0)
    sizes = {"image_size": 4, "hidden_size": 24, "depth": 1, "num_heads": 2, "num_classes": 3, "label_dropout": 0.1}
    model = DiT(in_channels=5, out_channels=2, **sizes).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    condition = torch.randn(B, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings = {"y": Y, "guidance_scale": torch.tensor([2.0, 1.0, 3.0, 1.0, 0.5]), "null_label": 3}
    settings |= {"method": "heun", "num_steps": 4, "model_kwargs": {"condition": condition}}
    calls = []
    model.t_embedder.register_forward_hook(lambda *_: calls.append(1))
    found = lfm_fast.sample(model, Z, **settings)
    assert len(calls) == 1  # the table of modulations, before the loop
    want = lfm_fast.sample(lambda *inputs, **kwargs: model(*inputs, **kwargs), Z, **settings)
    assert len(calls) > 8
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("condition", [CONDITION[:4], torch.tensor(1.0), [1.0] * B])
def test_an_argument_of_another_number_of_samples_is_refused(condition):
    model = Pulled()
    with pytest.raises(ValueError, match=r"condition in model_kwargs is .* one entry for each of 5 samples"):
        lfm_fast.sample(model, Z, model_kwargs={"condition": condition})
    assert not model.rows

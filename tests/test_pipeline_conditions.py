"""`LatentFlow.sample` with a condition: one entry for each image, encoded once."""

import pytest
import torch
from torch import nn

import lfm_fast
from lfm_fast.autoencoder import load_autoencoder
from lfm_fast.models import DiT, conditioned
from lfm_fast.models.conditioned import Conditioned

SETTINGS = {"method": "heun", "num_steps": 3}


class Brightness(nn.Module):
    """A number for each image -> planes of it."""

    kind, argument = "brightness", "condition"
    calls = 0

    def __init__(self, *, channels: int):
        super().__init__()
        self.config = {"channels": channels}
        self.weight = nn.Parameter(torch.ones(channels))

    def check(self, raw, count):
        if raw.shape != (count,):
            raise ValueError(f"expected ({count},) numbers, got {tuple(raw.shape)}.")

    def forward(self, raw):
        type(self).calls += 1
        return (raw[:, None] * self.weight)[:, :, None, None].expand(-1, -1, 4, 4)


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = DiT(image_size=4, in_channels=7, out_channels=4, hidden_size=24, depth=1, num_heads=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def encoded(network, monkeypatch):
    monkeypatch.setitem(conditioned.ENCODERS, "brightness", Brightness)
    monkeypatch.setattr(Brightness, "calls", 0)
    model = Conditioned(network=network, encoder=Brightness(channels=3))
    return lfm_fast.LatentFlow(model, load_autoencoder("embedded"), task={"name": "brightness"})


def test_each_image_has_its_own_entry_whatever_the_batch(network):
    flow = lfm_fast.LatentFlow(network, load_autoencoder("embedded"))
    condition = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = flow.sample(3, condition=condition, **SETTINGS)
    z_1 = lfm_fast.noise(3, (4, 4, 4), seed=0)
    want = flow.decode(lfm_fast.sample(network, z_1, model_kwargs={"condition": condition}, **SETTINGS))
    torch.testing.assert_close(images, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.sample(3, condition=condition, batch_size=2, **SETTINGS), want, rtol=0, atol=1e-5)
    one = flow.sample(2, condition=condition[:1], **SETTINGS)
    torch.testing.assert_close(one[0], images[0], rtol=0, atol=1e-5)
    assert (one[1] - images[1]).abs().max() > 1e-3


def test_what_an_encoder_takes_is_encoded_once_for_a_batch(encoded):
    condition = torch.tensor([0.5, -2.0, 1.0])
    images = encoded.sample(3, condition=condition, batch_size=2, **SETTINGS)
    assert Brightness.calls == 2
    planes = condition[:, None, None, None].expand(-1, 3, 4, 4)
    want = lfm_fast.LatentFlow(encoded.model.network, encoded.autoencoder).sample(3, condition=planes, **SETTINGS)
    torch.testing.assert_close(images, want, rtol=0, atol=1e-5)


def test_the_task_is_saved_with_the_flow(encoded, tmp_path):
    encoded.save_pretrained(tmp_path)
    again = lfm_fast.LatentFlow.from_pretrained(tmp_path)
    assert again.task == {"name": "brightness"}
    condition = torch.tensor([1.0])
    assert torch.equal(
        again.sample(1, condition=condition, **SETTINGS), encoded.sample(1, condition=condition, **SETTINGS)
    )


def test_a_condition_that_does_not_fit_is_refused_before_anything_is_made(encoded, network, monkeypatch):
    calls = []
    monkeypatch.setattr(DiT, "velocity", lambda *inputs: calls.append(inputs))
    with pytest.raises(ValueError, match=r"this flow is conditioned \(brightness\); give condition, or call inpaint"):
        encoded.sample(2)
    with pytest.raises(ValueError, match="one entry for each of 3 images, or with one for all"):
        encoded.sample(3, condition=torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected \(2,\) numbers"):
        encoded.sample(2, condition=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="takes no condition"):
        lfm_fast.LatentFlow.from_pretrained("embedded").sample(1, condition=torch.zeros(1))
    assert not calls
    assert not Brightness.calls

"""A network with the encoder of its condition: one module to train and save, taken apart to sample from."""

import copy
import json

import pytest
import torch
from torch import nn

import lfm_fast
from lfm_fast.checkpoint import load_checkpoint, save_weights
from lfm_fast.models import DiT, conditioned, from_config
from lfm_fast.models.conditioned import Conditioned

T = torch.tensor([0.2, 0.8])
Z = lfm_fast.noise(2, (2, 4, 4), seed=0)
TEXT = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])


class Planes(nn.Module):
    """Numbers (B, 2) -> planes (B, channels, 4, 4) of one value each."""

    kind, argument = "planes", "condition"

    def __init__(self, *, channels: int):
        super().__init__()
        self.config = {"channels": channels}
        self.linear = nn.Linear(2, channels)

    def check(self, raw, count):
        if raw.shape != (count, 2):
            raise ValueError(f"expected ({count}, 2) numbers, got {tuple(raw.shape)}.")

    def forward(self, raw):
        return self.linear(raw)[:, :, None, None].expand(-1, -1, 4, 4)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(conditioned.ENCODERS, "planes", Planes)


def made(**options):
    torch.manual_seed(0)
    network = DiT(image_size=4, in_channels=5, out_channels=2, hidden_size=24, depth=1, num_heads=2, **options)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Conditioned(network=network, encoder=Planes(channels=3)).eval()


def test_the_encoder_makes_the_networks_argument_and_is_trained_with_it():
    model = made()
    velocity = model(T, Z, condition=TEXT)
    assert torch.equal(velocity, model.network(T, Z, condition=model.encoder(TEXT)))
    network, arguments = model.parts(TEXT)
    assert network is model.network
    assert torch.equal(velocity, network(T, Z, **arguments))
    velocity.square().sum().backward()
    assert model.encoder.linear.weight.grad.abs().min() > 0


def test_it_is_rebuilt_from_its_configuration_and_from_a_file(tmp_path):
    model = made(num_classes=3, label_dropout=0.1)
    config = json.loads(json.dumps(model.config))
    again = from_config(config)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    y = torch.tensor([1, 3])
    assert torch.equal(again.eval()(T, Z, y, condition=TEXT), model(T, Z, y, condition=TEXT))
    save_weights(tmp_path / "weights.safetensors", model.state_dict(), {"config": model.config})
    loaded = load_checkpoint(tmp_path / "weights.safetensors")
    assert torch.equal(loaded(T, Z, y, condition=TEXT), model(T, Z, y, condition=TEXT))


def test_it_has_the_networks_sizes_labels_and_modes():
    model = made(num_classes=3, label_dropout=0.1)
    assert (model.image_size, model.in_channels, model.out_channels) == (4, 5, 2)
    assert (model.num_classes, model.num_labels, model.null_label) == (3, 4, 3)
    assert model.flops_per_sample() == model.network.flops_per_sample()
    model.activation_checkpointing = "full"
    assert model.network.activation_checkpointing == "full"
    assert copy.deepcopy(model).activation_checkpointing == "full"
    unlabelled = made()
    assert unlabelled.null_label == unlabelled.network.null_label == 0
    assert made(num_classes=3).null_label is None


def test_what_cannot_be_put_together_is_refused():
    model = made()
    with pytest.raises(ValueError, match="conditioned on planes; give condition"):
        model(T, Z)
    with pytest.raises(ValueError, match=r"there is no encoder 'sounds'; there is .*planes"):
        from_config({**model.config, "encoder": {"kind": "sounds"}})

    class Context(Planes):
        argument = "context"

    with pytest.raises(ValueError, match="makes a context, which DiT does not take"):
        Conditioned(network=model.network, encoder=Context(channels=3))

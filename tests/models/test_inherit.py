"""A network that begins as another computes what it does, and what it adds is free to learn."""

import pytest
import torch

from lfm_fast.models import create_model
from lfm_fast.models.conditioned import Conditioned
from lfm_fast.models.inherit import inherit

SIZES = {"image_size": 8, "downsampling": 1}
SMALL = {
    "DiT-Emoji/2": {"hidden_size": 32, "depth": 2, "num_heads": 2},
    "ADM-Emoji": {"model_channels": 32},
    "adm": {"model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)},
}
T, Z = torch.tensor([0.2, 0.9]), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONDITION = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(1))


def network(name, **settings):
    torch.manual_seed(len(settings))
    model = create_model(name, **SIZES, **{**SMALL[name], **settings}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))  # fresh weights give velocity zero
    return model


@pytest.mark.parametrize("name", SMALL)
def test_a_condition_makes_no_difference_at_first_and_can_be_learned(name):
    plain, wider = network(name), network(name, in_channels=9, out_channels=4)
    before = wider(T, Z, condition=CONDITION)
    inherit(wider, plain)
    expected = plain(T, Z)
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(wider(T, Z, condition=CONDITION), expected, atol=1e-5, rtol=1e-5)
    condition = CONDITION.clone().requires_grad_()
    wider(T, Z, condition=condition).square().sum().backward()
    assert condition.grad.abs().max() == 0
    gradients = [p.grad for p in wider.parameters() if p.ndim == 4 and p.shape[1] == 9]
    assert len(gradients) == 1
    assert gradients[0][:, 4:].abs().max() > 1e-4


def test_without_labels_it_is_what_the_other_does_without_one():
    plain = network("DiT-Emoji/2", num_classes=3, label_dropout=0.1)
    wider = network("DiT-Emoji/2", in_channels=9, out_channels=4)
    inherit(wider, plain)
    torch.testing.assert_close(wider(T, Z, condition=CONDITION), plain(T, Z), atol=1e-5, rtol=1e-5)


def test_the_network_of_a_conditioned_one_inherits():
    class Encoder(torch.nn.Module):
        kind, argument, config = "planes", "condition", {}

        def forward(self, raw):
            return raw

    plain, inner = network("DiT-Emoji/2"), network("DiT-Emoji/2", in_channels=9, out_channels=4)
    inherit(Conditioned(network=inner, encoder=Encoder()), plain)
    torch.testing.assert_close(inner(T, Z, condition=CONDITION), plain(T, Z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "other", "sentence"),
    [
        (network("DiT-Emoji/2"), network("ADM-Emoji"), "a DiT cannot begin as this UNet"),
        (network("DiT-Emoji/2"), network("DiT-Emoji/2", depth=1), "they have other weights"),
        (network("DiT-Emoji/2"), network("DiT-Emoji/2", hidden_size=48), "choose the same network"),
        (network("DiT-Emoji/2"), network("DiT-Emoji/2", in_channels=9, out_channels=4), "choose the same network"),
        (network("DiT-Emoji/2"), network("DiT-Emoji/2", num_classes=3), "without label dropout"),
        (
            network("DiT-Emoji/2", num_classes=2, label_dropout=0.1),
            network("DiT-Emoji/2", num_classes=3, label_dropout=0.1),
            "the same labels",
        ),
    ],
)
def test_others_are_refused_and_nothing_is_changed(model, other, sentence):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        inherit(model, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

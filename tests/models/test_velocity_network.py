"""What comes beside the latents: a condition behind their channels, and what is refused."""

import pytest
import torch
from torch import nn

import lfm_fast
from lfm_fast.models import DiT, from_config


def conditioned():
    torch.manual_seed(0)
    model = DiT(image_size=4, in_channels=5, out_channels=2, hidden_size=24, depth=2, num_heads=2, num_classes=3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


T = torch.tensor([0.1, 0.9], dtype=torch.float64)
Z = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CONDITION = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
Y = torch.tensor([2, 0])


def test_a_condition_is_put_behind_the_latents():
    model = conditioned()
    velocity = model(T, Z, Y, condition=CONDITION)
    assert velocity.shape == Z.shape
    assert torch.equal(velocity, model(T, torch.cat([Z, CONDITION], dim=1), Y))
    other = model(T, Z, Y, condition=CONDITION.flip(0))
    assert (other != velocity).flatten(1).any(1).all()  # each sample has its own


def test_out_channels_belong_to_the_configuration_only_where_they_differ():
    model = conditioned()
    assert model.config["out_channels"] == 2
    assert from_config(model.config).state_dict().keys() == model.state_dict().keys()
    plain = DiT(image_size=4, in_channels=4, out_channels=4, hidden_size=24, depth=1, num_heads=2)
    assert "out_channels" not in plain.config
    assert (plain.in_channels, plain.out_channels) == (4, 4)


def test_the_sampling_form_takes_a_condition():
    model = conditioned()
    prepared = model.prepare(T, Y)
    want = model(T[1], Z, Y, condition=CONDITION)
    torch.testing.assert_close(prepared(1, Z, Y, condition=CONDITION), want, rtol=1e-12, atol=1e-12)
    twice = torch.tensor([1, 0, 1])
    want = model(T[0], Z[twice], Y[twice], condition=CONDITION[twice])
    found = prepared(0, Z, Y[twice], samples=twice, condition=CONDITION)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_floating_point_operations_count_what_goes_in_and_what_comes_out():
    sizes = {"image_size": 4, "hidden_size": 24, "depth": 1, "num_heads": 2}
    counts = {
        (channels, out): DiT(in_channels=channels, out_channels=out, **sizes).flops_per_sample()
        for channels, out in ((5, 5), (5, 2), (2, 2))
    }
    each = 2 * 4 * 4 * 24  # one channel more on one side: 4 tokens of 2 x 2 entries, 24 wide, two for a multiply-add
    assert counts[5, 5] - counts[5, 2] == counts[5, 2] - counts[2, 2] == 3 * each


@pytest.mark.parametrize(
    ("z", "condition", "sentence"),
    [
        (Z, None, "takes latents of shape .B, 5, 4, 4., but z is .2, 2, 4, 4.; give the other 3 channels as condition"),
        (Z, CONDITION[:, :2], "takes a condition .B, 3, 4, 4., but condition is .2, 2, 4, 4."),
        (Z, CONDITION[..., :2], "takes a condition"),
        (Z, CONDITION[:1], "condition holds 1 entries for 2 samples"),
        (Z[:, :1], CONDITION, "takes latents of shape .B, 2, 4, 4., but z is"),
    ],
)
def test_what_does_not_fit_is_refused(z, condition, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        conditioned()(T, z, Y, condition=condition)
    assert "\n" not in str(caught.value)


def test_a_network_without_room_for_a_condition_says_so():
    model = DiT(image_size=4, in_channels=2, hidden_size=24, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="takes no condition"):
        model(T.float(), Z.float(), condition=CONDITION.float())
    with pytest.raises(ValueError, match="out_channels 4 must not exceed in_channels 2"):
        lfm_fast.create_model("DiT-S/2", in_channels=2, out_channels=4)


@pytest.mark.parametrize("name", ["t", "z", "y", "condition", "context"])
def test_what_is_no_tensor_gets_a_sentence(name):
    sizes = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "context_dim": 8}
    model = lfm_fast.create_model("adm-layout", image_size=32, num_classes=3, in_channels=5, out_channels=2, **sizes)
    given = {"t": T.float(), "z": Z.float(), "y": Y, "condition": CONDITION.float(), "context": torch.randn(2, 4, 8)}
    with torch.no_grad():
        assert model(**given).shape == Z.shape
    with pytest.raises(ValueError, match=f"{name} must be a tensor, but is a list"):
        model(**{**given, name: given[name].tolist()})


@pytest.mark.parametrize("name", ["DiT-S/2", "adm", "ddpm++", "adm-original"])
def test_no_samples_give_no_velocities(name):
    sizes = {"depth": 1} if name == "DiT-S/2" else {"model_channels": 32, "channel_mult": [1]}
    model = lfm_fast.create_model(name, image_size=32, num_classes=3, **sizes)
    assert model(T[:0].float(), torch.empty(0, 4, 4, 4), Y[:0]).shape == (0, 4, 4, 4)

import copy

import pytest
import torch
import torch.nn.functional as F

from lfm_fast.models.conditioned import Conditioned
from lfm_fast.models.label_map_encoder import LabelMapEncoder


def blocky(shape, num_classes, seed=0):
    """Maps whose cells are some of one class and some mixed, all classes in play, different in every sample."""
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = shape
    coarse = torch.randint(num_classes, (batch, height // 4, width // 4), generator=generator)
    fine = torch.randint(num_classes, shape, generator=generator)
    mixed = torch.rand(batch, 1, width, generator=generator) < 0.5
    return torch.where(mixed, fine, coarse.repeat_interleave(4, 1).repeat_interleave(4, 2))


def by_definition(label_map, weight, downsampling):
    """One-hot planes, halved bilinearly until they have the latents' size, through a 1x1 convolution; float64."""
    planes = F.one_hot(label_map, weight.shape[0]).permute(0, 3, 1, 2).double()
    while downsampling > 1:
        planes = F.interpolate(planes, scale_factor=0.5, mode="bilinear", align_corners=False)
        downsampling //= 2
    return F.conv2d(planes, weight.double().t()[:, :, None, None])


@pytest.mark.parametrize(
    ("shape", "num_classes", "downsampling"), [((3, 32, 32), 19, 8), ((2, 16, 24), 183, 4), ((2, 8, 8), 3, 1)]
)
def test_it_is_the_definition(shape, num_classes, downsampling):
    torch.manual_seed(0)
    encoder = LabelMapEncoder(num_classes=num_classes, downsampling=downsampling, out_channels=5)
    label_map = blocky(shape, num_classes)
    expected = by_definition(label_map, encoder.weight.detach(), downsampling)
    assert expected.shape == (shape[0], 5, shape[1] // downsampling, shape[2] // downsampling)
    # float64: d^2 products summed in another order; float32: at most 64 products of counts, |weight| below 5
    torch.testing.assert_close(copy.deepcopy(encoder).double()(label_map), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(encoder(label_map).double(), expected, rtol=0, atol=64 * 5 * 2**-24)


def test_gradients_are_the_definitions():
    torch.manual_seed(0)
    encoder = LabelMapEncoder(num_classes=7, downsampling=4).double()
    label_map = blocky((3, 16, 16), 7)
    upstream = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    (encoder(label_map) * upstream).sum().backward()
    weight = encoder.weight.detach().clone().requires_grad_()
    (by_definition(label_map, weight, 4) * upstream).sum().backward()
    torch.testing.assert_close(encoder.weight.grad, weight.grad, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(encoder, {"weight": w}, (label_map,)), (weight,)
    )


def test_samples_do_not_mix():
    torch.manual_seed(0)
    encoder = LabelMapEncoder(num_classes=5, downsampling=4)
    label_map = blocky((4, 16, 16), 5)
    together = encoder(label_map)
    for i in range(4):
        assert torch.equal(encoder(label_map[i : i + 1])[0], together[i])
    assert not torch.equal(together[0], together[1])


def test_compiled_in_one_graph():
    torch.manual_seed(0)
    encoder = LabelMapEncoder(num_classes=5, downsampling=4)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    label_map = blocky((2, 16, 16), 5)
    torch.testing.assert_close(compiled(label_map), encoder(label_map))


def test_a_cell_of_one_class_has_unit_variance():
    torch.manual_seed(0)
    weight = LabelMapEncoder(num_classes=183, downsampling=8).weight
    assert 0.9 < weight.std() < 1.1  # 732 normals: the standard deviation's own is 0.026


def test_frozen_is_a_projection_that_nothing_moves():
    torch.manual_seed(0)
    encoder = LabelMapEncoder(num_classes=19, downsampling=8, frozen=True)
    assert not list(encoder.parameters())
    assert encoder.weight.abs().max() <= 19**-0.5
    assert encoder.weight.std() > 0.2 * 19**-0.5
    other = LabelMapEncoder(**encoder.config)
    other.load_state_dict(encoder.state_dict())
    label_map = blocky((1, 16, 16), 19)
    assert torch.equal(encoder(label_map), other(label_map))
    assert not encoder(label_map).requires_grad


def tiny_network():
    import lfm_fast

    return lfm_fast.create_model(
        "DiT-S/2",
        image_size=16,
        downsampling=4,
        in_channels=8,
        out_channels=4,
        num_classes=0,
        depth=1,
        hidden_size=64,
        num_heads=2,
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_trained_with_its_network(frozen):
    """Both learn: the encoder's gradient arrives through the network, and a step along it lowers the loss."""
    torch.manual_seed(0)
    encoder = LabelMapEncoder(num_classes=5, downsampling=4, frozen=frozen)
    model = Conditioned(network=tiny_network(), encoder=encoder)
    for parameter in model.network.parameters():  # a fresh network's last layer is zero, and so is every gradient
        torch.nn.init.normal_(parameter, std=0.1)
    t, z, label_map = torch.rand(3), torch.randn(3, 4, 4, 4), blocky((3, 16, 16), 5)
    target = torch.randn(3, 4, 4, 4)

    def loss():
        return (model(t, z, condition=label_map) - target).square().mean()

    before = loss()
    before.backward()
    if frozen:
        assert [name for name, _ in model.named_parameters() if name.startswith("encoder")] == []
        return
    gradient = encoder.weight.grad
    assert (gradient.abs().sum(1) > 0).all()
    with torch.no_grad():
        encoder.weight -= 1e-2 * gradient / gradient.norm()
    assert loss() < before


def test_a_conditioned_network_is_rebuilt_from_its_configuration():
    from lfm_fast.models import from_config

    torch.manual_seed(0)
    encoder = LabelMapEncoder(num_classes=5, downsampling=4)
    model = Conditioned(network=tiny_network(), encoder=encoder)
    again = from_config(model.config)
    again.load_state_dict(model.state_dict())
    arguments = (torch.rand(2), torch.randn(2, 4, 4, 4))
    label_map = blocky((2, 16, 16), 5)
    assert torch.equal(again(*arguments, condition=label_map), model(*arguments, condition=label_map))
    assert again.config == model.config


def test_bad_maps_are_refused():
    encoder = LabelMapEncoder(num_classes=5, downsampling=4)
    good = blocky((2, 16, 16), 5)
    encoder.check(good, 2)
    for bad, count, says in (
        (good.float(), 2, r"torch\.float32 of shape \(2, 16, 16\); expected label maps, an int64 tensor"),
        (good[0], 2, r"of shape \(16, 16\); expected"),
        ("map.png", 2, r"the condition is map\.png; expected"),
        (good, 3, "holds 2 label maps for 3 samples"),
        (good[:, :15], 2, "label maps of 15x16 pixels do not divide"),
        (good[:, :0], 2, "label maps of 0x16 pixels do not divide"),
        (good.index_fill(2, torch.tensor([7]), 5), 2, r"label map 0 has the id 5 at row 0, column 7, .* 0 to 4\."),
        (good - 5, 2, r"label map 0 has the id -\d at row 0, column 0"),
    ):
        with pytest.raises(ValueError, match=says):
            encoder.check(bad, count)
    with pytest.raises(ValueError, match="num_classes must be a positive integer"):
        LabelMapEncoder(num_classes=0, downsampling=4)

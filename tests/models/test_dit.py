"""DiT's call: shapes, dtypes, labels, refusals, initialisation, compilation and counts."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lfm_fast.models import DiT, create_model, num_parameters

SMALL = {"image_size": 6, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3}


def small_dit(seed=0, **arguments):
    """A small network whose every weight matters: adaLN-Zero alone would return zero whatever comes in."""
    torch.manual_seed(seed)
    model = DiT(**{**SMALL, "num_classes": 5, "label_dropout": 0.1, **arguments})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(batch, generator=generator)
    z = torch.randn(batch, 3, 6, 6, generator=generator)
    return t, z, torch.arange(batch) % 5


@torch.no_grad()
def test_every_sample_depends_on_its_own_time_and_label_only():
    model, (t, z, y) = small_dit().double(), inputs()
    together = model(t, z, y)
    for i in range(len(t)):
        # float64 products of other shapes may be summed in another order
        torch.testing.assert_close(model(t[i : i + 1], z[i : i + 1], y[i : i + 1]), together[i : i + 1])
    assert (model(t.flip(0), z, y) - together).abs().amax(dim=(1, 2, 3))[[0, 2]].min() > 1e-3
    assert (model(t, z, y.flip(0)) - together).abs().amax(dim=(1, 2, 3))[[0, 2]].min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("arguments", "null_label", "row"),
    [
        ({"num_classes": 5, "label_dropout": 0.1}, 5, 5),
        ({"num_classes": 5, "label_dropout": 0.0}, None, 4),
        ({"num_classes": 0, "label_dropout": 0.0}, 0, 0),
    ],
)
def test_no_label_means_the_last_row(arguments, null_label, row):
    model, (t, z, _) = small_dit(**arguments), inputs()
    assert model.null_label == null_label
    assert torch.equal(model(t, z), model(t, z, torch.full((3,), row)))


@torch.no_grad()
def test_one_time_serves_the_whole_batch():
    model, (_, z, y) = small_dit(), inputs()
    assert torch.equal(model(torch.tensor(0.3), z, y), model(torch.full((3,), 0.3), z, y))


@torch.no_grad()
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_any_batch_and_non_contiguous_latents(batch):
    model, (t, z, y) = small_dit(), inputs(batch)
    strided = z.transpose(2, 3).contiguous().transpose(2, 3)
    assert model(t, strided, y).shape == z.shape
    assert torch.equal(model(t, strided, y), model(t, z, y))
    assert model(t, z, y).is_contiguous()


@torch.no_grad()
def test_dtypes():
    model, (t, z, y) = small_dit(), inputs()
    exact = small_dit().double()(t.double(), z.double(), y)
    # bfloat16 keeps 8 bits: 2^-8 per rounding, a handful of them in a row; measured 1.2e-2
    for found, dtype, tolerance in [
        (model(t, z.double(), y), torch.float32, 1e-5),
        (small_dit().bfloat16()(t, z, y), torch.bfloat16, 4e-2),
    ]:
        assert found.dtype == dtype
        assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(t, z, y)
    assert (found.double() - exact).abs().max() <= 4e-2 * exact.abs().max()


@torch.no_grad()
def test_times_are_not_rounded_to_the_weights_bfloat16():
    model, (_, z, y) = small_dit().bfloat16(), inputs()
    t = torch.tensor([0.5, 0.5, 0.5])
    features = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, arguments: features.append(arguments[0]))
    model(t, z, y)
    model(t + 0.001, z, y)  # bfloat16 would round 0.501 to 0.5
    assert not torch.equal(*features)


@pytest.mark.parametrize(
    ("t", "z", "y", "sentence"),
    [
        ((3,), (3, 4, 6, 6), [0, 1, 2], r"shape \(B, 3, 6, 6\), but z is \(3, 4, 6, 6\)"),
        ((3,), (3, 3, 8, 8), [0, 1, 2], r"shape \(B, 3, 6, 6\), but z is \(3, 3, 8, 8\)"),
        ((3,), (3, 6, 6), [0, 1, 2], r"shape \(B, 3, 6, 6\), but z is \(3, 6, 6\)"),
        ((2,), (3, 3, 6, 6), [0, 1, 2], r"t must have shape \(3,\)"),
        ((3, 1), (3, 3, 6, 6), [0, 1, 2], r"t must have shape \(3,\)"),
        ((3,), (3, 3, 6, 6), [0, 1], r"integer labels of shape \(3,\)"),
        ((3,), (3, 3, 6, 6), [0.0, 1.0, 2.0], "integer labels"),
        ((3,), (3, 3, 6, 6), [0, 1, 6], "0..5, but y holds 6; this network knows 5 classes"),
        ((3,), (3, 3, 6, 6), [-1, 1, 2], "0..5, but y holds -1"),
    ],
)
def test_wrong_inputs_get_a_sentence_before_any_work(t, z, y, sentence):
    model = small_dit()
    model.velocity = None  # work would fail another way
    with pytest.raises(ValueError, match=sentence):
        model(torch.rand(t), torch.randn(z), torch.tensor(y))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"image_size": 7}, "side 7 is no multiple of patch_size 2"),
        ({"num_heads": 5}, "multiple of num_heads 5"),
        ({"hidden_size": 18}, "and of 4"),
        ({"depth": 0}, "depth must be a positive integer"),
        ({"in_channels": 4.0}, "in_channels must be a positive integer"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive"),
        ({"num_classes": -1}, "num_classes must be 0"),
        ({"label_dropout": 1.0}, "label_dropout must lie in"),
        ({"num_classes": 0, "label_dropout": 0.1}, "needs labels to drop"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        DiT(**{**SMALL, **arguments})


@torch.no_grad()
def test_initialisation_is_adaln_zero():
    torch.manual_seed(0)
    model = DiT(**{**SMALL, "hidden_size": 96, "num_classes": 200, "label_dropout": 0.1})
    t, z, y = inputs()
    assert torch.equal(model(t, z, y), torch.zeros_like(z))
    block, (x, h), c, following = model.blocks[1], torch.randn(2, 3, 9, 96), torch.randn(3, 96), torch.randn(3, 6 * 96)
    assert torch.equal(block(x, h, block.adaLN_modulation(c), following)[0], x)
    for weight, scale in [
        (model.y_embedder.embedding_table.weight, 0.02),
        (model.t_embedder.mlp[0].weight, 0.02),
        (model.t_embedder.mlp[2].weight, 0.02),
        (model.blocks[0].attn.qkv.weight, math.sqrt(2 / (96 + 3 * 96))),  # Xavier: variance 2 / (fan in + fan out)
        (model.blocks[1].mlp.fc2.weight, math.sqrt(2 / (4 * 96 + 96))),
        (model.x_embedder.proj.weight, math.sqrt(2 / (12 + 96))),
    ]:
        # the sampling error of a standard deviation over n values is below 1 / sqrt(2 n)
        assert abs(weight.std().item() / scale - 1) < 5 / math.sqrt(2 * weight.numel())
    assert all(not layer.bias.any() for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d))


def test_training_reaches_every_trainable_weight_and_leaves_the_position_table():
    model, (t, z, y) = small_dit().train(), inputs()
    model(t, z, y).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["pos_embed"]


def counting_backend(graphs):
    def compile_graph(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    return compile_graph


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compiles_without_a_graph_break(dtype):
    torch._dynamo.reset()
    model, (t, z, y), graphs = small_dit().to(dtype), inputs(), []
    compiled = torch.compile(model, fullgraph=True, backend=counting_backend(graphs))
    assert torch.equal(compiled(t, z, y), model(t, z, y))
    assert len(graphs) == 1
    assert torch.equal(compiled(t, z), model(t, z))


def test_compiles_in_training_under_autocast():
    torch._dynamo.reset()
    model, (t, z, y) = small_dit().train(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = model(t, z, y), compiled(t, z, y)
    torch.testing.assert_close(found, expected)
    expected.float().square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    found.float().square().mean().backward()
    for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), gradients, strict=True):
        # both round to bfloat16 in the backward pass, in another order: 2^-8 of the largest entry, a few times over
        assert (parameter.grad - gradient).abs().max() <= 2e-2 * gradient.abs().max()


# arXiv 2212.09748, table 1 rounded, ImageNet's 1000 labels and the null label included
@pytest.mark.parametrize(
    ("name", "million_parameters", "gflop"),
    [("DiT-S/2", 32.9, 12.1), ("DiT-B/2", 130, 46.0), ("DiT-L/2", 458, 161), ("DiT-XL/2", 675, 237)],
)
def test_published_sizes(name, million_parameters, gflop):
    with torch.device("meta"):
        model = create_model(name, num_classes=1000, label_dropout=0.1)
    assert num_parameters(model) / 1e6 == pytest.approx(million_parameters, rel=5e-3)
    assert model.flops_per_sample() / 1e9 == pytest.approx(gflop, rel=5e-3)


def test_flops_are_what_a_forward_multiplies():
    with torch.device("meta"):
        model = DiT(**{**SMALL, "mlp_ratio": 2.5})
        t, z = torch.rand(1), torch.randn(1, 3, 6, 6)
    with FlopCounterMode(display=False) as counter:
        model(t, z)
    assert model.flops_per_sample() == counter.get_total_flops()

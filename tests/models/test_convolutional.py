"""U-Nets compiled and checkpointed: one graph for every batch, and the gradients that they have without."""

import pytest
import torch
from outcomes import outcome
from torch._dynamo.testing import CompileCounterWithBackend

from lfm_fast.models import create_model

NETWORKS = {
    name: {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    for name in ("adm", "ddpm++", "ncsn++")
}
ONE_LEVEL = {
    "model_channels": 64,
    "channel_mult": [1],
    "attn_resolutions": [8],
}  # tracing both ways takes 0.2 s a block
LABELS = {"num_classes": 5, "label_dropout": 0.1}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def small(name, **arguments):
    torch.manual_seed(0)
    model = create_model(name, **{"image_size": 64, **LABELS, **NETWORKS[name], **arguments})
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch=3):
    z = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return torch.linspace(0.05, 0.95, batch), z, (2 * torch.arange(batch) + 1) % 5


@torch.no_grad()
@pytest.mark.parametrize("name", ["adm", "ncsn++"])
def test_one_graph_serves_every_batch_with_and_without_labels(name):
    plain, model, counter = small(name), small(name), CompileCounterWithBackend("eager")
    model.compile(backend=counter)  # fullgraph: a break is an error
    for batch in (1, 4):
        t, z, y = inputs(batch)
        for labels in (y, None, y.int()):
            # the modulated norm is two operations there, and one with weights of each sample here
            torch.testing.assert_close(model(t, z, labels), plain(t, z, labels), rtol=1e-5, atol=1e-5)
    model(t, z.contiguous(memory_format=torch.channels_last), y)
    assert counter.frame_count == 1


def test_gradients_through_the_compiled_graph():
    plain, model, counter = (*(small("adm", **ONE_LEVEL) for _ in range(2)), CompileCounterWithBackend("aot_eager"))
    model.activation_checkpointing = "selective"
    model.compile(backend=counter)
    for found, expected in zip(outcome(model, *inputs()), outcome(plain, *inputs()), strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()  # sums in float32, in another order
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_gives_the_same_gradients_to_the_bit(name, mode, precision):
    model = small(name, dropout=0.2).train()
    torch.manual_seed(1)
    expected = outcome(model, *inputs(), precision)
    model.activation_checkpointing = mode
    torch.manual_seed(1)
    found = outcome(model, *inputs(), precision)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def kept_bytes(model, mode):
    """What is alive between the forward and the backward pass beside weights and inputs."""
    model.activation_checkpointing = mode
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = 0

    def pack(x):
        nonlocal total
        pointer = x.untyped_storage().data_ptr()
        total += 0 if pointer in seen else x.untyped_storage().nbytes()
        seen.add(pointer)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        velocity = model(*inputs(8))
    assert velocity.requires_grad
    return total


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_keeps_less(name):
    model = small(name)
    everything, blocks = (kept_bytes(model, mode) for mode in ("none", "full"))
    assert blocks < 0.5 * everything


def test_another_part_is_refused():
    with pytest.raises(ValueError, match="part is 'blocks', expected 'velocity' or 'block'"):
        small("adm").compile("blocks")

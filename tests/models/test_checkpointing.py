"""Activation checkpointing: the gradients of the plain network to the bit, and no product made twice."""

import pytest
import torch
from outcomes import outcome
from test_dit import inputs, small_dit
from torch.utils.flop_counter import FlopCounterMode

from lfm_fast import ops
from lfm_fast.models import checkpointing

ATTENTION = ("sdpa", "math", "reference")


def checkpointed_dit(mode, **arguments):
    model = small_dit(**arguments)
    model.activation_checkpointing = mode
    return model


def flops(model, t, z, y):
    """Of a forward and of a forward and backward pass."""
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            velocity = model(t, z, y)
            if backward:
                velocity.sum().backward()
        counts.append(counter.get_total_flops())
    return counts


@pytest.mark.parametrize("mode", checkpointing.MODES[1:])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("precision", "depth"), [("fp32", 1), ("fp32", 4), ("bf16", 5)])
def test_gradients_are_the_plain_networks_to_the_bit(mode, attention, precision, depth):
    with ops.use_backend(attention, ops="attention"):
        for batch in (1, 3):
            t, z, y = inputs(batch)
            sized = {"depth": depth, "image_size": 8}  # 16 tokens, or PyTorch's fused attention is not taken
            z = torch.nn.functional.pad(z, (1, 1, 1, 1))
            found = outcome(checkpointed_dit(mode, **sized), t, z, y, precision)
            expected = outcome(small_dit(**sized), t, z, y, precision)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)


def test_selective_keeps_the_result_of_the_compiled_attention(monkeypatch):
    if ops.explain("attention", *(torch.ones(1, 1, 4, 8, dtype=torch.bfloat16),) * 3).backend != "cpp":
        pytest.skip("this processor has no tiles, or the library is not built")
    calls, row = [], ops._registry.row("attention_with_lse")
    monkeypatch.setattr(row, "choose", lambda args: calls.append(1) or "cpp")
    for mode, expected in (("none", 2), ("selective", 2), ("full", 4)):
        calls.clear()
        outcome(checkpointed_dit(mode), *inputs(), "bf16")
        assert len(calls) == expected


@pytest.mark.parametrize("tokens_side", [4, 8])
def test_selective_makes_no_product_twice_but_attentions_scores(tokens_side):
    sized = {"depth": 3, "image_size": 2 * tokens_side, "num_heads": 3}
    t, y, z = torch.rand(2), torch.tensor([0, 4]), torch.randn(2, 3, 2 * tokens_side, 2 * tokens_side)
    tokens, width = tokens_side**2, 24
    scores = 3 * 2 * 2 * tokens * tokens * width  # of 3 blocks and 2 samples, 2 per multiply-add
    for attention, again in (("sdpa", 0), ("math", scores)):
        with ops.use_backend(attention, ops="attention"):
            forward, plain = flops(small_dit(**sized), t, z, y)
            assert flops(checkpointed_dit("selective", **sized), t, z, y) == [forward, plain + again]
            # all that full makes again lies in the blocks and the head, and it stops at the last tensor it needs
            assert plain + 0.5 * forward < flops(checkpointed_dit("full", **sized), t, z, y)[1] < plain + forward


def test_a_second_call_in_one_autocast_context():
    """Autocast's cache of converted weights: the second forward converts none, its second pass would."""
    model, plain, (t, z, y) = checkpointed_dit("selective"), small_dit(), inputs()
    for network in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            velocity = network(t, z, y) + network(t, z, None)
        velocity.float().square().sum().backward()
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if one.requires_grad:
            # the plain network adds both calls' gradients of a converted weight in bfloat16: 2^-8 per rounding
            assert (one.grad - other.grad).abs().max() <= 2e-2 * other.grad.abs().max(), name


@torch.no_grad()
def test_nothing_is_kept_without_gradients(monkeypatch):
    monkeypatch.setattr(checkpointing, "through_blocks", None)
    assert torch.equal(checkpointed_dit("selective")(*inputs()), small_dit()(*inputs()))


def test_a_frozen_network_still_gives_the_gradient_of_its_input():
    model, plain, (t, z, y) = checkpointed_dit("selective").requires_grad_(False), small_dit(), inputs()
    found = [torch.autograd.grad(m(t, x, y).sum(), x)[0] for m in (model, plain) for x in [z.clone().requires_grad_()]]
    assert torch.equal(*found)


def test_a_network_that_cannot_checkpoint_says_so():
    network = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="is 'selective', but Linear keeps all activations"):
        checkpointing.set_mode(network, "selective")

"""Compiled U-Nets: one graph without a break for every batch, labelled or not, equal to the plain network."""

import copy

import pytest
import torch
from test_compiling import fresh_compiler  # noqa: F401 (a fixture that runs by itself)
from test_unet import KINDS, difference, gradients, inputs, unet
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from lfm_fast.train.compiling import can_compile_for_cpu

SLOW = (pytest.mark.slow, pytest.mark.fuzz)
ONE_LEVEL = {"channel_mult": (1,), "attention_sides": (8,)}  # it is the compiler that takes the time


def compiled_unet(kind, backend="aot_eager", **arguments):
    model, counter = unet(kind, **arguments), CompileCounterWithBackend(backend)
    model.compile(backend=counter)
    return model, counter


@pytest.mark.parametrize(("kind", "checkpointing"), [("layout", "none"), pytest.param("unet", "selective", marks=SLOW)])
def test_one_graph_serves_every_batch_with_and_without_labels(kind, checkpointing):
    plain, (model, counter) = unet(kind, **ONE_LEVEL), compiled_unet(kind, "eager", **ONE_LEVEL)
    model.activation_checkpointing = checkpointing
    for batch in (1, 4):
        given = inputs(model, batch)
        for labels in (given["y"], None):
            found, expected = (gradients(m, {**given, "y": labels}) for m in (model, plain))
            largest = max(gradient.abs().max() for gradient in expected)
            for one, other in zip(found, expected, strict=True):
                # the same but for the order in which the adaptive norms multiply and add
                assert (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-6 * largest
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_gradients_through_the_compilers_own_backward_pass(kind, checkpointing):
    plain, (model, counter) = unet(kind), compiled_unet(kind)
    model.activation_checkpointing = checkpointing
    for batch in (1, 4):
        given = inputs(model, batch)
        found, expected = (gradients(m, given) for m in (model, plain))
        largest = max(gradient.abs().max() for gradient in expected)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-6 * largest
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.fuzz
def test_layouts_and_conditions_make_no_further_graph():
    model, counter = compiled_unet("unet", "eager", in_channels=9, out_channels=4, **ONE_LEVEL)
    given = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**given)
        given["z"] = given["z"].contiguous(memory_format=torch.channels_last)
        assert torch.equal(model(**given), expected)
        given["z"], condition = given["z"][:, :4], given["z"][:, 4:]
        assert torch.equal(model(**given, condition=condition), expected)
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.skipif(not can_compile_for_cpu(), reason="there is no C++ compiler for Inductor")
def test_inductors_code_serves_every_batch():
    plain, model = unet("layout"), unet("layout")
    model.compile()
    before = counters["stats"]["unique_graphs"]
    for batch in (1, 3):
        given = inputs(model, batch)
        assert difference(model(**given), plain(**given)) < 1e-5  # its kernels add in another order
    assert counters["stats"]["unique_graphs"] == before + 1


@torch.no_grad()
def test_a_copy_is_not_compiled():
    model, counter = compiled_unet("unet", "eager")
    other = copy.deepcopy(model)
    assert torch.equal(other(**inputs(other)), unet("unet")(**inputs(other)))
    assert counter.frame_count == 0


def test_another_part_is_refused():
    with pytest.raises(ValueError, match="part is 'blocks'"):
        unet().compile("blocks")

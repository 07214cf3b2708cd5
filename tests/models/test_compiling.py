"""A compiled DiT: one graph without a break for every batch size, labelled or not, equal to the plain network."""

import copy
import pickle

import pytest
import torch
from outcomes import outcome
from test_dit import inputs, small_dit
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lfm_fast.models.compiling import Compiled
from lfm_fast.train.compiling import can_compile_for_cpu

# how many graphs there are: a checkpointed region of blocks has a first, a middle and a last form
PARTS = {("velocity", "none"): 1, ("velocity", "selective"): 1, ("block", "none"): 1, ("block", "selective"): 3}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def compiled_dit(part, checkpointing="none", backend="aot_eager", **arguments):
    model, counter = small_dit(**arguments), CompileCounterWithBackend(backend)
    model.activation_checkpointing = checkpointing
    model.compile(part, backend=counter)
    return model, counter


@pytest.mark.parametrize(
    ("part", "checkpointing", "batches"), [*((*kind, (1, 2, 64)) for kind in PARTS), ("block", "none", (64, 1))]
)
def test_one_graph_serves_every_batch_with_and_without_labels(part, checkpointing, batches):
    depth = 5 if (part, checkpointing) == ("block", "selective") else 2
    plain = small_dit(depth=depth)
    model, counter = compiled_dit(part, checkpointing, "eager", depth=depth)
    for batch in batches:
        t, z, y = inputs(batch)
        for labels in (y, None, y.int()):
            for found, expected in zip(outcome(model, t, z, labels), outcome(plain, t, z, labels), strict=True):
                assert torch.equal(found, expected)
    assert counter.frame_count == PARTS[part, checkpointing]


def test_layouts_of_the_inputs_make_no_further_graph():
    model, counter = compiled_dit("velocity", backend="eager")
    t, z, y = inputs(4)
    expected = outcome(model, t, z, y)
    transposed, channels_last = z.mT.contiguous().mT, z.contiguous(memory_format=torch.channels_last)
    for other in (transposed, channels_last, z.repeat(2, 1, 1, 1)[::2], z[:, :1].expand(-1, 3, -1, -1)):
        outcome(model, t, other, y)
    one_time = outcome(model, torch.tensor(0.3), z, y)
    assert torch.equal(one_time[0], small_dit()(torch.full((4,), 0.3), z, y))
    assert torch.equal(outcome(model, t, transposed, y)[0], expected[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("part", "checkpointing", "precision"), [("velocity", "selective", "fp32"), ("block", "selective", "bf16")]
)
def test_gradients_through_the_compilers_own_backward_pass(part, checkpointing, precision):
    plain = small_dit()
    model, counter = compiled_dit(part, checkpointing)
    for batch in (1, 7):
        t, z, y = inputs(batch)
        found, expected = (outcome(m, t, z, y, precision) for m in (model, plain))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)  # the same operators in the same order
    assert counter.frame_count == 1


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("part", "checkpointing"), [("block", "selective"), ("velocity", "none")])
def test_no_graph_is_cut_at_the_gradient_buckets_of_a_parallel_run(part, checkpointing):
    model, counter = compiled_dit(part, checkpointing, "eager")
    network = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-3)  # a bucket for every weight
    for found, expected in zip(outcome(network, *inputs()), outcome(small_dit(), *inputs()), strict=True):
        assert torch.equal(found, expected)
    assert counter.frame_count == 1


@pytest.mark.skipif(not can_compile_for_cpu(), reason="there is no C++ compiler for Inductor")
def test_inductors_code_serves_every_batch():
    plain = small_dit(depth=1)
    model, counter = compiled_dit("block", "selective", "inductor", depth=1)
    for batch in (1, 3, 64):
        t, z, y = inputs(batch)
        for found, expected in zip(outcome(model, t, z, y), outcome(plain, t, z, y), strict=True):
            # its kernels add in another order: some roundings of 2^-24 of sums of up to 64 x 9 terms
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("part", ["velocity", "block"])
def test_without_gradients(part):
    model, counter = compiled_dit(part, "selective", "eager")
    for batch in (0, 1, 5):
        assert torch.equal(model(*inputs(batch)), small_dit()(*inputs(batch)))
    assert counter.frame_count == 1


@torch.no_grad()
def test_the_callers_tensors_are_not_marked():
    model, _ = compiled_dit("velocity", backend="eager")
    t, z, y = inputs()
    before = [set(vars(x)) for x in (t, z, y)]
    model(t, z, y)
    assert [set(vars(x)) for x in (t, z, y)] == before


@torch.no_grad()
@pytest.mark.parametrize("part", ["velocity", "block"])
def test_inside_a_users_own_compiled_function(part):
    model, counter = compiled_dit(part, backend="eager")
    function = torch.compile(lambda t, z, y: 2 * model(t, z, y), fullgraph=True, backend="eager")
    assert torch.equal(function(*inputs()), 2 * small_dit()(*inputs()))
    assert counter.frame_count == 0


@torch.no_grad()
@pytest.mark.parametrize("part", ["velocity", "block"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_compiled_and_has_its_own_weights(part, again):
    model, counter = compiled_dit(part, backend="eager")
    other = again(model)
    nn.init.zeros_(other.final_layer.linear.weight)
    nn.init.zeros_(other.final_layer.linear.bias)
    assert not other(*inputs()).any()
    assert counter.frame_count == 0
    assert torch.equal(model(*inputs()), small_dit()(*inputs()))
    assert counter.frame_count == 1


@torch.no_grad()
def test_networks_do_not_use_up_each_others_recompilations():
    with torch._dynamo.config.patch(recompile_limit=1):  # one graph, and an error at the second
        for width in (24, 36):
            model, counter = compiled_dit("block", backend="eager", hidden_size=width)
            assert torch.equal(model(*inputs()), small_dit(hidden_size=width)(*inputs()))
            assert counter.frame_count == 1


@torch.no_grad()
def test_the_sampling_form_uses_the_compiled_blocks():
    model, counter = compiled_dit("block", backend="eager")
    times, plain = torch.linspace(1, 0, 5), small_dit()
    for batch in (1, 4):
        _, z, y = inputs(batch)
        prepared, expected = (m.prepare(times, torch.arange(5)) for m in (model, plain))
        for k in (0, 3):
            assert torch.equal(prepared(k, z, y), expected(k, z, y))
        model(times[:1].expand(batch), z, y)
    assert counter.frame_count == 1


def test_another_part_is_refused():
    with pytest.raises(ValueError, match="part is 'blocks', expected 'velocity' or 'block'"):
        small_dit().compile("blocks")


def test_batches_that_differ_are_refused():
    add = Compiled(lambda what, x, y: x + y, backend="eager")
    assert add(None, torch.ones(3), torch.ones(3)).tolist() == [2.0] * 3
    with pytest.raises((RuntimeError, AssertionError)):  # which of them depends on PyTorch's release
        add(None, torch.ones(3), torch.ones(1))

"""The step around a CUDA graph: recorded operators replayed on a CPU, and the graph itself where there is a GPU."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from tape import Operators, Tape, record_on_the_cpu
from test_step import WORLD, settings
from tiny_run import TinySource

import lfm_fast
from lfm_fast import _graphs
from lfm_fast.distributed import World
from lfm_fast.models import create_model
from lfm_fast.models.box_encoder import BoxEncoder
from lfm_fast.models.conditioned import Conditioned
from lfm_fast.models.label_map_encoder import LabelMapEncoder
from lfm_fast.train import loop
from lfm_fast.train.graphed import GraphedGradients
from lfm_fast.train.loop import build_state, training_path
from lfm_fast.train.source import check_settings
from lfm_fast.train.step import TrainState, add_gradients_of_part, train_step

SEVERAL = [
    {},
    {"accumulation_steps": 3, "clip_grad_norm": 0.5},  # 3, 3 and 2 samples
    {"accumulation_steps": 8, "path": "vp", "time_sampler": "logit_normal"},
    {"num_classes": 0, "label_dropout": 0.0, "task": "unconditional"},
    {"precision": "bf16", "activation_checkpointing": "selective"},
    {"precision": "bf16-pure", "accumulation_steps": 2},
]


def fresh_state(config, graphed, world=WORLD):
    state = build_state(config, TinySource(), world)
    if graphed:
        part = functools.partial(add_gradients_of_part, state, config, training_path(config), world)
        state.graph = GraphedGradients(part, state.trained, world.device)
    return state


def trained(config, graphed, steps=5, world=WORLD):
    state, source = fresh_state(config, graphed, world), TinySource()
    for step in range(steps):
        state.optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
        train_step(state, source, config, training_path(config), world)
    return state


def assert_equal_states(one, other):
    assert float(one.loss_sum) == float(other.loss_sum)
    assert float(one.grad_norm) == float(other.grad_norm) > 0
    for p, q in zip(one.model.parameters(), other.model.parameters()):
        assert torch.equal(p, q)
    for p, q in zip(one.ema.average.parameters(), other.ema.average.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("changes", SEVERAL, ids=str)
def test_replayed_steps_are_the_ordinary_ones_to_the_bit(changes, monkeypatch):
    record_on_the_cpu(monkeypatch)
    config = settings(**changes)
    state = trained(config, graphed=True)
    parts = config.accumulation_steps
    assert Tape.replayed == 5 * parts
    assert Tape.recorded == {1: 1, 2: 2, 3: 3, 8: 2}[parts]  # the first part, further ones, a smaller last one
    assert_equal_states(state, trained(config, graphed=False))


def test_batches_of_any_sizes_in_any_order(monkeypatch):
    """A graph for each size; gradients and losses are those of the plain call, whatever was replayed before."""
    record_on_the_cpu(monkeypatch)
    config = settings()
    graphed, plain = fresh_state(config, True), fresh_state(config, False)
    part = functools.partial(add_gradients_of_part, plain, config, training_path(config), WORLD)
    first = 0
    for step in ([8], [5], [8, 5], [5, 5, 8], [8], [8, 5, 5], [3]):
        for count in step:
            index = torch.arange(first, first + count)
            inputs = (*TinySource().batch(index, config.seed), index)
            assert float(graphed.graph(*inputs)) == float(part(*inputs))
            first += count
        for p, q in zip(graphed.trained, plain.trained, strict=True):
            assert torch.equal(p.grad, q.grad)
            p.grad = q.grad = None
    # alone: 8, 5, 3; after 8: 5; after 5: 5, 8
    assert Tape.recorded == 6


def test_gradients_are_written_to_the_same_memory_in_every_step(monkeypatch):
    record_on_the_cpu(monkeypatch)
    config, seen = settings(accumulation_steps=2), []
    state = fresh_state(config, True)
    plain = state.optimizer.step
    state.optimizer.step = lambda **how: (seen.append([p.grad.data_ptr() for p in state.trained]), plain(**how))
    for _ in range(3):
        train_step(state, TinySource(), config, training_path(config), WORLD)
        assert all(p.grad is None for p in state.trained)
    assert seen[0] == seen[1] == seen[2]


def test_an_input_that_is_none_stays_none(monkeypatch):
    record_on_the_cpu(monkeypatch)
    weight = torch.nn.Parameter(torch.ones(2))

    def add_gradients(x, condition):
        assert condition is None
        loss = (weight * x).sum()
        loss.backward()
        return loss.detach()

    graph = GraphedGradients(add_gradients, [weight], torch.device("cpu"))
    for x in (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])):
        assert float(graph(x, None)) == float(x.sum())
        assert torch.equal(weight.grad, x)
        weight.grad = None


class Given(TinySource):
    """What each sample is conditioned on, too."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def condition(self, numbers, seed):
        return condition_of(self.name, len(numbers), int(numbers[0]))


@pytest.mark.parametrize("name", ["adm", "label maps", "boxes"])
def test_every_kind_of_network_replays(name, monkeypatch):
    record_on_the_cpu(monkeypatch)
    config, states = settings(batch_size=3), []
    source = Given(name) if name in ("label maps", "boxes") else TinySource()
    for graphed in (True, False):
        task = SimpleNamespace(network=lambda config, shape: network(name), settings=lambda config: {})
        monkeypatch.setattr(loop, "task_named", lambda chosen, task=task: task)
        states.append(fresh_state(config, graphed))
        for _ in range(2):
            train_step(states[-1], source, config, training_path(config), WORLD)
    assert Tape.replayed == 2
    assert_equal_states(*states)


UNET = {"model_channels": 32, "channel_mult": (1, 2)}
SIZES = {"image_size": 8, "downsampling": 1, "num_classes": 3, "label_dropout": 0.3}


def network(name):
    """A small one of every kind."""
    if name == "label maps":
        unet = create_model("adm-original", in_channels=8, out_channels=4, num_res_blocks=1, **SIZES, **UNET)
        return Conditioned(network=unet, encoder=LabelMapEncoder(num_classes=5, downsampling=2))
    if name == "boxes":
        unet = create_model("adm-layout", context_dim=16, attention_resolutions=(2,), num_res_blocks=1, **SIZES, **UNET)
        return Conditioned(network=unet, encoder=BoxEncoder(num_classes=3, max_boxes=4, context_dim=16))
    return create_model(name, **SIZES, **({} if name == "DiT-Tiny" else {**UNET, "num_blocks": 1}))


NETWORK_NAMES = ["adm", "ncsn++", "label maps", "boxes"]


def condition_of(name, count, first=0):
    """What the encoder takes, of these samples."""
    number = torch.arange(first, first + count)
    if name == "label maps":
        return (number[:, None, None] + torch.arange(256).view(16, 16)) % 5
    if name == "boxes":
        corners = torch.tensor([0.1, 0.2, 0.7, 0.9]).expand(count, 2, 4) - 0.05 * (number % 2)[:, None, None]
        return torch.cat([(number % 3)[:, None, None].expand(count, 2, 1), corners], dim=2)
    return None


KINDS = [*((path, "none") for path in ("linear", "vp", "vp-trig", "ve")), ("linear", "selective"), ("linear", "full")]


KINDS = [*(("DiT-Tiny", *kind) for kind in KINDS), *((name, "linear", "full") for name in NETWORK_NAMES)]


@pytest.mark.parametrize(("name", "path", "checkpointing"), KINDS)
def test_between_inputs_and_gradients_there_is_no_host(name, path, checkpointing, monkeypatch):
    """On tensors without numbers nothing can be read, nothing comes from the host, and steps run the same operators
    with the same numbers."""
    # which asks for the autocast of a device, and for tensors without numbers there is none
    monkeypatch.setattr(lfm_fast.models.checkpointing, "_uncached_autocast", lambda device: contextlib.nullcontext())
    config = settings(path=path, sigma_min=0.01, activation_checkpointing=checkpointing)
    model, y = network(name).to("meta"), torch.empty(8, dtype=torch.int64, device="meta")
    z_0, index = torch.empty(8, 4, 8, 8, device="meta"), torch.empty_like(y)
    given = condition_of(name, 8)
    given = None if given is None else given.to("meta")
    model.activation_checkpointing = checkpointing
    state, calls = TrainState(model, model, None, None), []
    for step in range(2):
        state.step, state.samples = step, 8 * step
        with Operators(only="meta") as seen:
            loss = add_gradients_of_part(state, config, training_path(config), WORLD, z_0, y, index, given)
        calls.append(seen.calls)
        assert loss.shape == ()
        for parameter in state.trained:
            assert parameter.grad.shape == parameter.shape
            parameter.grad = None
    assert calls[0] == calls[1]
    with Operators(only="meta"), pytest.raises((AssertionError, RuntimeError)):
        z_0.sum().item()
    with Operators(only="meta"), pytest.raises(AssertionError, match="the host"):
        z_0.copy_(torch.zeros(8, 4, 8, 8))


def test_what_cannot_be_is_refused_with_a_sentence():
    config = settings(cuda_graph=True)
    with pytest.raises(ValueError, match="--cuda-graph cannot be: a CUDA graph needs a CUDA device, and this is a cpu"):
        loop.train(config, TinySource())
    with pytest.raises(ValueError, match="--cuda-graph cannot be: gradients are exchanged between 2 ranks"):
        check_settings(config, (4, 8, 8), World(size=2, device=torch.device("cuda")))
    check_settings(config, (4, 8, 8), World(device=torch.device("cuda")))


def test_a_whole_run_replays(monkeypatch, tmp_path):
    record_on_the_cpu(monkeypatch)
    losses = []
    for graphed in (True, False):
        config = settings(cuda_graph=graphed, output=str(tmp_path / str(graphed)), steps=6, resume="never")
        folder = loop.train(config, TinySource())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([line.split('"lr"')[0].split('"loss"')[1] for line in lines])
    assert losses[0] == losses[1]
    assert len(losses[0]) == Tape.replayed == 6


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
@pytest.mark.parametrize("changes", [*SEVERAL, {"compile": "block"}], ids=str)
def test_graphed_steps_on_a_gpu_are_the_ordinary_ones(changes):
    config, world = settings(device="cuda", **changes), World(device=torch.device("cuda", 0))
    assert _graphs.why_not(world.device) is None
    graphed, plain, again = (trained(config, graph, world=world) for graph in (True, False, False))
    # as two ordinary runs, which differ by the order of atomic sums, or by a rounding of Adam's steps of 1e-3
    noise = max(float((p - q).detach().abs().max()) for p, q in zip(plain.model.parameters(), again.model.parameters()))
    for p, q in zip(graphed.model.parameters(), plain.model.parameters()):
        assert float((p - q).detach().abs().max()) <= max(4 * noise, 2e-5 if config.precision == "fp32" else 1e-3)
    assert float(graphed.loss_sum) == pytest.approx(float(plain.loss_sum), rel=1e-5)


@needs_gpu
def test_a_host_read_inside_is_one_sentence():
    weight = torch.nn.Parameter(torch.ones(2, device="cuda"))

    def add_gradients(x):
        loss = (weight * x).sum()
        loss.backward()
        return loss.detach() * loss.item()

    with pytest.raises(RuntimeError, match="A CUDA graph cannot hold this"):
        GraphedGradients(add_gradients, [weight], weight.device)(torch.ones(2, device="cuda"))

"""What a step is given: latents drawn and interpolated in one op, conditions read ahead, and the time it waits."""

import itertools
import json
import threading
from types import SimpleNamespace

import pytest
import torch
from tape import Operators, Tape, record_on_the_cpu
from test_graphed import assert_equal_states
from test_step import WORLD, settings
from tiny_run import TinySource

from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.latents import CachedLatents
from lfm_fast.data.resident import ResidentLatents
from lfm_fast.distributed import World
from lfm_fast.models import create_model
from lfm_fast.tasks.base import ConditionedSource
from lfm_fast.train import loop
from lfm_fast.train import step as module
from lfm_fast.train.graphed import GraphedGradients
from lfm_fast.train.loop import build_state, training_path
from lfm_fast.train.step import TrainState, gradients_on, train_step


def cache():
    """The latents of TinySource with an uncertainty, and of their mirror images."""
    mean = TinySource().latents
    log_variance = mean.roll(1, 1) - 4
    shard = {"mean": mean, "log_variance": log_variance, "labels": TinySource().labels}
    shard |= {"mean_flip": mean.flip(-1), "log_variance_flip": log_variance.flip(-1)}
    return LatentCache([shard], TinySource.class_names, [0.0] * 4, [1.0] * 4, {})


class Drawn(TinySource):
    """The same as z_0, as a source gives it that knows of no posteriors."""

    num_items = 20

    def __init__(self):
        super().__init__()
        self._source = CachedLatents(cache(), flip=True)

    def batch(self, sample_numbers, seed):
        return self._source.batch(sample_numbers, seed)


def trained(source, graphed=False, steps=4, world=WORLD, **changes):
    config = settings(**changes)
    state = build_state(config, source, world)
    if graphed:
        add_gradients = gradients_on(state, config, training_path(config), world, source)
        state.graph = GraphedGradients(add_gradients, state.trained, world.device)
    for _ in range(steps):
        train_step(state, source, config, training_path(config), world)
    return state


CHANGES = [{}, {"accumulation_steps": 3}, {"path": "vp"}, {"num_classes": 0, "label_dropout": 0.0}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_run_is_the_same_whichever_way_it_reads(changes):
    table, files = (trained(kind(cache(), flip=True), **changes) for kind in (ResidentLatents, CachedLatents))
    assert_equal_states(table, files)
    plain = trained(Drawn(), **changes)
    assert float(table.loss_sum) == pytest.approx(float(plain.loss_sum), rel=1e-5)  # z_0 differs by roundings
    for p, q in zip(table.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)  # of which Adam makes a share of its steps of 1e-4


@pytest.mark.parametrize("changes", CHANGES[:3], ids=str)
@pytest.mark.parametrize("kind", [ResidentLatents, CachedLatents])
def test_replayed_steps_are_the_ordinary_ones_to_the_bit(kind, changes, monkeypatch):
    record_on_the_cpu(monkeypatch)
    state = trained(kind(cache(), flip=True), graphed=True, **changes)
    assert Tape.replayed == 4 * changes.get("accumulation_steps", 1)
    assert_equal_states(state, trained(kind(cache(), flip=True), **changes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("changes", CHANGES[:3], ids=str)
def test_graphed_steps_from_a_table_on_a_gpu_are_the_ordinary_ones(changes):
    world = World(device=torch.device("cuda", 0))
    changes = {"device": "cuda", **changes}
    sources = [ResidentLatents(cache(), flip=True, device=world.device) for _ in range(3)]
    assert sources[0].mean.device == world.device
    graphed, plain = (trained(source, graph, world=world, **changes) for source, graph in zip(sources, (True, False)))
    mapped = trained(CachedLatents(cache(), flip=True), world=world, **changes)
    for other in (graphed, mapped):  # as test_graphed.py: sums in another order, and a rounding of Adam's steps of 1e-3
        assert float(other.loss_sum) == pytest.approx(float(plain.loss_sum), rel=1e-5)
        for p, q in zip(other.model.parameters(), plain.model.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", [ResidentLatents, CachedLatents])
def test_between_rows_and_gradients_there_is_no_host(kind):
    """As test_graphed.py of z_0: on tensors without numbers nothing can be read, and nothing comes from the host."""
    config, source = settings(), kind(cache(), flip=True)
    model = create_model("DiT-Tiny", image_size=8, downsampling=1, num_classes=3, label_dropout=0.3).to("meta")
    state, calls = TrainState(model, model, None, None), []
    for name in ("mean", "log_variance"):
        if hasattr(source, name):
            setattr(source, name, getattr(source, name).to("meta"))
    for step in range(2):
        index = torch.arange(8 * step, 8 * step + 8)
        inputs = [x.to("meta") for x in (*source.posteriors(index, config.seed), index)]
        add_gradients = gradients_on(state, config, training_path(config), WORLD, source)
        with Operators(only="meta") as seen:
            assert add_gradients(*inputs).shape == ()
        calls.append(seen.calls)
        for parameter in state.trained:
            assert parameter.grad.shape == parameter.shape
            parameter.grad = None
    assert calls[0] == calls[1]
    assert "lfm_fast::posterior_interpolate" in [name for name, _ in calls[0]]


@pytest.mark.parametrize("parts", [1, 3])
def test_the_time_that_steps_wait_is_that_of_all_their_parts(parts, monkeypatch):
    """By a clock that strikes whenever it is read: once before and once after what is given to a part."""
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    assert trained(TinySource(), steps=4, accumulation_steps=parts).data_seconds == 4 * parts


class Threads(ConditionedSource):
    """Says which thread reads what."""

    def __init__(self, source):
        super().__init__(source, None)
        self.read = []

    def _read(self, sample_numbers, seed):
        self.read.append((int(sample_numbers[0]), threading.current_thread().name))
        return sample_numbers * 10 + seed


@pytest.mark.parametrize("parts", [1, 2, 3])  # of 8; 4 and 4; 3, 3 and 2
def test_conditions_are_read_ahead_and_the_same(parts):
    source = Threads(ResidentLatents(cache()))
    first = 0
    for _ in range(6):
        for numbers in torch.arange(first, first + 8).tensor_split(parts):
            assert torch.equal(source.condition(numbers, 7), numbers * 10 + 7)
        first += 8
    source._ahead._pool.shutdown()
    here = [number for number, thread in source.read if thread == threading.current_thread().name]
    assert here[0] == 0
    assert max(here) <= (0, 8, 11)[parts - 1]  # in the second step its cycle is known
    assert [number for number, _ in source.read].count(40) == 1


def test_a_conditioned_source_is_its_source_in_all_else():
    latents = ResidentLatents(cache(), flip=True)
    source = Threads(latents)
    assert (source.num_items, source.latent_shape, source.class_names) == (20, (4, 8, 8), ["a", "b", "c"])
    assert source.interpolate == latents.interpolate
    assert torch.equal(source.posteriors(torch.arange(4), 1)[0], latents.posteriors(torch.arange(4), 1)[0])
    with pytest.raises(AttributeError):
        source.anything_else()


def test_the_share_of_waiting_for_data_is_told(tmp_path, capsys):
    """Of a source that takes at least 20 ms of each step."""
    config = settings(output=str(tmp_path), steps=3, log_every=1, resume="never")
    folder = loop.train(config, TinySource(delay=0.02))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line["data_share"] / line["steps_per_s"] >= 0.02
        assert line["data_share"] < 1
    assert f", data {lines[-1]['data_share']:.1%}, " in capsys.readouterr().out

"""lfm_fast.Sampler as a CUDA graph: its operators recorded, replayed and inspected on a CPU; the graph on a GPU."""

import copy

import pytest
import torch
from tape import Operators, Tape, record_on_the_cpu
from test_sampler import (
    CLASSES,
    GUIDANCES,
    METHODS,
    NULL,
    SHAPE,
    Conditioned,
    batches,
    dit,
    modulations_of,
    one_label_more,
)

import lfm_fast
from lfm_fast import _graphs
from lfm_fast.models import prepared
from lfm_fast.sampler import Sampler


@pytest.mark.parametrize("method", METHODS)
def test_replayed_batches_are_those_of_sample(method, monkeypatch):
    """To the bit with a field that treats samples alike whoever is beside them."""
    record_on_the_cpu(monkeypatch)
    settings = {"null_label": 2, "method": method, "num_steps": 4}
    sampler = Sampler(one_label_more, SHAPE, guidance_scale=2.0, cuda_graph=True, **settings)
    scales = (2.0, 3.0, torch.tensor([4.0, 2.0, 0.5, 1.0]), lambda t: 1.5 + t)
    for count, ((z1, y, numbers), scale) in zip((4, 4, 4, 3), zip(batches(), scales, strict=True)):
        z1, y, numbers = z1[:count], y[:count], numbers[:count]
        arguments = {"y": y, "guidance_scale": scale, "indices": numbers}
        found = sampler(z1, **arguments)
        assert torch.equal(found, lfm_fast.sample(one_label_more, z1, **arguments, **settings))
    assert Tape.recorded == 1
    assert Tape.replayed == 4
    z1, y, _ = next(batches(1))
    assert torch.equal(
        sampler(z1, y, seed=9), lfm_fast.sample(one_label_more, z1, y=y, guidance_scale=2.0, seed=9, **settings)
    )
    assert Tape.recorded == (2 if "sde" in method or "maruyama" in method else 1)  # the seed is the kernels'


def test_a_graph_for_each_pattern_of_guided_times(monkeypatch):
    record_on_the_cpu(monkeypatch)
    settings = {"null_label": 2, "method": "heun", "num_steps": 4}
    sampler = Sampler(one_label_more, SHAPE, cuda_graph=True, **settings)
    scales = [1.0, 2.0, ((0.3, 1.0), (0.6, 2.0)), ((0.3, 1.0), (0.6, 5.0)), torch.tensor([1.0, 1.0, 2.0, 1.0]), 1.0]
    for (z1, y, _), scale in zip(batches(6), scales, strict=True):
        found = sampler(z1, y, guidance_scale=scale)
        assert torch.equal(found, lfm_fast.sample(one_label_more, z1, y=y, guidance_scale=scale, **settings))
    assert (Tape.recorded, Tape.replayed) == (3, 6)  # nowhere, everywhere, from a time on


@pytest.mark.parametrize(("name", "max_bytes"), [("none", 1), *((name, prepared.MAX_BYTES) for name in GUIDANCES)])
def test_replayed_networks_are_those_of_sample_up_to_rounding(name, max_bytes, monkeypatch):
    """Modulations are of every label of the batch, and not of distinct ones: products of other sizes, in float64."""
    record_on_the_cpu(monkeypatch)
    monkeypatch.setattr(lfm_fast.DiT.prepare, "__kwdefaults__", {"unlabelled": False, "max_bytes": max_bytes})
    model, settings = dit().double(), {"null_label": NULL, "method": "heun", "num_steps": 4}
    settings["guidance"] = None if name == "none" else GUIDANCES[name]()
    if name == "auto":
        settings["guidance"].weak_model.double()
    sampler, rows = Sampler(model, SHAPE, cuda_graph=True, **settings), modulations_of(model)
    for z1, y, _ in batches(3, torch.float64):
        found = sampler(z1, y)
        replayed = len(rows)
        torch.testing.assert_close(found, lfm_fast.sample(model, z1, y=y, **settings), rtol=1e-10, atol=1e-10)
        assert len(rows) > replayed
        del rows[:]
    assert (Tape.recorded, Tape.replayed) == (1, 3)


def test_replays_follow_the_weights_and_are_recorded_anew_where_these_have_moved(monkeypatch):
    record_on_the_cpu(monkeypatch)
    model, (z1, y, _) = dit().double(), next(batches(1, torch.float64))
    settings = {"null_label": NULL, "method": "euler", "num_steps": 3, "guidance_scale": 2.0}
    sampler, before = Sampler(model, SHAPE, cuda_graph=True, **settings), None
    for recorded in (1, 1, 2):
        found = sampler(z1, y)
        assert before is None or (found - before).abs().max() > 1e-3
        torch.testing.assert_close(found, lfm_fast.sample(model, z1, y=y, **settings), rtol=1e-10, atol=1e-10)
        assert Tape.recorded == recorded
        before = found
        with torch.no_grad():
            for parameter in model.parameters():
                changed = parameter * 1.05
                if recorded == 1 and Tape.replayed == 1:
                    parameter.copy_(changed)
                else:
                    parameter.data = changed


def test_entries_are_read_from_memory(monkeypatch):
    record_on_the_cpu(monkeypatch)
    model, settings = Conditioned(), {"method": "unipc", "num_steps": 4}
    sampler = Sampler(model, SHAPE, cuda_graph=True, **settings)
    for count, (z1, _, numbers) in zip((4, 2, 3), batches(3)):
        condition = numbers.float().view(-1, 1, 1, 1)[:count] / 50
        found = sampler(z1[:count], condition=condition)
        expected = lfm_fast.sample(model, z1[:count], model_kwargs={"condition": condition}, **settings)
        assert torch.equal(found, expected)
    assert (Tape.recorded, Tape.replayed) == (1, 3)


def test_a_velocity_that_is_not_finite_is_found_after_a_replay(monkeypatch):
    record_on_the_cpu(monkeypatch)

    def model(t, z, y):
        return torch.where((y.view(-1, 1, 1, 1) == 3) & (t.view(-1, 1, 1, 1) < 0.6), torch.nan, -z)

    sampler = Sampler(model, SHAPE, method="euler", num_steps=4, cuda_graph=True)
    z1 = lfm_fast.noise(4, SHAPE[1:])
    assert sampler(z1, torch.tensor([0, 1, 2, 4])).isfinite().all()
    with pytest.raises(RuntimeError, match=r"not finite.* in step 3 of 4, from t = 0.5 to 0.25, in sample 2 of the"):
        sampler(z1, torch.tensor([0, 1, 3, 4]))
    assert sampler(z1, torch.tensor([0, 1, 2, 4])).isfinite().all()


class _Done(Exception):
    pass


class _Inspected:
    """Stands for CudaGraph: the function once as a warm-up, then under inspection, twice alike."""

    def __init__(self, function, device, warm_up=None, pool=None):
        function()
        calls = []
        for _ in range(2):
            with Operators() as seen:
                function()
            calls.append(seen.calls)
        assert calls[0] == calls[1]
        assert any(name == "lfm_fast::guided_step" for name, _ in calls[0])
        raise _Done


@pytest.mark.parametrize(("method", "name"), [("sde_heun", "none"), *(("unipc", name) for name in GUIDANCES)])
def test_between_a_batch_and_its_latents_there_is_no_host(method, name, monkeypatch):
    """On tensors without numbers nothing can be read, and nothing may come from the host."""
    record_on_the_cpu(monkeypatch)
    monkeypatch.setattr(_graphs, "CudaGraph", _Inspected)
    unique = torch.Tensor.unique  # what the first of the warm-up calls may wait for
    monkeypatch.setattr(torch.Tensor, "unique", lambda x: x if x.is_meta else unique(x))
    settings = {"method": method, "num_steps": 2, "null_label": NULL}
    settings["guidance"] = None if name == "none" else GUIDANCES[name]()
    if name == "auto":
        settings["guidance"].weak_model.to("meta")
    sampler = Sampler(dit().to("meta"), SHAPE, cuda_graph=True, **settings)
    y = torch.empty(4, dtype=torch.int64, device="meta")
    with pytest.raises(_Done):
        sampler(torch.empty(SHAPE, device="meta"), y, indices=torch.arange(4))


UNET = {"image_size": 8, "downsampling": 1, "model_channels": 32, "channel_mult": (1, 2), "label_dropout": 0.1}
NETWORKS = {"adm": {"num_blocks": 1}, "adm-layout": {"num_res_blocks": 1, "context_dim": 16}}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_without_a_sampling_form_need_no_host_either(name, monkeypatch):
    record_on_the_cpu(monkeypatch)
    model = lfm_fast.create_model(name, num_classes=CLASSES, **UNET, **NETWORKS[name]).eval()
    context = {"context": torch.randn(4, 3, 16)} if name == "adm-layout" else {}
    settings = {"null_label": NULL, "guidance_scale": 2.0, "method": "ab2", "num_steps": 2}
    z1, y, _ = next(batches())
    found = Sampler(model, SHAPE, cuda_graph=True, **settings)(z1, y, **context)
    expected = lfm_fast.sample(model, z1, y=y, model_kwargs=context, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the same operators on memory aligned otherwise
    monkeypatch.setattr(_graphs, "CudaGraph", _Inspected)
    sampler, context = (
        Sampler(model.to("meta"), SHAPE, cuda_graph=True, **settings),
        {k: x.to("meta") for k, x in context.items()},
    )
    with pytest.raises(_Done):
        sampler(z1.to("meta"), y.to("meta"), **context)


def test_an_upload_inside_would_be_seen(monkeypatch):
    record_on_the_cpu(monkeypatch)
    monkeypatch.setattr(_graphs, "CudaGraph", _Inspected)

    def model(t, z):
        return z * torch.ones(len(z), 1, 1, 1, device="cpu").to("meta")

    with pytest.raises(AssertionError, match="from one device to another"):
        Sampler(model, SHAPE, method="euler", num_steps=2, cuda_graph=True)(torch.empty(SHAPE, device="meta"))


class Autoencoder:
    """Pictures are three channels of the latents."""

    name, latent_channels, downsampling = "none", 4, 1

    def decode(self, latents):
        return latents[:, :3]


def a_flow(**settings):
    sampling = {"method": "euler", "num_steps": 2, "guidance_scale": 2.0}
    return lfm_fast.LatentFlow(dit(**settings), Autoencoder(), sampling=sampling)


def test_a_flow_keeps_its_graph_for_batches_and_calls_alike(monkeypatch):
    record_on_the_cpu(monkeypatch)
    flow = a_flow()
    y, grid = [0, 1, 2], torch.tensor([1.0, 0.5, 0.0])
    for recorded, arguments in (
        (1, {"seed": 1}),
        (1, {"seed": 2, "y": [4, 4, 0], "guidance_scale": 3.0}),
        (2, {"num_steps": 3}),
        (3, {"guidance_scale": torch.tensor([1.0, 1.5, 2.0]), "time_grid": grid}),
        (3, {"time_grid": grid}),
    ):
        arguments = {"y": y, "batch_size": 2, **arguments}
        found = flow.sample(3, cuda_graph=True, **arguments)  # 2 and 1
        torch.testing.assert_close(found, flow.sample(3, **arguments), rtol=1e-4, atol=1e-4)  # float32
        assert Tape.recorded == recorded
    assert Tape.replayed == 10
    grid[1] = 0.25  # the caller's own, and another grid now
    found = flow.sample(2, y=[0, 1], time_grid=grid, cuda_graph=True)
    torch.testing.assert_close(found, flow.sample(2, y=[0, 1], time_grid=grid), rtol=1e-4, atol=1e-4)
    assert Tape.recorded == 4
    copied = copy.deepcopy(flow)
    copied.sample(2, y=[0, 1], time_grid=grid, cuda_graph=True)
    assert Tape.recorded == 5


def test_the_condition_of_a_flow_comes_with_the_batch(monkeypatch):
    record_on_the_cpu(monkeypatch)
    flow = a_flow(in_channels=6, out_channels=4)
    for seed in range(2):
        arguments = {"y": 1, "condition": lfm_fast.noise(3, (2, 8, 8), seed=seed), "batch_size": 2}
        found = flow.sample(3, cuda_graph=True, **arguments)
        torch.testing.assert_close(found, flow.sample(3, **arguments), rtol=1e-4, atol=1e-4)
    assert (Tape.recorded, Tape.replayed) == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"preview": print}, "callback: a Sampler runs all steps at once"),
        ({"progress": True}, "progress: a Sampler runs all steps at once"),
        ({"method": "dopri5"}, "method dopri5 finds its steps as it goes"),
        ({}, "cuda_graph is True, but a CUDA graph needs a CUDA device"),
    ],
)
def test_a_flow_refuses_what_no_graph_can_hold(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        a_flow().sample(1, y=0, cuda_graph=True, **arguments)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["none", "scale", *GUIDANCES])
def test_graphs_on_a_gpu_give_the_samples_of_sample(method, name):
    model, settings = dit().cuda(), {"null_label": NULL, "method": method, "num_steps": 4}
    settings["guidance"] = GUIDANCES[name]() if name in GUIDANCES else None
    if name == "auto":
        settings["guidance"].weak_model.cuda()
    sampler = Sampler(model, SHAPE, cuda_graph=True, **settings)
    for z1, y, numbers in batches():
        arguments = {"y": y.cuda(), "indices": numbers}
        if name == "scale":
            arguments["guidance_scale"] = 1.0 + numbers.float() / 50
        found = sampler(z1.cuda(), **arguments)
        expected = lfm_fast.sample(model, z1.cuda(), **arguments, **settings)
        # products of other sizes, in float32: 8 evaluations of values of about 4
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert sum(len(loop._graphs) for loop in sampler._loops.values()) == 1


@needs_gpu
def test_a_model_that_reads_back_cannot_be_recorded():
    def model(t, z):
        return z * float(t.sum())

    with pytest.raises(RuntimeError, match="A CUDA graph cannot hold this"):
        Sampler(model, SHAPE, method="euler", num_steps=2, cuda_graph=True)(torch.ones(SHAPE, device="cuda"))

"""lfm_fast.sample takes the sampling form of a network that has one, by itself, and gives the same latents."""

import copy

import pytest
import torch
from torch import nn

import lfm_fast
from lfm_fast.models import DiT

NULL = 5
Y = torch.tensor([3, 0, 3, 1])
STEPS = 4


def dit(**arguments):
    torch.manual_seed(0)
    settings = {"image_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 2, "num_classes": 5, "label_dropout": 0.1}
    model = DiT(**{**settings, **arguments}).eval()
    for parameter in model.parameters():  # a new DiT is the zero velocity
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def z1(dtype=torch.float64):
    return lfm_fast.noise(len(Y), (4, 8, 8), seed=5).to(dtype)


class Called(nn.Module):
    """The same network as any other model: it says nothing of preparing, and counts its calls."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, t, z, y=None):
        self.calls += 1
        return self.model(t, z, y)


def adaln_calls(model):
    """How many rows each call of an adaLN layer had, from now on, for all parts of the network together."""
    rows = []
    for part in (*model.blocks, model.final_layer):
        part.adaLN_modulation[1].register_forward_hook(lambda _, arguments, result: rows.append(len(result)))
    return rows


GUIDED = {"y": Y, "guidance_scale": 2.5, "null_label": NULL}
SETTINGS = {
    "guided": GUIDED,
    "unguided": {"y": Y, "null_label": NULL},
    "unlabelled": {},
    "no null label": {"y": Y, "guidance_scale": 2.5},
    "interval": {**GUIDED, "guidance_interval": (0.2, 0.6)},
    "interval, no null label": {"y": Y, "guidance_scale": 2.5, "guidance_interval": (0.2, 0.6)},
    "some samples": {**GUIDED, "guidance_scale": torch.tensor([1.0, 2.0, 1.0, -0.5])},
    "some samples, no null label": {"y": Y, "guidance_scale": torch.tensor([1.0, 2.0, 1.0, -0.5])},
    "interval, some samples": {
        **GUIDED, "guidance_scale": torch.tensor([1.0, 2.0, 1.0, -0.5]), "guidance_interval": (0.2, 0.6)
    },
    "int32 labels": {**GUIDED, "y": Y.int()},
    "up and uneven": {**GUIDED, "time_grid": torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)},
}  # fmt: skip


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("name", SETTINGS)
def test_latents_and_statistics_are_those_of_the_plain_forward(name, method):
    settings = {**SETTINGS[name], "method": method, "num_steps": STEPS, "return_stats": True}
    model = dit().double()
    rows = adaln_calls(model)
    found, stats = lfm_fast.sample(model, z1(), **settings)
    assert len(rows) == 3  # one matrix product for each of two blocks and the final layer
    rows.clear()
    expected, plain = lfm_fast.sample(Called(model), z1(), **settings)
    assert len(rows) == 3 * stats.calls
    # float64 products of other shapes may be summed in another order; up to 16 evaluations on values of about 4
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for name in ("nfe", "forwards", "accepted"):
        assert torch.equal(getattr(stats, name), getattr(plain, name)), name
    assert stats.calls == plain.calls


@pytest.mark.parametrize(("method", "times"), [("euler", STEPS), ("midpoint", 2 * STEPS), ("heun", STEPS + 1)])
@pytest.mark.parametrize(("settings", "labels"), [(GUIDED, 4), ({"y": Y, "null_label": NULL}, 3), ({}, 1)])
def test_the_table_has_a_row_for_each_distinct_time_and_label_and_no_more(method, times, settings, labels):
    model = dit()
    rows = adaln_calls(model)
    lfm_fast.sample(model, z1(torch.float32), method=method, num_steps=STEPS, **settings)
    assert rows == [times * labels] * 3


def test_the_patches_of_a_guided_sample_are_embedded_once():
    model, embedded = dit(), []
    model.x_embedder.register_forward_hook(lambda _, arguments, tokens: embedded.append(len(tokens)))
    lfm_fast.sample(model, z1(torch.float32), method="heun", num_steps=STEPS, **GUIDED)
    assert embedded == [len(Y)] * 2 * STEPS


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_as_far_from_float64_as_the_plain_forward(autocast):
    settings = {**GUIDED, "guidance_scale": 1.5, "method": "heun", "num_steps": STEPS}
    model = dit() if autocast else dit().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, plain = (lfm_fast.sample(m, z1(torch.float32), **settings) for m in (model, Called(model)))
    exact = lfm_fast.sample(dit().double(), z1(), **settings)
    assert found.dtype == torch.float32
    # two draws of the same roundings
    assert (found - exact).norm() < 1.5 * (plain - exact).norm()
    single = lfm_fast.sample(dit(), z1(torch.float32), **settings)
    torch.testing.assert_close(single, exact.float(), rtol=0, atol=1e-4)  # 8 evaluations on values of about 4


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_optimised_network_is_prepared_too(precision):
    settings = {**GUIDED, "guidance_scale": 1.5, "method": "heun", "num_steps": STEPS}
    fast, products = lfm_fast.optimize(dit(), precision), []
    fast.blocks[0].adaLN_modulation[1].register_forward_hook(lambda _, arguments, rows: products.append(len(rows)))
    found = lfm_fast.sample(fast, z1(torch.float32), **settings)
    assert products == [(STEPS + 1) * 4]
    plain, exact = (
        lfm_fast.sample(Called(fast), z1(torch.float32), **settings),
        lfm_fast.sample(dit(), z1(), **settings),
    )
    assert (found - exact).norm() < 1.5 * (plain - exact).norm()  # two draws of the same roundings


@pytest.mark.parametrize("method", ["dopri5", "torchdiffeq:rk4"])
def test_methods_that_announce_no_times_call_the_model(method):
    model, settings = dit(), {**GUIDED, "method": method, "num_steps": 2, "atol": 1e-3, "rtol": 1e-3}
    rows = adaln_calls(model)
    found, stats = lfm_fast.sample(model, z1(torch.float32), return_stats=True, **settings)
    assert rows == [2 * len(Y)] * 3 * stats.calls
    assert torch.equal(found, lfm_fast.sample(Called(model), z1(torch.float32), **settings))


def test_a_table_is_of_the_weights_of_its_run():
    model, settings = dit().double(), {**GUIDED, "method": "heun", "num_steps": STEPS}
    before = lfm_fast.sample(model, z1(), **settings)
    with torch.no_grad():
        for parameter in model.parameters():  # trained on, in place
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64))
    after = lfm_fast.sample(model, z1(), **settings)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, lfm_fast.sample(Called(model), z1(), **settings), rtol=1e-11, atol=1e-11)


def test_training_goes_on_after_sampling():
    model = dit().train()
    y, z = Y, z1(torch.float32)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            z = lfm_fast.sample(model, z, method="heun", num_steps=2, **GUIDED)
    model(torch.full((4,), 0.5), z.clone(), y).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_guidance_object_has_the_sampling_form_where_it_hands_the_time_on():
    def half(network, t, z, time=None):
        return 0.5 * network.conditional(t, z, time), None, None

    def half_without(network, t, z, time=None):
        return 0.5 * network.conditional(t, z), None, None

    def later(network, t, z, time=None):  # another time than the announced ones
        return network.unconditional(t / 2, z, time=time / 2), None, None

    model, results = dit().double(), {}
    rows = adaln_calls(model)
    for guidance, calls in ((half, 1), (half_without, STEPS), (later, STEPS - 1)):
        rows.clear()
        settings = {"y": Y, "null_label": NULL, "method": "euler", "num_steps": STEPS, "guidance": guidance}
        results[guidance] = lfm_fast.sample(model, z1(), **settings)
        assert len(rows) == 3 * calls
        expected = lfm_fast.sample(Called(model), z1(), **settings)
        torch.testing.assert_close(results[guidance], expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(results[half], results[half_without], rtol=1e-11, atol=1e-11)


class Unrelated(Called):
    """A model with a method of this name that means something else."""

    def prepare(self, *arguments, **more):
        raise AssertionError("this prepare is the model's own affair")


def test_models_that_do_not_prepare_are_called_at_every_evaluation():
    settings = {**GUIDED, "method": "heun", "num_steps": STEPS}
    model = Unrelated(dit())
    lfm_fast.sample(model, z1(torch.float32), **settings)
    assert model.calls == 2 * STEPS
    hooked, seen = dit(), []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    lfm_fast.sample(hooked, z1(torch.float32), **settings)
    assert len(seen) == 2 * STEPS


def test_a_network_compiled_as_a_whole_is_not_gone_around():
    torch._dynamo.reset()
    runs = []

    def backend(graph, example_inputs):
        return lambda *arguments: runs.append(1) or graph.forward(*arguments)

    settings, expected = {**GUIDED, "method": "heun", "num_steps": STEPS}, None
    expected = lfm_fast.sample(dit(), z1(torch.float32), **settings)
    in_place = copy.deepcopy(dit())
    in_place.compile(backend=backend)
    for model in (in_place, torch.compile(dit(), backend=backend)):
        runs.clear()
        found = lfm_fast.sample(model, z1(torch.float32), **settings)
        assert len(runs) == 2 * STEPS
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

import copy
import dataclasses

import pytest
import torch
from tiny_run import SETTINGS, TinySource

import lfm_fast
from lfm_fast.distributed import World
from lfm_fast.flow import time_samplers
from lfm_fast.flow.noise import label_dropout_mask
from lfm_fast.train.config import from_preset
from lfm_fast.train.ema import EMA
from lfm_fast.train.loop import build_state, training_path
from lfm_fast.train.optimizer import AdamW
from lfm_fast.train.step import train_step

WORLD = World()


def settings(**changes):
    return from_preset(**{**SETTINGS, "num_classes": 3, "label_dropout": 0.3, **changes})


def trained(config, steps=3, source=None, world=WORLD):
    source = source or TinySource()
    state = build_state(config, source, world)
    for _ in range(steps):
        train_step(state, source, config, training_path(config), world)
    return state


def worst_difference(a, b):
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("path", ["linear", "vp", "vp-trig", "ve"])
def test_the_loss_is_that_of_the_objective(path):
    """One step's loss against `flow_matching_loss` in separate pieces: same noise, times and dropped labels."""
    config = settings(path=path, sigma_min=0.01)
    source, state = TinySource(), build_state(config, TinySource(), WORLD)
    with torch.no_grad():  # a zero read-out, as fresh weights have it, would hide what the model is given
        state.model.final_layer.linear.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        for block in state.model.blocks:
            block.adaLN_modulation[1].weight.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    before = copy.deepcopy(state.model)
    state.samples = 40
    train_step(state, source, config, training_path(config), WORLD)
    index = torch.arange(40, 48)
    z_0, y = source.batch(index, config.seed)
    y = torch.where(label_dropout_mask(index, config.seed, 0.3), before.null_label, y)
    expected = lfm_fast.flow_matching_loss(
        before, z_0, y, path=training_path(config), seed=config.seed, indices=index, time_sampler="uniform"
    )
    assert float(state.loss_sum) == pytest.approx(float(expected.detach()), rel=1e-6)  # float32 sums in another order


def test_each_step_draws_the_next_samples():
    source = TinySource()
    state = trained(settings(accumulation_steps=3), steps=2, source=source)
    assert torch.equal(torch.cat(source.asked), torch.arange(16))
    assert (state.step, state.samples, state.loss_steps) == (2, 16, 2)


@pytest.mark.parametrize("parts", [2, 3, 8, 20])
def test_accumulation_changes_rounding_only(parts):
    whole, split = trained(settings()), trained(settings(accumulation_steps=parts))
    # Adam divides by the gradient's own size, so a rounding of 1e-7 of a gradient stays one of the step of 1e-3,
    # except where gradients are near its 1e-8; three steps
    assert worst_difference(whole.model, split.model) < 2e-5
    assert float(split.loss_sum) == pytest.approx(float(whole.loss_sum), rel=1e-5)


def test_uneven_shares_of_ranks_sum_to_the_whole_gradient():
    """Three ranks' losses and gradients, added up, are one rank's: 8 samples in shares of 2, 3 and 3."""
    config = settings(clip_grad_norm=0.0)
    gradients, losses = [], []
    for rank in range(3):
        state = build_state(config, TinySource(), WORLD)
        keep = []
        state.optimizer.step = lambda state=state, keep=keep, **how: keep.extend(
            parameter.grad.clone() for parameter in state.model.parameters() if parameter.grad is not None
        )
        train_step(state, TinySource(), config, training_path(config), World(rank=rank, size=3))
        gradients.append(keep)
        losses.append(float(state.loss_sum))
    state = build_state(config, TinySource(), WORLD)
    whole = []
    state.optimizer.step = lambda **how: whole.extend(
        p.grad.clone() for p in state.model.parameters() if p.grad is not None
    )
    train_step(state, TinySource(), config, training_path(config), WORLD)
    assert sum(losses) == pytest.approx(float(state.loss_sum), rel=1e-6)
    for parts, expected in zip(zip(*gradients), whole):
        # DistributedDataParallel takes the mean over ranks
        torch.testing.assert_close(sum(parts) / 3, expected, rtol=1e-4, atol=1e-7)


def test_ranks_take_consecutive_slices():
    shards = [World(rank=rank, size=3).shard(8, first=16) for rank in range(3)]
    assert torch.equal(torch.cat(shards), torch.arange(16, 24))
    assert [len(shard) for shard in shards] == [2, 3, 3]


def test_labels_are_dropped_by_sample_number():
    config = settings(label_dropout=0.5, batch_size=20)
    source, state, seen = TinySource(), build_state(settings(label_dropout=0.5), TinySource(), WORLD), []
    state.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    for _ in range(10):
        train_step(state, source, config, training_path(config), WORLD)
    dropped = torch.cat([y == state.model.null_label for _, _, y in seen])
    index = torch.arange(200)
    assert torch.equal(dropped, label_dropout_mask(index, config.seed, 0.5))
    assert 70 < int(dropped.sum()) < 130  # 100 +- 4 standard deviations of 7.1
    assert torch.equal(torch.cat([y for _, _, y in seen])[~dropped], source.batch(index, 0)[1][~dropped])
    assert torch.equal(torch.cat([t for t, _, _ in seen]), time_samplers.draw("uniform", index, config.seed))


def test_an_unlabelled_network_gets_no_labels():
    config = settings(num_classes=0, label_dropout=0.0, task="unconditional")
    state, seen = build_state(config, TinySource(), WORLD), []
    state.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    train_step(state, TinySource(), config, training_path(config), WORLD)
    assert seen == [None]


def test_clipping_bounds_the_norm_and_reports_the_one_before():
    free, clipped = trained(settings(), steps=1), trained(settings(clip_grad_norm=1e-3), steps=1)
    assert float(clipped.grad_norm) == float(free.grad_norm) > 1e-3
    # Adam's first average is (1 - beta1) times the gradient
    norm = torch.stack([s["exp_avg"].norm() for s in clipped.optimizer.state.values()]).norm() / 0.1
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_below_the_bound_is_left_alone():
    free, clipped = trained(settings()), trained(settings(clip_grad_norm=1e6))
    assert float(clipped.grad_norm) < 1e6
    assert worst_difference(free.model, clipped.model) == 0


def test_ema_follows_the_formula():
    model = torch.nn.Linear(2, 2)
    ema, optimizer = EMA(model, 0.5), AdamW(model.parameters(), lr=1.0)
    expected = model.weight.detach().double()
    for step in range(20):
        for parameter in model.parameters():
            parameter.grad = -torch.ones_like(parameter)
        optimizer.step(averaged=ema.averaged, ema_decay=ema.decay_at(step))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    # 20 roundings of 2^-24 of values below 32
    assert expected.min() > 10
    torch.testing.assert_close(ema.average.weight.detach().double(), expected, rtol=0, atol=4e-5)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (10**6, 0.9999)])
def test_ema_warm_up(step, decay):
    assert EMA(torch.nn.Linear(1, 1), 0.9999).decay_at(step) == pytest.approx(decay)


def test_the_average_is_float32_and_not_trained():
    ema = EMA(torch.nn.Linear(2, 2).bfloat16(), 0.9)
    assert {p.dtype for p in ema.average.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in ema.average.parameters())
    assert not ema.average.training


def test_training_averages_with_the_decay_asked_for():
    assert trained(settings(ema_decay=0.25), steps=0).ema.decay == 0.25
    state = trained(settings(ema_decay=0.0), steps=2)
    assert worst_difference(state.model, state.ema.average) == 0


def test_the_average_warms_up_from_the_first_step_on():
    state = trained(settings(), steps=0)
    for step in range(2):
        average = [p.double() for p in state.ema.average.parameters()]
        train_step(state, TinySource(), settings(), training_path(settings()), WORLD)
        keep = (1 + step) / (10 + step)
        for before, after, p in zip(average, state.ema.average.parameters(), state.model.parameters()):
            # roundings of 2^-24 of weights below 1
            torch.testing.assert_close(after.double(), keep * before + (1 - keep) * p.double(), rtol=0, atol=2e-7)


def test_bf16_trains_close_to_fp32():
    exact, rounded = (trained(dataclasses.replace(settings(), precision=p), steps=5) for p in ("fp32", "bf16"))
    assert worst_difference(exact.model, rounded.model) > 0
    # bf16 keeps 8 bits: 1/256 of a velocity's error, on a loss of about 2
    assert float(rounded.loss_sum) == pytest.approx(float(exact.loss_sum), rel=1e-2)
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}

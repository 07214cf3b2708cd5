"""train.optimizer.AdamW is torch's fused AdamW, clipping and multi-tensor average, whichever way a step is done."""

import copy

import pytest
import torch

from lfm_fast import _library, ops
from lfm_fast.train.optimizer import AdamW

SHAPES = ((7, 5), (5,), (2, 3, 2, 2), (301,))
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    if request.param == "cpp" and (reason := _library.load()):
        pytest.skip(reason)
    with ops.use_backend(request.param, ops=["adamw_ema"]):
        yield request.param


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def give_gradients(tensors, seed, skip=()):
    generator = torch.Generator().manual_seed(1000 + seed)
    for i, p in enumerate(tensors):
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = None if i in skip else gradient


def decay(step):
    return min(0.99, (1 + step) / (10 + step))


def step_ours(optimizer, averaged, step, scale=None):
    optimizer.step(gradient_scale=scale, averaged=averaged, ema_decay=decay(step))


def averages_of(tensors):
    return {p: p.detach().clone() for p in tensors}


def assert_near(a, b):
    """20 steps of roundings of 2^-24 of numbers below 4."""
    torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


def test_twenty_steps_are_torchs(backend):
    """With clipping in every other step, and a parameter that has no gradient in every third."""
    ours, theirs = parameters(), parameters()
    mine, averaged = AdamW(ours, **SETTINGS), averages_of(ours)
    torchs, expected = torch.optim.AdamW(theirs, **SETTINGS, fused=True), averages_of(theirs)
    for step in range(20):
        skip = (1,) if step % 3 == 1 else ()
        give_gradients(ours, step, skip)
        give_gradients(theirs, step, skip)
        scale = torch.tensor(0.25) if step % 2 else None
        step_ours(mine, averaged, step, scale)
        if scale is not None:
            torch._foreach_mul_([p.grad for p in theirs if p.grad is not None], scale)
        torchs.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(expected.values()), theirs, 1 - decay(step))
    for p, q in zip(ours, theirs):
        assert_near(p, q)
        assert_near(averaged[p], expected[q])
        for name, value in torchs.state[q].items():
            assert_near(mine.state[p][name], value)
    assert {int(mine.state[p]["step"]) for p in ours} == {20, 13}


def test_its_state_is_laid_out_as_torchs(backend):
    ours, theirs = parameters(), parameters()
    mine, torchs = AdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS, fused=True)
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    mine.step()
    torchs.step()
    a, b = mine.state_dict(), torchs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for i, state in b["state"].items():
        assert list(a["state"][i]) == list(state)
        for name, value in state.items():
            mine = a["state"][i][name]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)


@pytest.mark.parametrize("first", [AdamW, torch.optim.AdamW])
def test_it_goes_on_to_the_bit_from_a_state_dict(first, backend):
    """Its own after any number of steps; torch's own with rounding only."""
    whole, broken = parameters(), parameters()
    uninterrupted, beginning = AdamW(whole, **SETTINGS), first(broken, **SETTINGS)
    for step in range(10):
        give_gradients(whole, step)
        uninterrupted.step()
    for step in range(5):
        give_gradients(broken, step)
        beginning.step()
    resumed = AdamW(broken, **SETTINGS)
    resumed.load_state_dict(copy.deepcopy(beginning.state_dict()))
    for step in range(5, 10):
        give_gradients(broken, step)
        resumed.step()
    for p, q in zip(broken, whole):
        assert_near(p, q) if first is torch.optim.AdamW else torch.testing.assert_close(p, q, rtol=0, atol=0)
        assert int(resumed.state[p]["step"]) == 10


def test_an_optimizer_put_back_to_an_earlier_state_counts_from_there(backend):
    tensors = parameters()
    optimizer, kept = AdamW(tensors, **SETTINGS), {}
    for step in range(5):
        if step == 2:
            kept = copy.deepcopy((optimizer.state_dict(), [p.detach() for p in tensors]))
        give_gradients(tensors, step)
        optimizer.step()
    once = [p.detach().clone() for p in tensors]
    optimizer.load_state_dict(kept[0])
    torch._foreach_copy_([p.data for p in tensors], kept[1])
    for step in range(2, 5):
        give_gradients(tensors, step)
        optimizer.step()
    for p, expected in zip(tensors, once):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=0)
    assert {int(optimizer.state[p]["step"]) for p in tensors} == {5}


def test_the_two_ways_of_a_step_take_turns():
    """A backend may refuse from one step to the next: the count of steps must not be one of the past."""
    if reason := _library.load():
        pytest.skip(reason)
    ours, theirs = parameters(), parameters()
    mine, torchs = AdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS, fused=True)
    for step, name in enumerate(["cpp", "reference", "cpp", "cpp", "reference", "reference", "cpp"]):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        with ops.use_backend(name, ops=["adamw_ema"]):
            mine.step()
        torchs.step()
    for p, q in zip(ours, theirs):
        assert_near(p, q)
        assert int(mine.state[p]["step"]) == 7


def test_a_copy_steps_like_the_original(backend):
    ours = parameters()
    mine = AdamW(ours, **SETTINGS)
    give_gradients(ours, 0)
    mine.step()
    twin = copy.deepcopy(mine)
    for optimizer in (mine, twin):
        tensors = optimizer.param_groups[0]["params"]
        give_gradients(tensors, 1)
        optimizer.step()
    for p, q in zip(ours, twin.param_groups[0]["params"]):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_one_call_of_the_op_does_a_step(monkeypatch):
    if reason := _library.load():
        pytest.skip(reason)
    called = []
    real = ops.adamw_ema
    monkeypatch.setattr(ops, "adamw_ema", lambda *args: called.append(args) or real(*args))
    ours = parameters()
    mine, averaged = AdamW(ours, **SETTINGS), averages_of(ours)
    for step in range(3):
        give_gradients(ours, step)
        step_ours(mine, averaged, step)
    assert len(called) == 3
    assert [len(args[1]) for args in called] == [len(SHAPES)] * 3

"""adamw_ema against torch.optim.AdamW and an explicit moving average, and what an op that changes tensors must obey."""

import copy
import math

import pytest
import torch
from compare import assert_close, assert_same_bits
from row_cases import ROWS, arguments_of, results

from lfm_fast import ops

ROW = ROWS["adamw_ema"]
SHAPES = ((13, 7), (5,), (3, 2, 2, 2), (300, 3), ())
SETTINGS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def draw(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    device = torch.get_default_device()
    return [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in SHAPES]


def learning_rate(step):
    return 0.02 / step


def ema_decay(step):
    return min(0.9, (1 + step) / (10 + step))


def adamw(parameters, learning_rate=1e-2, **how):
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    kept = {name: SETTINGS[name] for name in ("eps", "weight_decay")}
    return torch.optim.AdamW([p.requires_grad_() for p in parameters], lr=learning_rate, betas=betas, **kept, **how)


class OurState:
    def __init__(self, seed=1):
        self.p, self.averaged = draw(seed), draw(seed)
        self.m, self.v = ([torch.zeros_like(p) for p in self.p] for _ in range(2))
        self.low = [torch.empty_like(p, dtype=torch.bfloat16) for p in self.p]

    def step(self, step, gradients, scale=None):
        schedule = torch.tensor([learning_rate(step), step, ema_decay(step)], dtype=torch.float64)
        lists = (self.p, gradients, self.m, self.v, self.averaged, self.low)
        ops.adamw_ema(schedule, *lists, **SETTINGS, gradient_scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_steps_are_those_of_torchs_adamw_in_float64(dtype, backend):
    """200 steps with changing learning rate, decay and gradient scale.

    Tolerance: an update is at most the learning rate, 0.02 / step in sum 0.12; its roundings are 2^-24 of |p| below 4,
    once a step, with signs that differ: 20 of them.
    """
    ours = OurState()
    exact = [p.double() for p in draw(1)]
    optimizer, averaged = adamw(exact), [p.detach().clone() for p in exact]
    for step in range(1, 201):
        gradients, scale = draw(100 + step, dtype), torch.tensor(1.0 / (1 + step % 3))
        ours.step(step, gradients, scale)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        for p, g in zip(exact, gradients):
            p.grad = g.double() * scale.double()
        optimizer.step()
        for a, p in zip(averaged, exact):
            a.mul_(ema_decay(step)).add_(p.detach(), alpha=1 - ema_decay(step))
    for i, p in enumerate(exact):
        bounds = {"absolute": 5e-6, "relative": 2e-6}
        assert_close(ours.p[i], p, what="parameters", **bounds)
        assert_close(ours.m[i], optimizer.state[p]["exp_avg"], what="exp_avg", **bounds)
        assert_close(ours.v[i], optimizer.state[p]["exp_avg_sq"], what="exp_avg_sq", **bounds)
        assert_close(ours.averaged[i], averaged[i], what="averaged", **bounds)
        assert_same_bits(ours.low[i], ours.p[i].bfloat16(), "low")


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
def test_a_run_goes_on_with_torchs_state_and_back(how, backend):
    """exp_avg, exp_avg_sq and step mean the same: 5 steps of torch's AdamW, 5 of ours on its state, 5 of torch's."""
    theirs, mixed = draw(2), draw(2)
    whole, first = adamw(theirs, **how), adamw(mixed, **how)

    def of_torch(optimizer, parameters, steps):
        for step in steps:
            for p, g in zip(parameters, draw(step)):
                p.grad = g.clone()
            optimizer.step()

    of_torch(whole, theirs, range(1, 16))
    of_torch(first, mixed, range(1, 6))
    states = [first.state[p] for p in mixed]
    with torch.no_grad():
        for step in range(6, 11):
            lists = [mixed, draw(step), [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], []]
            for s in states:
                s["step"] += 1
            schedule = torch.tensor([1e-2, float(states[0]["step"]), 0.0], dtype=torch.float64)
            ops.adamw_ema(schedule, *lists, **SETTINGS)
    second = adamw(mixed, **how)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    of_torch(second, mixed, range(11, 16))
    for p, q in zip(mixed, theirs):
        assert_close(p, q, absolute=1e-6, relative=1e-6)
        assert second.state[p]["step"] == whole.state[q]["step"] == 15


def test_a_nan_stays_in_its_element(backend):
    clean, spoilt = OurState(), OurState()
    gradients = draw(3)
    clean.step(1, gradients)
    gradients[3][7, 1] = math.nan
    spoilt.step(1, gradients)
    for name in ("p", "m", "v", "averaged", "low"):
        for i, (a, b) in enumerate(zip(getattr(clean, name), getattr(spoilt, name))):
            same = a.clone()
            if i == 3:
                assert b[7, 1].isnan()
                same[7, 1] = b[7, 1]
            assert_same_bits(b, same, f"{name}[{i}]")


@pytest.mark.parametrize("how", ["op", "operator"])
def test_a_backward_that_saved_a_parameter_notices(how, backend):
    """As with PyTorch's own in-place operations, or the gradient would be wrong without a word."""
    ours, x = OurState(), torch.ones(5, requires_grad=True)
    loss = (x * ours.p[1] + ours.averaged[1].square() * x).sum()
    versions = [t._version for t in (*ours.p, *ours.m, *ours.v, *ours.averaged, *ours.low)]
    if how == "op":
        ours.step(1, draw(4))
    else:
        schedule = torch.tensor([0.1, 1.0, 0.5], dtype=torch.float64)
        torch.ops.lfm_fast.adamw_ema(schedule, ours.p, draw(4), ours.m, ours.v, ours.averaged, ours.low)
    after = [t._version for t in (*ours.p, *ours.m, *ours.v, *ours.averaged, *ours.low)]
    assert all(a > v for a, v in zip(after, versions))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("call", [ROW, ROW.overload], ids=["op", "operator"])
def test_gradients_through_it_are_refused(call):
    args = arguments_of(ROW, {})
    args[1][1].requires_grad_()
    before = [p.detach().clone() for p in args[1]]
    with pytest.raises(ValueError, match=r"but parameters requires one: call it under torch.no_grad\(\)\."):
        call(*args)
    for p, q in zip(args[1], before):
        assert_same_bits(p, q)
    with torch.no_grad():
        call(*args)
    assert args[1][1].requires_grad
    assert not torch.equal(args[1][1], before[1])


def test_a_compiled_update_changes_the_same_tensors():
    """One graph that makes the gradients and reads the results: auto-functionalisation must write back each list."""
    torch._dynamo.reset()

    def update(state, gradients, schedule):
        doubled = [2 * g for g in gradients]
        with torch.no_grad():
            ops.adamw_ema(schedule, *state[:1], doubled, *state[1:], **SETTINGS)
        return state[0][0].sum() + state[4][1].float().sum()

    compiled = torch.compile(update, fullgraph=True, backend="inductor")
    kept = []
    for function in (update, compiled):
        ours = OurState()
        state = [x[:2] for x in (ours.p, ours.m, ours.v, ours.averaged, ours.low)]
        for p in state[0]:
            p.requires_grad_()
        sums = []
        for step in (1, 2, 3):
            schedule = torch.tensor([learning_rate(step), step, ema_decay(step)], dtype=torch.float64)
            sums.append(function(state, draw(step)[:2], schedule).detach())
        kept.append([*sums, *(x.detach() for tensors in state for x in tensors)])
    for got, want in zip(kept[1], kept[0]):
        assert_close(got, want, absolute=1e-6, relative=1e-6)


def test_gradients_may_be_one_and_what_is_changed_may_not_be_a_view_of_its_negative(backend):
    """The bit that says "negated" is no part of the memory, which is what a kernel changes."""
    schedule = torch.tensor([0.1, 1, 0.5], dtype=torch.float64)

    def lists():
        return {name: [torch.ones(3), torch.ones(3)] for name in ("parameters", "exp_avg", "exp_avg_sq", "averaged")}

    once = lists()
    gradient = torch.ones(3)
    ops.adamw_ema(schedule, gradients=[gradient, gradient], **once, low=[])
    assert torch.equal(once["parameters"][0], once["parameters"][1])
    assert once["parameters"][0].max() < 1
    for name in once:
        spoilt = lists()
        spoilt[name][1] = torch._neg_view(torch.ones(3))
        with pytest.raises(ValueError, match=f"a tensor of {name} is changed in place but is no memory of its own"):
            ops.adamw_ema(schedule, gradients=[gradient, gradient], **spoilt, low=[])


def test_tensors_that_share_memory_are_refused(library):
    shared = torch.zeros(10)
    lists = [[shared[:5], shared[4:9]], *([[torch.zeros(5), torch.zeros(5)] for _ in range(3)])]
    schedule = torch.tensor([0.1, 1.0, 0.5], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"a tensor to change shares memory with another one; pass each one once\."):
        ops.adamw_ema(schedule, *lists, [], [])
    assert not shared.any()


@pytest.mark.parametrize("name", ["gradients", "exp_avg", "exp_avg_sq", "averaged", "low"])
@pytest.mark.parametrize(
    "spoil", [lambda x: x[:-1], lambda x: x.to(torch.int32), lambda x: x.double(), lambda x: x.t().contiguous().t()]
)
def test_the_compiled_kernel_refuses_lists_that_do_not_fit(name, spoil, library):
    kernel = torch.ops.lfm_fast_cpp.adamw_ema
    args = list(arguments_of(ROW, {"shapes": ((4, 3), (2, 2))}))
    position = ROW.argument_names.index(name)
    with pytest.raises(RuntimeError, match=name):
        kernel(*args[:position], [spoil(args[position][0]), args[position][1]], *args[position + 1 :])
    with pytest.raises(RuntimeError, match=f"{name} must hold 2 tensors, got 1"):
        kernel(*args[:position], args[position][:1], *args[position + 1 :])


WRONG = [
    ({"schedule": torch.zeros(3)}, "schedule is float32, expected float64"),
    ({"schedule": torch.zeros(4, dtype=torch.float64)}, r"schedule is \(4,\), expected \(3,\)"),
    ({"parameters": torch.zeros(3)}, "parameters is a Tensor: pass a list of tensors"),
    ({"gradients": []}, "gradients holds 0 tensors and parameters 3"),
    ({"low": [torch.zeros(5)]}, "low holds 1 tensors and parameters 3"),
    ({"exp_avg": [torch.zeros(5), torch.zeros(3, 7), torch.zeros(128)]}, r"a tensor of exp_avg is \(128,\) but"),
    ({"gradient_scale": torch.ones(1)}, r"gradient_scale is \(1,\), expected a scalar tensor"),
    ({"gradient_scale": 0.5}, "gradient_scale is a float"),
    ({"beta1": 1.0}, r"beta1 is 1.0, expected a number in \[0, 1\)"),
    ({"eps": -1.0}, "eps is -1.0, expected a number >= 0"),
    ({"averaged": [torch.zeros(1).expand(5), torch.zeros(3, 7), torch.zeros(129)]}, "averaged is changed in place but"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_a_wrong_argument_is_named(changes, sentence):
    args = [changes.get(name, value) for name, value in zip(ROW.argument_names, arguments_of(ROW, {}))]
    with pytest.raises(ValueError, match=sentence) as caught:
        ROW(*args)
    assert str(caught.value).endswith(".")


def test_moments_without_gradient_do_not_end_as_subnormal_numbers(library):
    """They would slow down every later step; torch's AdamW lets them stay at 2^-149."""
    p, m, v = torch.ones(64), torch.full((64,), 2e-38), torch.full((64,), 2e-38)
    for step in range(1, 30):
        schedule = torch.tensor([1e-3, step, 0.0], dtype=torch.float64)
        ops.adamw_ema(schedule, [p], [torch.zeros(64)], [m], [v], [], [], beta2=0.9)
    assert not m.any()
    assert not v.any()
    assert p.isfinite().all()


def test_channels_last_weights_run_on_the_library(library):
    args = arguments_of(ROW, {"shapes": ((3, 4, 5, 6), (2, 3)), "layout": "channels_last"})
    assert ROW.choose(args) == "cpp"
    for got, want in zip(results(ROW, args), results(ROW, args, ROW.reference)):
        assert_close(got, want, absolute=1e-6, relative=1e-6)

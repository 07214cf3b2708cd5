"""Gradients: the rows' explicit formulas in float64, the compiled kernels' against float64, second derivatives."""

import itertools

import pytest
import torch
from compare import assert_close
from row_cases import ROWS, arguments_of, in_float64, map_tensors, outputs
from torch.autograd import gradcheck, gradgradcheck

from lfm_fast import ops

F64 = {"dtype": torch.float64}
CHECKED = {
    "interpolate": [{"shape": (3, 2, 3), **F64}, {"shape": (2, 5), "noise": True, **F64}, {"shape": (0, 3), **F64}],
    "velocity_loss": [
        {"shape": (3, 2, 3), **F64},
        {"shape": (2, 5), "weighted": False, **F64},
        {"shape": (2, 5), "noise": True, **F64},
        {"shape": (2, 0), **F64},
    ],
    "modulated_layer_norm": [
        {"shape": (3, 2, 4), "state": torch.float64, "chunked": True, **F64},
        {"shape": (2, 3, 1), "state": torch.float64, **F64},
        {"shape": (2, 0, 3), "state": torch.float64, **F64},
    ],
    "gated_residual_norm": [
        {"shape": (3, 2, 4), "state": torch.float64, "chunked": True, **F64},
        {"shape": (2, 3, 1), "state": torch.float64, **F64},
        {"shape": (2, 0, 3), "state": torch.float64, **F64},
    ],
    "gelu_tanh": [{"shape": (3, 2, 3), **F64}, {"shape": (), **F64}, {"shape": (0, 3), **F64}],
    "gelu_tanh_backward": [{"shape": (3, 2, 3), **F64}, {"shape": (0, 3), **F64}],
    "group_norm_silu": [
        {"shape": (3, 4, 2, 2), **F64},
        {"shape": (2, 4, 2, 3), "layout": "channels_last", "affine": False, **F64},
        {"shape": (3, 6), "num_groups": 3, "silu": False, **F64},
        {"shape": (2, 4, 0), **F64},
    ],
    "attention_with_lse": [
        {"shape": (3, 2, 4, 2), **F64},
        {"shape": (2, 1, 3, 2), "keys": 5, "scale": 0.7, **F64},
        {"shape": (2, 2, 3, 2), "layout": "fused", **F64},
        {"shape": (2, 1, 0, 3), **F64},
    ],
    "tile_linear": [
        {"shape": (3, 2, 4), "outputs": 3, "parameters": torch.float64, **F64},
        {"shape": (5,), "outputs": 2, "bias": False, "parameters": torch.float64, **F64},
        {"shape": (0, 3), "outputs": 2, "parameters": torch.float64, **F64},
    ],
    "tile_mlp": [
        {"shape": (3, 2, 4), "hidden": 5, "outputs": 3, "parameters": torch.float64, **F64},
        {"shape": (0, 3), "hidden": 4, "outputs": 2, "parameters": torch.float64, **F64},
    ],
    "guided_step": [
        {"shape": (3, 2, 2), "state": torch.float64, "num_stored": 2, "keep": True, "noise": True, **F64},
        {"shape": (2, 3), "state": torch.float64, "guided": False, **F64},
        {"shape": (2, 3), "state": torch.float64, "error": True, **F64},
        {"shape": (2, 3), "state": torch.float64, "num_stored": 1, **F64},
    ],
}
WITH_GRADIENT = [
    pytest.param(ROWS[name], case, id=f"{name}-{i}") for name, cases in CHECKED.items() for i, case in enumerate(cases)
]


def test_every_row_with_a_gradient_is_checked():
    assert set(CHECKED) == {row.name for row in ROWS.values() if row.backward is not None}


def leaves_of(row, args):
    """The float arguments that a gradient may flow to, as a flat list, and the call as a function of them."""
    slots = []
    for name, value in zip(row.argument_names, args):
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and name not in row.not_differentiable:
                slots.append(x)
    ids = {id(x): i for i, x in enumerate(slots)}

    def call(*leaves):
        return outputs(row(*map_tensors(lambda x: leaves[ids[id(x)]] if id(x) in ids else x, args)))

    return [x.detach().clone().requires_grad_() for x in slots], call


@pytest.mark.parametrize(("row", "case"), WITH_GRADIENT)
def test_gradient_and_its_gradient(row, case):
    leaves, call = leaves_of(row, arguments_of(row, case))

    def differentiable(*x):
        return tuple(y for y in call(*x) if y.requires_grad and y.numel())

    if not differentiable(*leaves):  # nothing but empty tensors: backward must still run
        sum(y.sum() for y in call(*leaves) if y.requires_grad).backward()
        assert all(x.grad is None or x.grad.shape == x.shape for x in leaves)
        return
    assert gradcheck(differentiable, leaves)
    assert gradgradcheck(differentiable, leaves)


@pytest.mark.parametrize(("row", "case"), WITH_GRADIENT)
def test_each_argument_alone(row, case):
    """A gradient wanted for one argument only, which is how most calls come."""
    leaves, call = leaves_of(row, arguments_of(row, case))
    together = gradients(call, leaves)
    for i, leaf in enumerate(leaves):
        singled = [x if k == i else x.detach() for k, x in enumerate(leaves)]
        if together[i] is None:
            continue
        assert_close(gradients(call, singled, only=leaf)[0], together[i], absolute=1e-12, relative=1e-12)


def gradients(call, leaves, only=None):
    """Of a sum of all outputs with factors that differ between elements."""
    total = 0.0
    for y in call(*leaves):
        if y.requires_grad:
            factors = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64, device=y.device)
            total = total + (y.double() * factors.reshape(y.shape)).sum()
    return torch.autograd.grad(total, [only] if only is not None else leaves, allow_unused=True)


LOW = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = {"shape": (3, 4, 5, 7)}
BELOW_FLOAT64 = [
    *(("interpolate", {**SHAPE, "noise": noise}) for noise in (False, True)),
    *(("velocity_loss", {**SHAPE, "dtype": d, "noise": n}) for d, n in itertools.product(LOW, (False, True))),
    *(("guided_step", {**SHAPE, "dtype": d, "num_stored": 2, "keep": True}) for d in LOW),
]


@pytest.mark.parametrize(("name", "case"), BELOW_FLOAT64, ids=str)
def test_low_precision_gradients_are_those_of_float64(name, case, backend):
    """Tolerance: that of the row for elements; coefficients and weights sum 140 terms, so 140 2^-24 of terms below 20.

    The loss's gradient is kept in the velocity's dtype, hence rounded to it once more, and the target's comes from it.
    """
    row = ROWS[name]
    args = arguments_of(row, case)
    leaves, call = leaves_of(row, args)
    wide_leaves, wide_call = leaves_of(row, in_float64(args))
    count = 1 if name == "velocity_loss" else 2  # what the public functions return and differentiate
    got = gradients(lambda *x: call(*x)[:count], leaves)
    want = gradients(lambda *x: wide_call(*x)[:count], wide_leaves)
    assert len(want) == len(got)
    kept = torch.finfo(args[0].dtype).eps / 2 if name == "velocity_loss" else 0.0
    for leaf, g, w in zip(leaves, got, want):
        assert g.dtype == leaf.dtype
        absolute = row.tolerance.absolute if g.shape == args[0].shape else 140 * 2.0**-24 * 20
        assert_close(g, w, absolute=absolute, relative=1e-5 + kept, what=f"{name} {tuple(leaf.shape)} on {backend}")


def test_a_gradient_that_does_not_exist_is_refused():
    z, v, w = torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 2)
    index, c = torch.arange(2), torch.ones(4, 2)
    asked = {
        "weights": lambda: ops.guided_step(z, v, None, None, [], w.clone().requires_grad_()),
        "scale": lambda: ops.guided_step(z, v, v, torch.ones(2, requires_grad=True), [], w),
        "z_0": lambda: ops.velocity_loss(v, z_0=z.clone().requires_grad_(), coefficients=c, index=index),
        "coefficients": lambda: ops.velocity_loss(v, z_0=z, coefficients=c.clone().requires_grad_(), index=index),
    }
    for name, call in asked.items():
        with pytest.raises(ValueError, match=rf"no gradient for {name}, .*{name}.detach\(\)"):
            call()
        with torch.no_grad():
            call()


def test_the_operator_itself_refuses_too():
    """Without the public function in front."""
    w = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient for weights"):
        torch.ops.lfm_fast.guided_step(torch.zeros(2, 3), torch.ones(2, 3), None, None, [], w)


def test_error_estimate_is_not_differentiable():
    z, v = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
    z_next, blended, error = ops.guided_step(z, v, None, None, [], torch.ones(2, 2), torch.ones(2, 1), 1e-3, 1e-3)
    assert z_next.requires_grad
    assert not error.requires_grad
    assert blended.numel() == 0


def test_defaults_left_out_do_not_break_backward():
    """PyTorch hands a row only the arguments up to the last that is not its default."""
    v = torch.randn(2, 3, requires_grad=True)
    torch.ops.lfm_fast.velocity_loss(v, torch.zeros(2, 3))[0].sum().backward()
    assert_close(v.grad, 2 / 3 * v, relative=1e-6)
    z = torch.zeros(2, 3, requires_grad=True)
    torch.ops.lfm_fast.guided_step(z, v.detach(), None, None, [v.detach()], torch.ones(2, 3))[0].sum().backward()
    assert_close(z.grad, torch.ones(2, 3))


def test_weight_zero_has_a_gradient():
    weight = torch.zeros(2, requires_grad=True)
    ops.velocity_loss(torch.full((2, 5), 3.0), torch.zeros(2, 5), weight).sum().backward()
    assert_close(weight.grad, torch.full((2,), 9.0), relative=1e-6)

"""torch.compile, forward-mode AD, torch.func, autocast, inference mode: right, or an error; never a silent zero."""

import pytest
import torch
from compare import assert_close
from row_cases import ROWS, arguments_of, in_float64, map_tensors, results
from torch.autograd import forward_ad

from lfm_fast import ops

BATCH = 3


def here(x):
    """On the device that the fixture `backend` chose."""
    return x.to(torch.get_default_device())


def problem(dtype=torch.float32):
    """Functions of one tensor (B, N), each through one op, with everything per sample different."""
    g = torch.Generator().manual_seed(0)
    shapes = ((BATCH, 5), (4, BATCH), (BATCH,), (BATCH, 3))
    other, coefficients, scale, weights = (here(torch.randn(s, generator=g, device="cpu")).to(dtype) for s in shapes)
    index = torch.arange(BATCH)
    return {
        "interpolate": lambda z: ops.interpolate(z, coefficients, other)[0],
        "interpolate_noise": lambda z: ops.interpolate(z, coefficients, index=index, seed=4)[1],
        "velocity_loss": lambda v: ops.velocity_loss(v, other, scale),
        "guided_step": lambda z: ops.guided_step(z, 2 * z, other, scale, [3 * z], weights, keep=True)[0],
    }


NAMES = list(problem())
POINT = torch.linspace(-1.0, 2.0, 15, dtype=torch.float64).view(BATCH, 5)
DIRECTION = torch.linspace(1.0, -3.0, 15, dtype=torch.float64).view(BATCH, 5).sin()


def tangent_in_float64(name):
    """By central differences, exact but for rounding: the functions are polynomials of degree 2 at most."""
    f = problem(torch.float64)[name]
    return (f(here(POINT + DIRECTION)) - f(here(POINT - DIRECTION))) / 2


def by_dual_numbers(f, z, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, direction))).tangent


def by_jvp(f, z, direction):
    return torch.func.jvp(f, (z,), (direction,))[1]


@pytest.mark.parametrize("how", [by_dual_numbers, by_jvp])
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_gives_the_tangent(name, how, backend):
    """PyTorch gives a custom op without a rule a zero tangent, silently."""
    got = how(problem()[name], here(POINT.float()), here(DIRECTION.float()))
    assert_close(got, tangent_in_float64(name), absolute=1e-5, what=name)


@pytest.mark.parametrize("how", [by_dual_numbers, by_jvp])
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_inside_compile(name, how):
    torch._dynamo.reset()
    f = problem()[name]
    got = torch.compile(lambda z, d: how(f, z, d), backend="aot_eager")(POINT.float(), DIRECTION.float())
    assert_close(got, tangent_in_float64(name), absolute=1e-5, what=name)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_around_compile(name):
    """Compiled first without, then within, a dual level: the compiled code must not be reused."""
    torch._dynamo.reset()
    f = torch.compile(problem()[name], backend="aot_eager")
    f(POINT.float())
    got = by_dual_numbers(f, POINT.float(), DIRECTION.float())
    assert_close(got, tangent_in_float64(name), absolute=1e-5, what=name)


@pytest.mark.parametrize("name", NAMES)
def test_func_transforms(name, backend):
    f, z = problem()[name], here(POINT.float())
    batched = torch.stack((z, 2 * z))
    assert_close(torch.func.vmap(f)(batched), torch.stack((f(z), f(2 * z))), absolute=1e-5, what="vmap")
    leaf = z.clone().requires_grad_()
    f(leaf).square().sum().backward()
    got = torch.func.grad(lambda x: f(x).square().sum())(z)
    assert_close(got, leaf.grad, absolute=1e-4, relative=1e-5, what="grad")
    hessian = torch.func.hessian(lambda x: f(x).sum())(z)
    assert hessian.shape == (*z.shape, *z.shape)
    want = torch.autograd.functional.hessian(lambda x: f(x).sum(), z)
    assert_close(hessian, want, absolute=1e-5, what="hessian")


def step_of_training_and_sampling(z_0, coefficients, index, weights):
    """All four ops in one graph."""
    z_t, target = ops.interpolate(z_0, coefficients, index=index, seed=1)
    velocity = z_t.tanh()
    loss = ops.velocity_loss(velocity, target)
    start = ops.philox_normal(index, 12, seed=2).view(z_0.shape)
    z_next, kept, error = ops.guided_step(
        start, velocity, target, coefficients[0].detach(), [z_t], weights, weights[:, :2], 1e-2, 1e-2, keep=True
    )
    return loss, z_next, kept, error


def its_arguments(batch):
    g = torch.Generator().manual_seed(batch)
    return (
        torch.randn(batch, 3, 4, generator=g),
        torch.rand(4, batch, generator=g),
        torch.arange(batch),
        torch.rand(batch, 3, generator=g),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(compiler):
    """fullgraph=True raises at a graph break. Forward, backward, and another batch size through dynamic shapes.

    The graph holds the ops whatever their backend, which is chosen when it runs: the default serves here.
    """
    torch._dynamo.reset()
    compiled = torch.compile(step_of_training_and_sampling, fullgraph=True, backend=compiler, dynamic=True)
    for batch in (3, 5):
        results = []
        for f in (step_of_training_and_sampling, compiled):
            z_0, coefficients, index, weights = its_arguments(batch)
            z_0.requires_grad_()
            out = f(z_0, coefficients, index, weights)
            sum(y.square().sum() for y in out[:3]).backward()
            results.append((*out, z_0.grad))
        for got, want in zip(results[1], results[0]):
            # fused tanh of another library: 2 ulp; the op's arithmetic is the same
            assert_close(got, want.detach(), absolute=1e-4, relative=1e-5, what=compiler)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_each_row_compiles(row, gradients):
    torch._dynamo.reset()
    args = arguments_of(row, row.cases[0])
    with torch.set_grad_enabled(gradients):
        compiled = torch.compile(lambda *a: row(*a), fullgraph=True, backend="aot_eager")
        for g, w in zip(results(row, args, compiled), results(row, args), strict=True):
            assert_close(g, w)


def test_a_wrong_argument_is_named_when_compiled():
    torch._dynamo.reset()
    f = torch.compile(lambda z, c: ops.interpolate(z, c, z), backend="aot_eager")
    with pytest.raises(Exception, match="coefficients is"):
        f(torch.zeros(2, 3), torch.zeros(3, 2))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_fake_kernel_knows_shapes_dtypes_and_strides(row):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for case in row.cases:
        args = arguments_of(row, case)
        with FakeTensorMode() as mode:
            fake = results(row, map_tensors(mode.from_tensor, args))
        for f, real in zip(fake, results(row, args), strict=True):
            assert (f.shape, f.dtype, f.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_meta_tensors(row):
    args = map_tensors(lambda x: x.to("meta"), arguments_of(row, row.cases[0]))
    assert all(y.is_meta for y in results(row, args))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_inference_mode(row, backend):
    args = arguments_of(row, row.cases[0])
    with torch.inference_mode():
        inside = results(row, args)
        for y, want in zip(inside, results(row, in_float64(args), row.reference)):
            assert y.is_inference()
            tolerance = row.tolerance.low if y.element_size() == 2 else row.tolerance.absolute
            assert_close(y, want, absolute=1e-5 + tolerance, relative=1e-5)


def test_autocast_leaves_the_state_in_float32(backend):
    """bf16 velocities come from the model; state, loss and arithmetic stay in float32."""
    layer = torch.nn.Linear(6, 6)
    z_0, index = torch.randn(3, 6), torch.arange(3)
    coefficients = torch.rand(4, 3)
    with torch.autocast(z_0.device.type, dtype=torch.bfloat16):
        z_t, target = ops.interpolate(z_0, coefficients, index=index)
        velocity = layer(z_t)
        loss = ops.velocity_loss(velocity, target)
        z_next, blended, _ = ops.guided_step(z_t, velocity, velocity, coefficients[0], [], torch.rand(3, 2), keep=True)
        loss.sum().backward()
    assert velocity.dtype is torch.bfloat16
    assert {x.dtype for x in (z_t, target, loss, z_next, blended)} == {torch.float32}
    want = (velocity.double() - target.double()).square().mean(1)
    assert_close(loss, want, relative=1e-5)
    assert layer.weight.grad.isfinite().all()

"""linear and mlp on the processor's matrix tiles, with their gradients, against PyTorch's own layers in float64."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from row_cases import ROWS

from lfm_fast import ops

TILES = ROWS["tile_linear"].named("cpp").available()  # why there are none
with_tiles = pytest.mark.skipif(TILES is not None, reason=str(TILES))


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(got, want):
    """In the Euclidean norm, relative."""
    assert got.shape == want.shape
    return float((got.double() - want).norm() / want.norm()) if want.norm() else float(got.double().norm())


def layer(inner, outer, seed):
    """Float32 weights that bfloat16 does not hold exactly."""
    return draw(outer, inner, seed=seed, scale=inner**-0.5), draw(outer, seed=seed + 1)


def gradients(function, x, weights, grad, dtype=None):
    """(y, gradients of x and of the weights) of function(x, *weights)."""
    leaves = [v.detach().to(dtype or v.dtype).requires_grad_() for v in (x, *weights)]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, grad.to(y.dtype))


def plain_mlp(x, weight_1, bias_1, weight_2, bias_2):
    return F.linear(F.gelu(F.linear(x, weight_1, bias_1), approximate="tanh"), weight_2, bias_2)


FUNCTIONS = {"linear": (ops.linear, F.linear), "mlp": (ops.mlp, plain_mlp)}
# (rows, inputs, outputs): cut tiles; several blocks, groups of panels and parts of a sum; sizes of a real block
SIZES = [((2, 5), 40, 70), ((33,), 31, 17), ((3, 70), 96, 300), ((2, 300), 64, 80), ((1100,), 48, 36)]
SIZES += [((2, 256), 384, 1152)]


def problem(name, rows, inner, outer):
    x, grad = draw(*rows, inner), draw(*rows, outer, seed=9)
    weights = layer(inner, outer, 1)
    if name == "mlp":
        weights, grad = (*weights, *layer(outer, inner, 3)), draw(*rows, inner, seed=9)
    return x, weights, grad


@with_tiles
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("rows", "inner", "outer"), SIZES, ids=str)
def test_value_and_gradients_under_autocast(name, rows, inner, outer):
    """Inputs and weights are rounded to 8 bits (2^-9 each, and the results once more): 3e-3 in the norm, and twice that
    behind another layer. PyTorch's own products in bfloat16 are as far off."""
    fast, plain = FUNCTIONS[name]
    x, weights, grad = problem(name, rows, inner, outer)
    y, want = gradients(plain, x, weights, grad, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.explain(name, x, *weights).backend == "cpp"
        got_y, got = gradients(fast, x, weights, grad.bfloat16())
    assert got_y.dtype is torch.bfloat16
    bound = 6e-3 if name == "mlp" else 4e-3
    assert error(got_y, y) < bound
    for g, w, leaf in zip(got, want, (x, *weights)):
        assert g.dtype is leaf.dtype
        assert error(g, w) < bound


@with_tiles
@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_in_bfloat16(name):
    fast, plain = FUNCTIONS[name]
    x, weights, grad = problem(name, (2, 40), 64, 96)
    x, weights = x.bfloat16(), [w.bfloat16() for w in weights]
    y, want = gradients(plain, x, weights, grad, torch.float64)
    got_y, got = gradients(fast, x, weights, grad)
    assert error(got_y, y) < 6e-3
    for g, w in zip(got, want):
        assert g.dtype is torch.bfloat16
        assert error(g, w) < 6e-3


@with_tiles
@pytest.mark.parametrize("name", FUNCTIONS)
def test_some_gradients_alone(name):
    """An input that wants no gradient gets none, and the others' do not change."""
    fast, _ = FUNCTIONS[name]
    x, weights, grad = problem(name, (70,), 40, 48)
    x, weights, grad = x.bfloat16(), [w.bfloat16() for w in weights], grad.bfloat16()
    _, every = gradients(fast, x, weights, grad)
    for chosen in range(len(weights) + 1):
        leaves = [v.detach().requires_grad_(i == chosen) for i, v in enumerate((x, *weights))]
        (alone,) = torch.autograd.grad(fast(*leaves), [leaves[chosen]], grad)
        assert_same_bits(alone, every[chosen])


@with_tiles
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives(name):
    """d/dx |d sum(y^2) / dx|^2 against float64."""
    fast, plain = FUNCTIONS[name]
    x, weights, _ = problem(name, (6,), 8, 12)

    def twice(function, dtype):
        leaves = [v.to(dtype).requires_grad_() for v in (x, *weights)]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves[:2], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for g, w in zip(twice(fast, torch.bfloat16), twice(plain, torch.float64)):
        assert error(g, w) < 0.05


@with_tiles
@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads_do_not_change_a_bit(name):
    """Of values and of all gradients, in several chunks of rows; and a sample's values are those it has alone."""
    fast, _ = FUNCTIONS[name]
    x, weights, grad = problem(name, (3, 700), 40, 72)
    x, weights, grad = x.bfloat16(), [w.bfloat16() for w in weights], grad.bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, each = gradients(fast, x, weights, grad)
            found.append((y, *each))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for got, want in zip(other, found[0]):
            assert_same_bits(got, want)
    for i in range(3):
        y, (of_x, *_) = gradients(fast, x[i : i + 1], weights, grad[i : i + 1])
        assert_same_bits(y, found[0][0][i : i + 1])
        assert_same_bits(of_x, found[0][1][i : i + 1])


@with_tiles
def test_float32_without_autocast_is_pytorchs_layer():
    x, weights, _ = problem("linear", (7,), 20, 30)
    assert ops.explain("linear", x, *weights).backend == "reference"
    assert_same_bits(ops.linear(x, *weights), F.linear(x, *weights))


@with_tiles
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_compiled_graph_without_breaks(name):
    fast, _ = FUNCTIONS[name]
    x, weights, grad = problem(name, (2, 9), 24, 40)
    x, weights, grad = x.bfloat16(), [w.bfloat16() for w in weights], grad.bfloat16()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, x, weights, grad)[1], gradients(fast, x, weights, grad)[1]):
        assert_same_bits(got, want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes_that_differ_are_refused_outside_of_autocast(name):
    fast, _ = FUNCTIONS[name]
    x, weights, _ = problem(name, (2,), 4, 6)
    with pytest.raises(ValueError, match="convert one of them, or call this under autocast"):
        fast(x.bfloat16(), *weights)

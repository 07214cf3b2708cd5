"""Embedded pairs as data: every order condition, the orders observed with fixed steps, other people's numbers."""

import functools
import math

import numpy as np
import pytest
import torch
from problems import PROBLEMS

from lfm_fast.solvers import embedded
from lfm_fast.solvers.attempt import inside_weights
from lfm_fast.solvers.embedded import PAIRS

# of z' - error, for each row of errors
EMBEDDED_ORDERS = {"adaptive_heun": [1], "bosh3": [2], "dopri5": [4], "tsit5": [4], "dopri8": [5, 3]}
# sums of up to 16 products of weights up to 530, each rounded to 2^-53; tsit5's constants are given to 16 digits, and
# its last ones miss the conditions by that
ROUNDING = 2e-13
each_pair = pytest.mark.parametrize("name", PAIRS)


@functools.cache
def trees(order):
    """All rooted trees with `order` nodes, a tree being the tuple of its root's subtrees."""
    return list(forests(order - 1, order - 1))


def forests(nodes, largest, last=None):
    """All multisets of trees with `nodes` nodes together, none of more than `largest`, in falling order."""
    if nodes == 0:
        yield ()
        return
    for size in range(min(nodes, largest), 0, -1):
        for number, tree in enumerate(trees(size)):
            if last is not None and (size, number) > last:
                continue
            for rest in forests(nodes - size, size, (size, number)):
                yield (tree, *rest)


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    return size(tree) * math.prod(map(density, tree))


def stages_of(tree, a):
    """What the stages of a method make of a tree: a product over the root's subtrees, stage by stage."""
    result = np.ones(len(a))
    for subtree in tree:
        result = result * (a @ stages_of(subtree, a))
    return result


def matrix(pair):
    """(a, c) of all stages, those inside the step included."""
    rows, total = [*pair.a, *pair.extra_a], len(pair.c) + len(pair.extra_c)
    a = np.array([[*row, *[0.0] * (total - len(row))] for row in rows])
    return a, np.array([*pair.c, *pair.extra_c])


def weights(row, total):
    return np.array([*row, *[0.0] * (total - len(row))])


def residual(a, b, order, share=1.0):
    """The largest miss of the conditions of this order: b . stages = share^order / density."""
    return max(abs(b @ stages_of(tree, a) - share**order / density(tree)) for tree in trees(order))


def test_the_trees_are_as_many_as_there_are():
    assert [len(trees(order)) for order in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    assert density((((),), ())) == 4 * 2  # a root with a leaf and a branch of two


@each_pair
def test_every_order_condition(name):
    pair = PAIRS[name]
    a, c = matrix(pair)
    np.testing.assert_allclose(a.sum(1), c, rtol=0, atol=ROUNDING)
    b = weights(pair.b, len(c))
    assert max(residual(a, b, order) for order in range(1, pair.order + 1)) < ROUNDING
    assert residual(a, b, pair.order + 1) > 1e-8  # and no more


@each_pair
def test_every_order_condition_of_what_it_is_compared_with(name):
    pair = PAIRS[name]
    a, c = matrix(pair)
    for errors, order in zip(pair.errors, EMBEDDED_ORDERS[name], strict=True):
        other = weights(pair.b, len(c)) - weights(errors, len(c))
        assert max(residual(a, other, k) for k in range(1, order + 1)) < ROUNDING
        assert residual(a, other, order + 1) > 1e-6
    assert pair.controlled == (8 if name == "dopri8" else EMBEDDED_ORDERS[name][0] + 1)


@each_pair
@pytest.mark.parametrize("share", [0.0, 0.21, 0.5, 0.9, 1.0])
def test_every_order_condition_inside_the_step(name, share):
    pair = PAIRS[name]
    a, c = matrix(pair)
    columns, found = inside_weights(pair, np.array([share]), np.array([1.0]))
    b = np.zeros(len(c))
    b[columns] = found[0, 1:]
    assert found[0, 0] == 1.0
    assert max(residual(a, b, order, share) for order in range(1, pair.order_inside + 1)) < 20 * ROUNDING
    if share in (0.0, 1.0):
        np.testing.assert_allclose(b, share * weights(pair.b, len(c)), rtol=0, atol=20 * ROUNDING)


@each_pair
def test_the_last_stage_is_the_first_of_the_next_step(name):
    pair = PAIRS[name]
    assert (pair.c[0], pair.c[-1]) == (0, 1)
    assert all(len(row) <= i for i, row in enumerate([*pair.a, *pair.extra_a]))
    assert (
        pair.evaluations == {"adaptive_heun": 2, "bosh3": 3, "dopri5": 6, "tsit5": 6, "dopri8": 12}[name]
    )  # of an attempt


def steps(pair, row, problem, num_steps, end, share=1.0):
    """`num_steps` steps of one size from t = 1 with the weights `row`, written out; at last only a share of one."""
    a, c = matrix(pair)
    z, dt = problem.start, (end - 1.0) / num_steps
    for n in range(num_steps):
        k = []
        for i in range(len(c)):
            point = z + dt * sum((a[i, j] * k[j] for j in range(i) if a[i, j]), torch.zeros_like(z))
            k.append(problem.velocity(torch.full((len(z),), 1.0 + (n + c[i]) * dt, dtype=z.dtype), point))
        last = n == num_steps - 1 and share != 1.0
        z = z + dt * sum(w * k[j] for j, w in enumerate(inside(pair, share) if last else row) if w)
    return z, 1.0 + (num_steps - 1 + share) * dt


def inside(pair, share):
    columns, found = inside_weights(pair, np.array([share]), np.array([1.0]))
    result = np.zeros(columns[-1] + 1)
    result[columns] = found[0, 1:]
    return result


@each_pair
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_observed_order_with_fixed_steps(name, problem):
    """Both methods of a pair, and the solution inside the last step, whose own error is one order better."""
    pair = PAIRS[name]
    total = len(pair.c) + len(pair.extra_c)
    b = weights(pair.b, total)
    rows = [(b, pair.order, 1.0)]
    rows += [(b - weights(e, total), k, 1.0) for e, k in zip(pair.errors, EMBEDDED_ORDERS[name])]
    rows.append((b, min(pair.order, pair.order_inside + 1), 0.4))
    for row, order, share in rows:
        few = {8: 5, 5: 20, 4: 20}.get(order, 40)
        errors = []
        for num_steps in (few, 2 * few):
            z, t = steps(pair, row, problem, num_steps, 0.0, share)
            errors.append(float((z - problem.exact(problem.start, 1.0, t)).abs().max()))
        observed = math.log2(errors[0] / errors[1])
        # the next terms of the error series are smaller by a few dt; at eight stages' few steps by half an order
        assert observed > order - (0.5 if order == 8 else 0.3), (order, share, errors)
        # polynomials in time are no test of an upper end: some conditions hold of themselves there
        assert problem.name == "time-dependent" or observed < order + 1.2, (order, share, errors)


def test_scipy_has_the_same_numbers():
    from scipy.integrate import RK23, RK45
    from scipy.integrate._ivp import dop853_coefficients as dop

    for pair, theirs, scale in ((embedded.BOSH3, RK23, 1), (embedded.DOPRI5, RK45, 2 / 3)):
        a, c = matrix(pair)
        s = len(theirs.C)
        np.testing.assert_allclose(a[:s, : theirs.A.shape[1]], theirs.A, rtol=1e-15)
        np.testing.assert_allclose(a[s, :s], theirs.B, rtol=1e-15)
        np.testing.assert_allclose(c[:s], theirs.C, rtol=1e-15)
        np.testing.assert_allclose(np.abs(weights(pair.errors[0], s + 1)), scale * np.abs(theirs.E), rtol=1e-13)
    pair = embedded.DOPRI8
    a, c = matrix(pair)
    np.testing.assert_allclose(a, dop.A, rtol=1e-15)
    np.testing.assert_allclose(c, dop.C, rtol=1e-15)
    np.testing.assert_allclose([weights(e, 13) for e in pair.errors], [dop.E5, dop.E3], rtol=1e-13, atol=1e-17)
    np.testing.assert_allclose([weights(row, 16) for row in pair.dense], dop.D, rtol=1e-15)


def test_torchdiffeq_has_the_same_dopri5_and_heun():
    from torchdiffeq._impl.adaptive_heun import _ADAPTIVE_HEUN_TABLEAU
    from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU

    for pair, theirs in (
        (embedded.DOPRI5, _DORMAND_PRINCE_SHAMPINE_TABLEAU),
        (embedded.ADAPTIVE_HEUN, _ADAPTIVE_HEUN_TABLEAU),
    ):
        s = len(theirs.c_sol)
        np.testing.assert_allclose(weights(pair.b, s)[:s], theirs.c_sol.numpy(), rtol=1e-15)
        found = np.abs(weights(pair.errors[0], s)[:s])
        np.testing.assert_allclose(found, np.abs(theirs.c_error.numpy()), rtol=1e-13, atol=1e-17)

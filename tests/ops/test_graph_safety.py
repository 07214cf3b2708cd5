"""What may happen between forward and backward: a tensor is changed, saved tensors move, a forward is recomputed.

The gradient is right or PyTorch's own error comes; it is never that of other numbers.
"""

import pytest
import torch
from calls import copies, exact, get, put, slots
from compare import assert_close, assert_same_bits
from row_cases import ROWS, arguments_of, outputs
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

# rows that have a gradient of their own making; those that change tensors in place have none
DIFFERENTIABLE = {name: row for name, row in ROWS.items() if row.backward is not None and not row.mutates}


def problem(row):
    """Arguments of the first case and, at the differentiable places, what autograd sees: no leaf, so that it can be
    changed in place. Returns (arguments, {place: leaf})."""
    args, leaves = copies(arguments_of(row, row.cases[0])), {}
    for slot in slots(args):
        x = get(args, slot)
        if x.is_floating_point() and row.argument_names[slot[0]] not in row.not_differentiable:
            leaves[slot] = x.clone().requires_grad_()
            put(args, slot, leaves[slot] * 1.0)
    return args, leaves


def scalar(results, keep, skip=None):
    """A sum over results, every element with another factor."""
    total = 0.0
    for k, y in enumerate(results):
        if keep[k] and k != skip:
            total = total + (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()
    return total


def gradients(total, leaves):
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves.values())]


def reference_gradients(row, args, leaves, keep, skip=None):
    wide = exact(args)
    places = {slot: get(wide, slot).requires_grad_() for slot in leaves}
    return gradients(scalar(outputs(row.reference(*wide)), keep, skip), places)


def assert_right(got, want, what):
    for g, w in zip(got, want):
        # sums of some hundred terms in float32
        assert_close(g, w, absolute=1e-4 * max(1.0, w.abs().max().item() if w.numel() else 0.0), what=what)


def assert_right_or_noticed(total, leaves, want, what):
    try:
        got = gradients(total, leaves)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        assert_right(got, want, what)


def changed(x):
    with torch.no_grad():
        x.mul_(2.0).add_(0.5)


@pytest.mark.parametrize("row", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_an_input_changed_before_backward(row, backend):
    for slot in problem(row)[1]:
        args, leaves = problem(row)
        results = outputs(row(*args))
        keep = [y.requires_grad for y in results]
        want = reference_gradients(row, args, leaves, keep)
        total = scalar(results, keep)
        changed(get(args, slot))
        assert_right_or_noticed(total, leaves, want, f"{row.name} after {row.argument_names[slot[0]]} changed")


@pytest.mark.parametrize("row", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_a_result_changed_before_backward(row, backend):
    for k in range(len(row.overload._schema.returns)):
        args, leaves = problem(row)
        results = outputs(row(*args))
        keep = [y.requires_grad for y in results]
        total = scalar(results, keep, skip=k)
        if isinstance(total, float):
            continue
        want = reference_gradients(row, args, leaves, keep, skip=k)
        changed(results[k])
        assert_right_or_noticed(total, leaves, want, f"{row.name} after result {k} changed")


@pytest.mark.parametrize("row", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_backward_twice_recomputed_and_with_saved_tensors_elsewhere(row, backend):
    args, leaves = problem(row)
    results = outputs(row(*args))
    keep = [y.requires_grad for y in results]
    total = scalar(results, keep)
    again = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
    want = gradients(total, leaves)
    for g, w in zip(again, want):
        assert g is None or torch.equal(g, w)

    args, leaves = problem(row)
    with torch.autograd.graph.save_on_cpu():
        total = scalar(outputs(row(*args)), keep)
    for g, w in zip(gradients(total, leaves), want):
        assert_same_bits(g, w, f"{row.name} with its saved tensors moved away and back")

    args, leaves = problem(row)
    total = scalar(checkpoint(lambda *x: outputs(row(*x)), *args, use_reentrant=False), keep)
    for g, w in zip(gradients(total, leaves), want):
        assert_same_bits(g, w, f"{row.name} recomputed")


@pytest.mark.parametrize("row", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_forward_mode_in_every_argument(row, backend):
    """A custom op's tangent is zero without a word, unless somebody has seen to it. Central differences of the float64
    reference: off by their own 1e-10 of third derivatives, and by 2^-52 / 1e-5."""
    args, leaves = problem(row)
    args = copies(args)
    for slot in leaves:
        direction = torch.linspace(-1, 1, get(args, slot).numel()).reshape(get(args, slot).shape).sin()

        def moved(step, slot=slot, direction=direction):
            wide = exact(args)
            put(wide, slot, get(wide, slot) + step * direction.double())
            return outputs(row.reference(*wide))

        want = [(up - down) / 2e-5 for up, down in zip(moved(1e-5), moved(-1e-5))]
        with forward_ad.dual_level():
            dual = copies(args)
            put(dual, slot, forward_ad.make_dual(get(dual, slot), direction))
            tangents = [forward_ad.unpack_dual(y).tangent for y in outputs(row(*dual))]
        tangents = [torch.zeros_like(w) if t is None else t for t, w in zip(tangents, want)]
        assert_right(tangents, want, f"tangent of {row.name} along {row.argument_names[slot[0]]}")


def test_a_change_by_adamw_ema_is_seen_by_autograd():
    """Tensors changed in place by an op count their versions, so that a stale graph is an error."""
    p = torch.nn.Parameter(torch.ones(5))
    total = (p * p).sum()
    state = [torch.zeros(5), torch.zeros(5)]
    with torch.no_grad():
        ROWS["adamw_ema"](torch.tensor([0.1, 1.0, 0.9], dtype=torch.float64), [p], [torch.ones(5)], [state[0]],
                          [state[1]], [], [], 0.9, 0.999, 1e-8, 0.0, None)  # fmt: skip
    assert p._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("row", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_inference_tensors_parameters_subclasses_and_deterministic_mode(row, backend):
    want = outputs(row(*arguments_of(row, row.cases[0])))
    with torch.inference_mode():
        made_there = arguments_of(row, row.cases[0])
    for y, w in zip(outputs(row(*made_there)), want):
        assert_same_bits(y, w, "inference tensors")

    class Named(torch.Tensor):
        pass

    args = copies(arguments_of(row, row.cases[0]))
    for slot in slots(args):
        put(args, slot, get(args, slot).as_subclass(Named))
    for y, w in zip(outputs(row(*args)), want):
        assert_same_bits(y.as_subclass(torch.Tensor), w, "a subclass")
    torch.use_deterministic_algorithms(True)
    try:
        args, leaves = problem(row)
        results = outputs(row(*args))
        gradients(scalar(results, [y.requires_grad for y in results]), leaves)
        for y, w in zip(results, want):
            assert_same_bits(y, w, "deterministic")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("row", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_backward_of_an_empty_batch(row, backend):
    case = {**row.cases[0], "shape": (0, *row.cases[0]["shape"][1:])}
    args, leaves = copies(arguments_of(row, case)), {}
    for slot in slots(args):
        if get(args, slot).is_floating_point() and row.argument_names[slot[0]] not in row.not_differentiable:
            leaves[slot] = get(args, slot).requires_grad_()
    results = outputs(row(*args))
    for g, x in zip(gradients(scalar(results, [y.requires_grad for y in results]), leaves), leaves.values()):
        assert g.shape == x.shape
        assert not g.any(), "a sum over no samples is 0, not what the memory held"

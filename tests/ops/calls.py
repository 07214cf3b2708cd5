"""Any call of any row, drawn by hypothesis: good arguments with some things changed, and what may come of it.

The rule, the same for every row: a call gives the right answer or raises one sentence. Nothing else is allowed, a
changed input and a silent broadcast least of all.
"""

import math
import re
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from compare import assert_close
from hypothesis import assume
from hypothesis import strategies as st
from layouts import LAYOUTS, relayout
from row_cases import map_tensors, outputs

from lfm_fast import ops
from lfm_fast.ops._registry import Op

SIZES = (0, 1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 31, 33, 64, 65, 127, 129, 255, 256, 257, 1021, 4095, 4096, 4097, 8193)
MOST_ELEMENTS = 20_000
HUGE = 2**63
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
# what a caller may pass by mistake; no number that would make a right call enormous
OBJECTS = (
    None, "1", 0, 1, -1, 2.5, -0.5, math.nan, math.inf, True, 1j, HUGE, -(2**70), 10**400, [], [1], (), [None],
    object(), torch.float32, np.ones(3, dtype=np.float32), torch.Size([3]), torch.zeros(3).to_sparse(), torch.tensor(1),
)  # fmt: skip
SHAPE_CHANGES = {
    "first row": lambda x: x[:1],
    "one row less": lambda x: x[1:],
    "one column": lambda x: x[..., :1],
    "one column less": lambda x: x[..., 1:],
    "another dimension": lambda x: x.unsqueeze(0),
    "a dimension of 1 behind": lambda x: x.unsqueeze(-1),
    "flat": lambda x: x.flatten(),
    "twice": lambda x: torch.cat((x, x)),
    "transposed": lambda x: x.transpose(0, -1),
    "empty": lambda x: x.new_empty(0),
    "scalar": lambda x: x.new_ones(()),
}


@dataclass
class Call:
    row: Op
    args: list
    changes: list[str] = field(default_factory=list)
    must_refuse: bool = False
    backend: str | None = None

    def __str__(self):
        parts = [f"{name}={described(value)}" for name, value in zip(self.row.argument_names, self.args)]
        return f"{self.row.name}({', '.join(parts)}) [{'; '.join(self.changes)}] on {self.backend or 'its default'}"


def described(value):
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        strides = "" if value.is_contiguous() else f" strides {value.stride()}"
        grad = " grad" if value.requires_grad else ""
        return f"<{str(value.dtype)[6:]} {tuple(value.shape)}{strides} {value.device}{grad}>"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(described(x) for x in value) + "]"
    return repr(value)[:80]


def slots(args):
    """Places of all tensors: (argument, None), or (argument, position in its list)."""
    found = []
    for i, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            found.append((i, None))
        elif isinstance(value, list):
            found += [(i, k) for k, x in enumerate(value) if isinstance(x, torch.Tensor)]
    return found


def get(args, slot):
    return args[slot[0]] if slot[1] is None else args[slot[0]][slot[1]]


def put(args, slot, value):
    if slot[1] is None:
        args[slot[0]] = value
    else:
        args[slot[0]] = [value if k == slot[1] else x for k, x in enumerate(args[slot[0]])]


def usable_backends(row):
    """None (the row's default), and every backend that can run here by name."""
    named = [b.name for b in row.backends if "cpu" in b.devices and b.available() is None]
    return [None, "reference", *(n for n in named if n != "triton")]


def sizes_of(case):
    shapes = [s for s in case.values() if isinstance(s, tuple) and all(type(n) is int for n in s)]
    return max([0, *(math.prod(max(n, 1) for n in s) for s in shapes)])


def draw_base(draw, row):
    """A case of the row at another size. Its builder may know no such size: then there is no such call."""
    case = dict(draw(st.sampled_from([c for c in row.cases if sizes_of(c) <= MOST_ELEMENTS])))
    for key, shape in case.items():
        if isinstance(shape, tuple) and shape and all(isinstance(n, int) for n in shape) and draw(st.booleans()):
            shape = tuple(draw(st.sampled_from(SIZES)) if draw(st.booleans()) else n for n in shape)
            case[key] = shape
    assume(sizes_of(case) <= MOST_ELEMENTS)
    try:
        args = list(row.bind(**row.arguments(**case)))
        work = row.cost(*args)[1]
    except Exception:  # whatever a test helper raises on sizes it was not written for
        assume(False)
    assume(sum(get(args, slot).numel() for slot in slots(args)) <= 12 * MOST_ELEMENTS)
    assume(work <= 1000 * MOST_ELEMENTS)  # attention's grows with the square of the tokens
    return args


def is_good(row, args):
    try:
        row.check(*args)
    except ValueError:
        return False
    return True


def draw_call(draw, row):
    call = Call(row, draw_base(draw, row), backend=draw(st.sampled_from(usable_backends(row))))
    good = is_good(row, call.args)
    for slot in slots(call.args):
        if draw(st.integers(0, max(2, len(slots(call.args)) - 1))) == 0:
            kind = draw(st.sampled_from(sorted(LAYOUTS)))
            put(call.args, slot, relayout(get(call.args, slot), kind, draw(st.integers(0, 5))))
            call.changes.append(f"{row.argument_names[slot[0]]} {kind}")
    what = draw(st.sampled_from(["nothing", "nothing", *sorted(CHANGES)]))
    if what != "nothing":
        CHANGES[what](draw, call, good)
    for slot in slots(call.args):
        x = get(call.args, slot)
        refused = row.argument_names[slot[0]] in row.not_differentiable
        if x.dtype.is_floating_point and draw(st.integers(0, 19 if refused else 3 + 8 * len(row.mutates))) == 0:
            put(call.args, slot, x.detach().requires_grad_())
    return call


def _draw_slot(draw, call):
    slot = draw(st.sampled_from(slots(call.args)))
    return slot, get(call.args, slot), call.row.argument_names[slot[0]]


def change_shape(draw, call, good):
    """A tensor beside others that fitted: any other shape of it must be refused, or it was broadcast."""
    slot, x, name = _draw_slot(draw, call)
    change = draw(st.sampled_from(sorted(SHAPE_CHANGES)))
    try:
        changed = SHAPE_CHANGES[change](x)
    except (IndexError, RuntimeError):
        assume(False)
    call.changes.append(f"{name}: {change}")
    call.must_refuse = good and changed.shape != x.shape and slot[0] > 0
    put(call.args, slot, changed)


def change_dtype(draw, call, good):
    slot, x, name = _draw_slot(draw, call)
    dtype = draw(st.sampled_from(DTYPES))
    call.changes.append(f"{name} as {dtype}")
    put(call.args, slot, x.to(dtype))


def change_object(draw, call, good):
    position = draw(st.integers(0, len(call.args) - 1))
    value = draw(st.sampled_from(OBJECTS))
    # as a number of a 16-bit computation it is beyond the dtype: no mistake, and no finite answer
    assume(value is not HUGE or isinstance(call.args[position], int))
    call.changes.append(f"{call.row.argument_names[position]} is {described(value)}")
    if isinstance(call.args[position], list) and call.args[position] and draw(st.booleans()):
        call.args[position] = [value, *call.args[position][1:]]
    else:
        call.args[position] = value


def change_device(draw, call, good):
    slot, x, name = _draw_slot(draw, call)
    assume(len(slots(call.args)) > 1)
    call.changes.append(f"{name} alone on meta")
    call.must_refuse = True
    put(call.args, slot, x.to("meta"))


def change_to_meta(draw, call, good):
    call.changes.append("all on meta")
    call.backend = None
    call.args = list(map_tensors(lambda x: x.to("meta"), call.args))


def change_swap(draw, call, good):
    """An argument of another call of the same row."""
    other = draw_base(draw, call.row)
    position = draw(st.integers(0, len(call.args) - 1))
    call.changes.append(f"{call.row.argument_names[position]} of another call")
    call.args[position] = other[position]


def change_to_another(draw, call, good):
    """The same tensor twice, or an equal view of it: allowed where both are read, never where one is written."""
    first, x, name = _draw_slot(draw, call)
    alike = [s for s in slots(call.args) if (get(call.args, s).shape, get(call.args, s).dtype) == (x.shape, x.dtype)]
    second = draw(st.sampled_from(alike))
    assume(first != second)
    call.changes.append(f"{call.row.argument_names[second[0]]} is {name}")
    put(call.args, second, x if draw(st.booleans()) else x.view(x.shape))


CHANGES = {
    "alias": change_to_another, "shape": change_shape, "dtype": change_dtype, "object": change_object,
    "device": change_device, "meta": change_to_meta, "swap": change_swap,
}  # fmt: skip


def assert_one_sentence(error):
    text = str(error)
    assert type(error) in (ValueError, RuntimeError), f"{type(error).__name__}: {text}"
    assert text.endswith("."), f"no sentence: {text!r}"
    assert "\n" not in text, f"not one sentence: {text!r}"
    assert not re.search(r"\.\s+[A-Z]", text), f"more than one sentence: {text!r}"


def storages(args):
    """The bytes of every tensor's whole storage, what lies between its elements included."""
    found = {}
    for slot in slots(args):
        x = get(args, slot)
        if x.layout is torch.strided and not x.is_meta:
            found[slot] = torch.tensor([], dtype=torch.uint8).set_(x.untyped_storage()).clone()
    return found


def mapped(function, args):
    """Apply to every dense tensor among the arguments and their lists; all else is left as it is."""

    def apply(x):
        if isinstance(x, list):
            return [apply(y) for y in x]
        return function(x) if isinstance(x, torch.Tensor) and x.layout is torch.strided else x

    return [apply(x) for x in args]


def copies(args):
    return mapped(lambda x: x.detach().clone(), args)


def exact(args):
    """Copies in float64."""
    return mapped(lambda x: (x.double() if x.is_floating_point() else x).detach().clone(), args)


def mutable(row, slot):
    return row.argument_names[slot[0]] in row.mutates


def wants_gradient(call):
    return any(get(call.args, slot).requires_grad for slot in slots(call.args))


def run(call, function):
    """Call `function(*args)`: (its result, None), or (None, the error) where it refused. Anything else is asserted."""
    before, private = storages(call.args), copies(call.args)
    error = got = None
    try:
        with ops.use_backend(call.backend) if call.backend else nullcontext():
            got = function(*call.args)
    except (ValueError, RuntimeError, TypeError) as caught:
        error = caught
    after = storages(call.args)
    for slot, old in before.items():
        if error is not None or not mutable(call.row, slot):
            assert torch.equal(old, after[slot]), f"{call.row.argument_names[slot[0]]} was written to: {call}"
    if error is not None:
        return None, error
    assert not call.must_refuse, f"accepted, but had to be refused: {call}"
    assert_right(call, got, private)
    return got, None


def assert_right(call, got, private):
    """The result, and what the op wrote in place, are the reference's in float64; no result is an input's memory."""
    row = call.row
    for slot in slots(call.args):
        x = get(call.args, slot)
        assert x.layout is torch.strided, f"accepted {row.argument_names[slot[0]]}: {call}"
        assert not x.is_complex(), f"accepted {row.argument_names[slot[0]]}: {call}"
    if any(get(call.args, slot).is_meta for slot in slots(call.args)):
        assert all(y.is_meta for y in outputs(got)), f"results not on meta: {call}"
        return

    def reference(args):
        results = list(outputs(row.reference(*args)))[: len(outputs(got))]
        return results + [get(args, slot) for slot in slots(args) if mutable(row, slot)]

    computed = list(outputs(got)) + [get(call.args, slot) for slot in slots(call.args) if mutable(row, slot)]
    bounds = {"absolute": row.tolerance.absolute, "relative": max(row.tolerance.relative, 1e-6)}
    assert_close_to(computed, reference, private, bounds, str(call))
    inputs = {get(call.args, slot).untyped_storage().data_ptr() for slot in slots(call.args)} - {0}
    for y in outputs(got):
        assert y.untyped_storage().data_ptr() not in inputs, f"a result shares memory with an argument: {call}"


def assert_close_to(computed, function, args, bounds, what):
    """computed against function(args in float64), within the bounds or within what the formula's conditioning costs."""
    want = function(exact(args))
    slack = None
    for k, (g, w) in enumerate(zip(computed, want)):
        try:
            assert_close(g, w, what=f"result {k} of {what}", **bounds)
        except AssertionError:
            slack = sensitivities(function, args, want) if slack is None else slack
            assert_close(
                g, w, absolute=bounds["absolute"] + slack[k], relative=bounds["relative"], what=f"{k} of {what}"
            )


# What rounding inside an op amounts to, as a relative move of its arguments: some operations in float32, and one
# rounding to the 16 bits of an argument that an op stores and reads again (gated_residual_norm's x_new).
MOVES = {torch.float64: 2.0**-20, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def sensitivities(function, args, want):
    """By how much each result moves when every float argument moves by a few of the roundings it may meet.

    A right computation may be off by this where a formula is ill-conditioned (a row without variance, say); a wrong
    one is off by more.
    """
    worst = [0.0] * len(want)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def moved(x, generator=generator):
            steps = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
            return x.double() * (1 + steps * MOVES.get(x.dtype, 0.0)) if x.is_floating_point() else x.clone()

        for k, (near, w) in enumerate(zip(function(mapped(moved, args)), want)):
            difference = (near.detach().double() - w.detach().double()).abs().nan_to_num(nan=0.0, posinf=0.0)
            worst[k] = max(worst[k], difference.max().item() if difference.numel() else 0.0)
    return worst


def assert_right_gradients(call, got):
    """Of every float argument that requires one: autograd's through the reference in float64, or a sentence."""
    row = call.row
    wanted = [slot for slot in slots(call.args) if get(call.args, slot).requires_grad]
    chosen = [k for k, y in enumerate(outputs(got)) if y.requires_grad]

    def factors(y):
        values = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).reshape(y.shape)
        return values.to(y.dtype)

    try:
        computed = torch.autograd.grad(
            [outputs(got)[k] for k in chosen],
            [get(call.args, slot) for slot in wanted],
            [factors(outputs(got)[k]) for k in chosen],
            allow_unused=True,
        )
    except (ValueError, RuntimeError) as error:
        return assert_one_sentence(error)

    def reference(args):
        for slot in wanted:
            put(args, slot, get(args, slot).detach().requires_grad_())
        results = [outputs(row.reference(*args))[k] for k in chosen]
        alive = [(y, factors(outputs(got)[k]).double()) for y, k in zip(results, chosen) if y.requires_grad]
        gradients = torch.autograd.grad(
            [y for y, _ in alive], [get(args, slot) for slot in wanted], [g for _, g in alive], allow_unused=True
        )
        return [torch.zeros_like(get(args, s)) if g is None else g for s, g in zip(wanted, gradients)]

    leaves = [get(call.args, slot) for slot in wanted]
    computed = [torch.zeros_like(x) if g is None else g for g, x in zip(computed, leaves)]
    for g, x in zip(computed, leaves):
        assert (g.shape, g.dtype) == (x.shape, x.dtype), f"a gradient of another shape or dtype: {call}"
    biggest = max([1.0, *(w.abs().max().item() for w in reference(exact(call.args)) if w.numel())])
    lowest = max(torch.finfo(x.dtype).eps for x in [*leaves, *(outputs(got)[k] for k in chosen)])
    # sums of up to MOST_ELEMENTS terms in float32, or factors rounded to the 16 bits in which a gradient is kept
    bounds = {"absolute": biggest * max(2e-5, 4 * lowest if lowest > 1e-6 else 0.0), "relative": 1e-5}
    return assert_close_to(computed, reference, call.args, bounds, f"gradients of {call}")

"""Every row, on every backend, over its own cases: against float64, sample by sample, with NaN, by opcheck."""

import math

import pytest
import torch
from compare import assert_close, assert_same_bits
from row_cases import (
    ROWS,
    all_cases,
    alone,
    arguments_of,
    first_cases,
    has_samples,
    in_float64,
    map_tensors,
    outputs,
    per_sample_results,
    result_names,
    results,
)


def assert_row_close(row, args, got, want, what=""):
    tolerance = row.tolerance
    for name, g, w in zip(result_names(row, args), got, want, strict=True):
        label = f"{row.name}.{name} {what}"
        low = tolerance.low if g.element_size() == 2 else 0.0
        assert_close(g, w, absolute=tolerance.absolute + low, relative=tolerance.relative, what=label)


@pytest.mark.parametrize(("row", "case"), all_cases())
def test_result_is_that_of_float64(row, case, backend):
    args = arguments_of(row, case)
    got, want = results(row, args), results(row, in_float64(args), row.reference)
    assert_row_close(row, args, got, want, f"on {backend}")
    for g in outputs(row(*args)):
        assert (
            row.name in OWN_LAYOUT
            or g.is_contiguous()
            or (row.name in KEEP_CHANNELS_LAST and is_channels_last(g) and is_channels_last(args[0]))
        )


OWN_LAYOUT = ("attention", "self_attention", "attention_with_lse", "linear", "mlp")  # the backend's
KEEP_CHANNELS_LAST = ("group_norm_silu", "group_norm_silu_backward")


def is_channels_last(x):
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("row", "case"), first_cases(has_samples))
def test_a_sample_does_not_depend_on_its_neighbours(row, case, backend):
    """Each sample alone gives what it gives in the batch: one sample's conditioning never serves another."""
    args = arguments_of(row, case)
    assert args[0].shape[0] == 3
    singles = [outputs(row(*alone(row, args, i))) for i in range(3)]
    names = result_names(row, args)
    for name, together, *parts in zip(names, outputs(row(*args)), *singles):
        expected = sum(parts) if name in row.shared else torch.cat(parts)
        tolerance = row.tolerance
        what = f"{row.name}.{name} of the samples alone"
        assert_close(together, expected, absolute=tolerance.absolute, relative=tolerance.relative, what=what)
    for i in range(3):
        alike = torch.allclose(singles[i][0], singles[(i + 1) % 3][0])
        assert not alike, "the samples of this case are alike: it shows nothing"


@pytest.mark.parametrize(("row", "case"), first_cases(has_samples))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_number_stays_in_its_sample(row, case, value, backend):
    args = arguments_of(row, case)
    floats = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    clean = per_sample_results(row, outputs(row(*args)))
    for position in floats:
        name = row.argument_names[position]
        if name in row.shared:
            continue
        spoilt = args[position].clone()
        spoilt.select(1 if name == "coefficients" else 0, 1).view(-1)[-1:].fill_(value)
        spoilt_args = (*args[:position], spoilt, *args[position + 1 :])
        spoilt_results = outputs(row(*spoilt_args))
        dirty = per_sample_results(row, spoilt_results)
        for g, w in zip(dirty, clean):
            assert_same_bits(g[::2], w[::2], f"{row.name}: samples 0 and 2 beside {name} = {value} in sample 1")
        sums = [x for x, r in zip(spoilt_results, row.overload._schema.returns) if r.name in row.shared]
        assert not all(g.isfinite().all() for g in (*(g[1] for g in dirty), *sums)), f"{value} in {name} vanished"
        want = outputs(row.reference(*in_float64(spoilt_args)))
        assert_row_close(row, args, spoilt_results, want, f"with {name} = {value}")


@pytest.mark.parametrize(("row", "case"), all_cases())
def test_inputs_are_left_alone(row, case, backend):
    args = arguments_of(row, case)
    before = map_tensors(torch.clone, args)
    row(*args)
    for name, a, b in zip(row.argument_names, args, before):
        if name in row.mutates:
            continue
        for x, y in zip(a if isinstance(a, list) else [a], b if isinstance(b, list) else [b]):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y)


def requiring_gradients(row, args):
    plain = {*(row.argument_names if row.mutates else row.not_differentiable)}
    for name, value in zip(row.argument_names, args):
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and name not in plain:
                x.requires_grad_()
    return args


@pytest.mark.parametrize(("row", "case"), all_cases())
def test_opcheck(row, case):
    """PyTorch's own check of schema, fake kernel and autograd registration."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(row.overload, requiring_gradients(row, arguments_of(row, case)), test_utils=checks)


@pytest.mark.parametrize(("row", "case"), first_cases())
def test_opcheck_with_dynamic_shapes(row, case):
    """The rest of opcheck: traced with symbolic shapes, forward and backward, against eager."""
    torch.library.opcheck(row.overload, requiring_gradients(row, arguments_of(row, case)))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_cost_counts_at_least_the_output(row):
    for size in row.sizes:
        small = {**size, "shape": (2, *size["shape"][1:])} if "shape" in size else row.cases[0]
        args = arguments_of(row, small)
        moved, flops = row.cost(*args)
        first = results(row, args)[0]
        assert moved >= first.numel() * first.element_size()
        assert flops >= first.numel()

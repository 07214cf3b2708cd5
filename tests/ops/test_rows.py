"""Every row, on every backend, over its own cases: against float64, sample by sample, with NaN, by opcheck."""

import math

import pytest
import torch
from compare import assert_close, assert_same_bits
from row_cases import ROWS, all_cases, alone, arguments_of, first_cases, in_float64, map_tensors, outputs


def assert_row_close(row, got, want, what=""):
    names = [r.name or "result" for r in row.overload._schema.returns]
    tolerance = row.tolerance
    for name, g, w in zip(names, outputs(got), outputs(want)):
        label = f"{row.name}.{name} {what}"
        assert_close(g, w, absolute=tolerance.absolute, relative=tolerance.relative, what=label)


@pytest.mark.parametrize(("row", "case"), all_cases())
def test_result_is_that_of_float64(row, case, backend):
    args = arguments_of(row, case)
    got, want = row(*args), row.reference(*in_float64(args))
    assert_row_close(row, got, want, f"on {backend}")
    for g in outputs(got):
        assert g.is_contiguous()


@pytest.mark.parametrize(("row", "case"), first_cases())
def test_a_sample_does_not_depend_on_its_neighbours(row, case, backend):
    """Each sample alone gives what it gives in the batch: one sample's conditioning never serves another."""
    args = arguments_of(row, case)
    batch = args[0].shape[0]
    assert batch == 3
    together = outputs(row(*args))
    for i in range(batch):
        single = row(*alone(args, batch, i))
        assert_row_close(row, single, tuple(x[i : i + 1] for x in together), f"of sample {i} alone")
        others = outputs(row(*alone(args, batch, (i + 1) % batch)))
        assert not torch.allclose(outputs(single)[0], others[0]), "the samples of this case are alike: it shows nothing"


@pytest.mark.parametrize(("row", "case"), first_cases())
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_number_stays_in_its_sample(row, case, value, backend):
    args = arguments_of(row, case)
    floats = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    clean = outputs(row(*args))
    for position in floats:
        name = row.argument_names[position]
        spoilt = args[position].clone()
        spoilt.select(1 if name == "coefficients" else 0, 1).view(-1)[-1:].fill_(value)
        spoilt_args = (*args[:position], spoilt, *args[position + 1 :])
        dirty = outputs(row(*spoilt_args))
        for g, w in zip(dirty, clean):
            assert_same_bits(g[::2], w[::2], f"{row.name}: samples 0 and 2 beside {name} = {value} in sample 1")
        assert not all(g[1].isfinite().all() for g in dirty), f"{value} in {name} vanished"
        assert_row_close(row, dirty, row.reference(*in_float64(spoilt_args)), f"with {name} = {value}")


@pytest.mark.parametrize(("row", "case"), all_cases())
def test_inputs_are_left_alone(row, case, backend):
    args = arguments_of(row, case)
    before = map_tensors(torch.clone, args)
    row(*args)
    for a, b in zip(args, before):
        for x, y in zip(a if isinstance(a, list) else [a], b if isinstance(b, list) else [b]):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y)


def requiring_gradients(row, args):
    plain = {*row.not_differentiable}
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
        small = {**size, "shape": (2, *size["shape"][1:])}
        args = arguments_of(row, small)
        moved, flops = row.cost(*args)
        first = outputs(row(*args))[0]
        assert moved >= first.numel() * first.element_size()
        assert flops >= first.numel()

"""The rows' own cases as test parameters, and what the tests of all rows share."""

import re

import pytest
import torch

from lfm_fast import ops  # noqa: F401  (its import registers the rows)
from lfm_fast.ops import _registry

ROWS = _registry.rows()


def case_name(name, case):
    words = [key if value is True else str(value).removeprefix("torch.") for key, value in case.items() if value]
    return "-".join([name, *words]).replace(" ", "")


def all_cases(keep=lambda case: True):
    return [
        pytest.param(row, case, id=case_name(row.name, case))
        for row in ROWS.values()
        for case in row.cases
        if keep(case)
    ]


def first_cases(keep=lambda row: True):
    """One case of each row, with three samples whose conditioning differs."""
    return [pytest.param(row, row.cases[0], id=row.name) for row in ROWS.values() if keep(row)]


def has_samples(row):
    """Rows that change lists of tensors in place know no samples; their own tests hold the tensors apart."""
    return not row.mutates


def arguments_of(row, case, **changes):
    """On the default device, which the fixture `backend` sets."""
    device = torch.get_default_device()
    return row.bind(**{**row.arguments(**({} if device.type == "cpu" else {"device": device}), **case), **changes})


def outputs(result):
    if result is None:
        return ()
    return result if isinstance(result, tuple) else (result,)


def results(row, args, function=None):
    """What a call gives: its results, or for a row that changes its arguments, copies of those as it leaves them."""
    if not row.mutates:
        return outputs((function or row)(*args))
    args = map_tensors(torch.clone, args)
    assert (function or row)(*args) is None
    return tuple(x for name in row.mutates for x in args[row.argument_names.index(name)])


def result_names(row, args):
    if not row.mutates:
        return [r.name or "result" for r in row.overload._schema.returns]
    return [f"{name}[{i}]" for name in row.mutates for i in range(len(args[row.argument_names.index(name)]))]


def per_sample_results(row, found):
    """Those that have a batch dimension: all but sums over the samples."""
    return tuple(x for x, r in zip(found, row.overload._schema.returns) if r.name not in row.shared)


def map_tensors(function, args):
    """Apply to every tensor among the arguments, lists of tensors included."""
    return tuple(
        [function(x) for x in a] if isinstance(a, list) else function(a) if isinstance(a, torch.Tensor) else a
        for a in args
    )


def in_float64(args):
    return map_tensors(lambda x: x.double() if x.is_floating_point() else x, args)


def alone(row, args, i):
    """The arguments of sample i by itself."""
    batch = args[0].shape[0]

    def cut(x):
        return x[i : i + 1] if x.shape[0] == batch else x[:, i : i + 1]

    return tuple(a if name in row.shared else map_tensors(cut, (a,))[0] for name, a in zip(row.argument_names, args))


def signature_lines(text):
    """{kernel: types} of what a library says of itself."""
    return dict(re.match(r"(\w+)(\(.*)", line).groups() for line in text.splitlines() if line)

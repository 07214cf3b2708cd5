"""The rows' own cases as test parameters, and what the tests of all rows share."""

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


def first_cases():
    """One case of each row, with three samples whose conditioning differs."""
    return [pytest.param(row, row.cases[0], id=row.name) for row in ROWS.values()]


def arguments_of(row, case, **changes):
    return row.bind(**{**row.arguments(**case), **changes})


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def map_tensors(function, args):
    """Apply to every tensor among the arguments, lists of tensors included."""
    return tuple(
        [function(x) for x in a] if isinstance(a, list) else function(a) if isinstance(a, torch.Tensor) else a
        for a in args
    )


def in_float64(args):
    return map_tensors(lambda x: x.double() if x.is_floating_point() else x, args)


def alone(args, batch, i):
    """The arguments of sample i by itself."""
    return map_tensors(lambda x: x[i : i + 1] if x.shape[0] == batch else x[:, i : i + 1], args)

"""The ops of the table at their own sizes: reference path, torch.compile of the reference, fast path."""

import pytest

from benchmarks.measure import COMPILED, compare
from benchmarks.settings import QUICK, seconds_for
from benchmarks.workloads import OpWorkload
from lfm_fast.ops import _registry

COMPILED_IN_QUICK_MODE = "velocity_loss"


def sizes():
    """Each row at its sizes; in quick mode at the first of them."""
    return [
        pytest.param(row.name, size, id=_title(row.name, size))
        for row in _registry.rows().values()
        for size in (row.sizes[:1] if QUICK else row.sizes)
    ]


def _title(name, size):
    words = [key if value is True else str(value).removeprefix("torch.") for key, value in size.items() if value]
    return "-".join([name, *words]).replace(" ", "")


@pytest.mark.benchmark(group="ops")
@pytest.mark.parametrize(("row", "size"), sizes())
def test_op(benchmark, request, row, size):
    specification = ("op", {"row": row, "size": size})
    compiled = "quick mode" if QUICK and row != COMPILED_IN_QUICK_MODE else (COMPILED,)
    compare(
        benchmark,
        request.node.callspec.id,
        OpWorkload(row, size),
        seconds=seconds_for(full=3.0, quick=1.0),
        specification=specification,
        compiled=compiled,
    )

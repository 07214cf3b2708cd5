"""Group `ops`: the ops of the table at their own sizes, alone and with their gradients, and the optimizer's pass."""

import pytest

from benchmarks.catalogue import build
from benchmarks.measure import compare
from benchmarks.names import COMPILED
from benchmarks.settings import FULL, MODE, QUICK, seconds_for
from lfm_fast import ops
from lfm_fast.ops import _registry

# what others call, and their gradients; the rows inside them are timed with them
ROWS = {name: row for name, row in _registry.rows().items() if hasattr(ops, name.removesuffix("_backward"))}
COMPILED_IN_QUICK_MODE = "velocity_loss"


def cases(rows):
    """Each row at its sizes; in standard mode at the last of them, in quick mode at the first."""
    return [
        pytest.param(row.name, size, id=_title(row.name, size))
        for row in rows
        for size in (row.sizes if FULL else row.sizes[:1] if QUICK else row.sizes[-1:])
    ]


def is_backward(row):
    return row.name.endswith("_backward")


def has_backward(row):
    """A gradient of its own, and one that training takes."""
    return row.composite or f"{row.name}_backward" in ROWS


def _title(name, size):
    words = [key if value is True else str(value).removeprefix("torch.") for key, value in size.items() if value]
    return "-".join([name, *words]).replace(" ", "")


def run(benchmark, request, kind, row, size, seconds, words=""):
    specification = (kind, {"row": row, "size": size})
    compare(
        benchmark,
        request.node.callspec.id + words,
        build(specification),
        seconds=seconds_for(full=seconds, quick=1.0),
        specification=specification,
        compiled="quick mode" if QUICK and row != COMPILED_IN_QUICK_MODE else (COMPILED,),
    )


@pytest.mark.benchmark(group="ops")
@pytest.mark.parametrize(
    ("row", "size"), cases(row for row in ROWS.values() if not row.mutates and not is_backward(row))
)
def test_op(benchmark, request, row, size):
    run(benchmark, request, "op", row, size, 3.0)


@pytest.mark.benchmark(group="ops")
@pytest.mark.parametrize(("row", "size"), cases(row for row in ROWS.values() if has_backward(row)))
def test_op_and_gradient(benchmark, request, row, size):
    run(benchmark, request, "op and gradient", row, size, 4.0, " with gradients")


@pytest.mark.benchmark(group="ops")
@pytest.mark.parametrize("network", ["DiT-S/2", "DiT-B/2"] if FULL else ["DiT-Emoji/2"] if QUICK else ["DiT-S/2"])
def test_optimizer_step(benchmark, network):
    specification = ("optimizer", {"network": network})
    compare(
        benchmark,
        f"AdamW and EMA, {network}",
        build(specification),
        seconds=seconds_for(full=10.0, quick=1.0),
        specification=specification,
        compiled=(COMPILED,) if FULL else f"{MODE} mode: it compiles for most of a minute",
    )

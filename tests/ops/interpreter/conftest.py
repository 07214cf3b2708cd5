"""The rows' own tests once more, on the Triton kernels in Triton's interpreter.

Triton asks for TRITON_INTERPRET when a kernel is defined, its own library's included, so these tests run in a process
of their own: test_triton.py starts it. By hand: TRITON_INTERPRET=1 python -m pytest tests/ops/interpreter
"""

import numpy as np
import pytest
import torch

from lfm_fast import ops
from lfm_fast.ops._triton import interpreting

if interpreting():
    from triton.runtime import interpreter
else:
    collect_ignore_glob = ["test_*.py"]


def served(row, case):
    """Whether the row has a Triton backend that takes this case."""
    backend = next((b for b in row.backends if b.name == "triton"), None)
    return backend is not None and backend.refusal(row.bind(**row.arguments(**case)), forced=True) is None


def pytest_collection_modifyitems(items):
    """Without the rows and cases that Triton does not serve; test_only_float64_is_refused counts those."""
    here = [item for item in items if "interpreter" in item.path.parts]
    for item in here:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if "row" in values and "case" in values and not served(values["row"], values["case"]):
            items.remove(item)


@pytest.fixture
def backend(request):
    """The test's row must run on Triton; a test without one has all rows that can."""
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with ops.use_backend("triton", ops=values["row"].name if "row" in values else None):
        yield "triton"


def _convert(source_values, source, target, rounding=None):
    """As a GPU converts: to the nearest, ties to even. Triton 3.6's interpreter cuts the lower bits off instead."""
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    bits = {"bf16": np.int16, "fp32": np.int32}
    given = torch.from_numpy(np.ascontiguousarray(source_values).view(bits[source.name])).view(kinds[source.name])
    result = given.to(kinds[target.name]).view(torch.int16 if target.name == "bf16" else torch.int32)
    return result.numpy().view(np.uint16 if target.name == "bf16" else np.float32)


@pytest.fixture(autouse=True)
def right_rounding(monkeypatch):
    monkeypatch.setattr(interpreter, "_convert_float", _convert)

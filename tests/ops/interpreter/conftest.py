"""The rows' own tests once more, on the Triton kernels in Triton's interpreter.

Triton asks for TRITON_INTERPRET when a kernel is defined, its own library's included, so these tests run in a process
of their own: test_triton.py starts it. By hand: TRITON_INTERPRET=1 python -m pytest tests/ops/interpreter
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lfm_fast import ops
from lfm_fast.ops._triton import interpreting

if interpreting():
    from triton.runtime import interpreter

    ORIGINAL = interpreter._patch_lang_tensor
    ORIGINAL_CALL = interpreter.InterpretedFunction.__call__
else:
    collect_ignore_glob = ["test_*.py"]


def served(row, case):
    """Whether the row has a Triton backend that takes this case."""
    backend = next((b for b in row.backends if b.name == "triton"), None)
    return backend is not None and backend.refusal(row.bind(**row.arguments(**case)), forced=True) is None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Without the rows and cases that Triton does not serve (test_only_float64_is_refused says which those are); and a
    second for one case is much, so long ones are slow tests."""
    for item in [item for item in items if Path(__file__).parent in item.path.parents]:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if "row" in values and "case" in values:
            row, case = values["row"], values["case"]
            if not served(row, case) or (
                item.originalname == "test_inputs_are_left_alone" and case is not row.cases[0]
            ):
                items.remove(item)
            elif draws(row, case) > 10_000 or repeats(case):
                item.add_marker(pytest.mark.slow)
                item.add_marker(pytest.mark.fuzz)


def repeats(case):
    """A long case in half precision: there is one in float32, and a short one in half precision."""
    low = {torch.bfloat16, torch.float16} & {value for value in case.values() if isinstance(value, torch.dtype)}
    return bool(low) and math.prod(case["shape"]) > 3_000


def draws(row, case):
    """How many normals the case draws; 0 where it is given them."""
    noise = row.name in ("philox_normal", "posterior_interpolate") or case.get("noise")
    return math.prod(case["shape"]) if noise else 0


@pytest.fixture
def backend(request):
    """The test's row must run on Triton; a test without one has all rows that can."""
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with ops.use_backend("triton", ops=values["row"].name if "row" in values else None):
        yield "triton"


def _convert_float(source_values, source, target, rounding=None):
    """As a GPU converts: to the nearest, ties to even. Triton 3.6's interpreter cuts the lower bits off instead."""
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    bits = {"bf16": np.int16, "fp32": np.int32}
    given = torch.from_numpy(np.ascontiguousarray(source_values).view(bits[source.name])).view(kinds[source.name])
    result = given.to(kinds[target.name]).view(torch.int16 if target.name == "bf16" else torch.int32)
    return result.numpy().view(np.uint16 if target.name == "bf16" else np.float32)


def _patch_lang_tensor(tensor, scope):
    """A loop whose bound is a loaded or computed number: NumPy 2.4 refuses int() of an array of one element."""
    ORIGINAL(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _call(function, *args, **kwargs):
    """A kernel's helper of ours sees the language that the launch has already turned to NumPy; doing that again for
    every call, as Triton does, takes a quarter of the time."""
    ours = function.fn.__module__.startswith("lfm_fast.")
    return function.rewrite()(*args, **kwargs) if ours else ORIGINAL_CALL(function, *args, **kwargs)


@pytest.fixture(autouse=True)
def repaired_interpreter(monkeypatch):
    monkeypatch.setattr(interpreter, "_convert_float", _convert_float)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", _patch_lang_tensor)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", _call)
    # each sum was computed in 64 bits too, for an assertion that is off
    quick = interpreter.InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", quick)

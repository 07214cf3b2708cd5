"""Not one byte is read or written outside a tensor: their memory lies between forbidden pages, in a child process.

Unlike the address sanitizer's, these are the kernels as they ship, at each CPU level, and PyTorch's memory as well.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest
import torch
from calls import get, put, slots
from children import LEVELS, Journal, run_child
from layouts import relayout
from row_cases import ROWS, all_cases, arguments_of, case_name, outputs

SOURCE = Path(__file__).with_name("guarded_memory.cpp")
SANITIZED = "san" in os.environ.get("LD_PRELOAD", "")
END, START = 1, 2
# chunks at the very end of their storage, and at its very start
LAYOUTS = {END: (None, ("chunk", 2), ("stepped", 0), ("permuted", 0)), START: (None, ("chunk", 0), ("permuted", 1))}
MOST_ELEMENTS = 70_000

pytestmark = pytest.mark.skipif(SANITIZED, reason="the sanitizer has its own allocator")


@pytest.fixture(scope="module")
def guard(library, tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler for the guarded allocator")
    built = tmp_path_factory.mktemp("guard") / "guarded_memory.so"
    flags = ("-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(built), "-ldl"], check=True)
    return built


def guard_tensors(mode):
    """From now on, in a process with the guarded allocator."""
    assert ctypes.CDLL(None).lfm_guard(mode) == 0


def guarded_calls(with_cuda_sources):
    """(name, kernel, its why_not, what makes the arguments): compiled kernels, and those of the CUDA sources."""
    for row, case in (parameter.values for parameter in all_cases()):
        for backend in row.compiled:
            args = arguments_of(row, case)
            small = sum(get(args, slot).numel() for slot in slots(args)) <= MOST_ELEMENTS
            here = backend.available() is None if backend.name == "cpp" else with_cuda_sources
            if small and here and backend.why_not(*args) is None:
                kernel = row.kernels["cpp"] if backend.name == "cpp" else emulated.kernel_of(row)
                name = f"{case_name(row.name, case)} of {backend.name}"
                yield name, kernel, backend.why_not, lambda row=row, case=case: arguments_of(row, case)


def call_in(layout, make, kernel, why_not):
    """The results and all arguments afterwards, every tensor of the call in this layout; [] where it is not served."""
    args = list(make())
    for slot in slots(args) if layout else ():
        put(args, slot, relayout(get(args, slot), *layout))
    if why_not(*args) is not None:
        return []
    results = outputs(kernel(*args))
    return [x for x in (*results, *(get(args, slot) for slot in slots(args))) if isinstance(x, torch.Tensor)]


def bits(tensors):
    return [torch.empty(x.shape, dtype=x.dtype).copy_(x).view(-1).view(torch.uint8) for x in tensors]


def run_guarded(journal, with_cuda_sources):
    """What the child does. Arguments, temporaries and results lie between forbidden pages; the bits stay the same."""
    count, note = 0, Journal(journal)
    if with_cuda_sources:
        emulated.load()
    for name, kernel, why_not, make in guarded_calls(with_cuda_sources):
        for mode, layouts in LAYOUTS.items():
            for layout in layouts:
                note(f"{name} {layout}, {'end' if mode == END else 'start'} of the pages")
                guard_tensors(0)
                want = bits(call_in(layout, make, kernel, why_not))
                guard_tensors(mode)
                got = bits(call_in(layout, make, kernel, why_not))
                guard_tensors(0)
                assert all(torch.equal(g, w) for g, w in zip(got, want)), f"other bits: {name} {layout}"
                del got
                count += bool(want)
    print(count)


def run_at(level, guard, tmp_path, with_cuda_sources=False):
    journal = tmp_path / "journal.txt"
    code = (
        "from lfm_fast import _library; assert _library.load() is None\n"
        f"import test_guarded_memory as t; t.run_guarded({str(journal)!r}, {with_cuda_sources})"
    )
    return run_child(code, journal, 300, LD_PRELOAD=str(guard), LFM_FAST_CPU_LEVEL=level)


def test_nothing_outside_a_tensor_is_touched(guard, tmp_path):
    """At the level that this machine runs."""
    assert int(run_at("", guard, tmp_path)) > 10 * len(ROWS)


@pytest.mark.slow
@pytest.mark.fuzz
def test_nothing_outside_a_tensor_is_touched_by_the_cuda_sources(guard, tmp_path, request):
    request.getfixturevalue("emulated")
    run_at("", guard, tmp_path, with_cuda_sources=True)


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_outside_a_tensor_is_touched_at_any_level(level, guard, tmp_path):
    if run_at(level, guard, tmp_path) is None:
        pytest.skip(f"this machine has no {level}")


TOUCH = """
import ctypes, torch, test_guarded_memory as t
t.guard_tensors({mode})
x = torch.zeros(13, dtype=torch.{dtype})
assert torch.empty(4).isnan().all()
t.guard_tensors(0)
size = x.numel() * x.element_size()
ctypes.string_at(x.data_ptr(), size)
print("inside is allowed", flush=True)
ctypes.string_at(x.data_ptr() + ({first}), size {more})
"""


@pytest.mark.parametrize(("mode", "first", "more", "dtype"), [(END, 0, "+ 1", "bfloat16"), (START, -1, "", "float32")])
def test_one_byte_outside_ends_the_process(guard, tmp_path, mode, first, more, dtype):
    code = TOUCH.format(mode=mode, dtype=dtype, first=first, more=more)
    journal = tmp_path / "journal.txt"
    with pytest.raises(AssertionError, match=r"ended with -11 .*\n(.*\n)*.*string_at") as caught:
        run_child(code, journal, 60, LD_PRELOAD=str(guard))
    assert "inside is allowed" in str(caught.value)

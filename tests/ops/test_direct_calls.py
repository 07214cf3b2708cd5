"""torch.ops.lfm_fast.ROW and torch.ops.lfm_fast_cpp.ROW called with anything at all, with no public function in front.

The compiled kernel is the last to look at its arguments: whatever it lets pass is read. So it must be right or raise,
and a crash, which would take the test run along, happens in a child process.
"""

import os

import pytest
import torch
from calls import described, draw_call, run, slots
from calls import get as argument
from children import Journal, run_child
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from row_cases import ROWS, arguments_of

FULL = os.environ.get("LFM_FAST_SAMPLE") == "full"


def operators(row):
    """(name, operator) of the row and of each compiled backend that can run here."""
    yield "lfm_fast", getattr(torch.ops.lfm_fast, row.name)
    for backend in row.compiled:
        if "cpu" in backend.devices and backend.available() is None:
            yield f"lfm_fast_{backend.name}", getattr(torch.ops, f"lfm_fast_{backend.name}").__getattr__(row.name)


def attack_with_any_call(row, operator, note, examples, derandomize):
    @settings(max_examples=examples, deadline=None, derandomize=derandomize, database=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(data=st.data())
    def draw_them(data):
        call = draw_call(data.draw, row)
        call.backend = None
        note(f"{operator}: {call}")
        run(call, operator)

    draw_them()


def attack_with_wrong_counts(row, operator, note):
    """Too few and too many arguments, unknown names, and every argument in every other's place."""
    args = list(arguments_of(row, row.cases[0]))
    wrong = [(args[:k], {}) for k in range(len(args))] + [([*args, 1], {}), (args, {"unknown": 1}), ([], {})]
    wrong += [([*args[:i], args[j], *args[i + 1 :]], {}) for i in range(len(args)) for j in range(len(args)) if i != j]
    for positional, named in wrong:
        note(f"{operator}: {[described(x) for x in positional]} {named}")
        try:
            operator(*positional, **named)
        except (RuntimeError, ValueError, TypeError):
            continue


def attack(journal, names, examples):
    """What the child does."""
    note = Journal(journal)
    for row in (ROWS[name] for name in names):
        for _, operator in operators(row):
            attack_with_wrong_counts(row, operator, note)
            attack_with_any_call(row, operator, note, examples, not FULL)
    print("alive")


def attack_in_a_child(tmp_path, names, examples, seconds):
    journal = tmp_path / "journal.txt"
    code = f"import test_direct_calls as t; t.attack({str(journal)!r}, {list(names)!r}, {examples})"
    assert run_child(code, journal, seconds).splitlines()[-1] == "alive"


def test_the_operators_themselves_are_right_or_raise(library, tmp_path):
    attack_in_a_child(tmp_path, ROWS, 15, 300)


@pytest.mark.slow
@pytest.mark.fuzz
def test_very_many_direct_calls_are_right_or_raise(library, tmp_path):
    attack_in_a_child(tmp_path, ROWS, 2_000 if FULL else 100, 3600)


def test_a_crash_is_reported_with_its_call(tmp_path):
    journal = tmp_path / "journal.txt"
    code = f"import ctypes, children\nchildren.Journal({str(journal)!r})('the call that crashes')\nctypes.string_at(0)"
    # 1 and 66: the address and the thread sanitizer end it their own way
    with pytest.raises(AssertionError, match=r"ended with (-11|1|66) .* in the call that crashes"):
        run_child(code, journal, 60)


def test_meta_tensors_never_reach_a_compiled_kernel(library):
    for row in ROWS.values():
        args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments_of(row, row.cases[0])]
        args = [[x.to("meta") for x in a] if isinstance(a, list) else a for a in args]
        for name, operator in operators(row):
            if name != "lfm_fast" and row.like_compiled:  # graphs hold the compiled operator of such a row itself
                assert operator(*args).is_meta
            elif name != "lfm_fast":
                with pytest.raises(NotImplementedError):
                    operator(*args)
        assert all(argument(args, slot).is_meta for slot in slots(args))

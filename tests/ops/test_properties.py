"""Any call of any row gives the right answer or raises one sentence: never a crash, a broadcast, a changed input.

The calls are drawn by hypothesis (calls.py), the same ones in every default run; `slow` draws many more, different
ones each time with LFM_FAST_SAMPLE=full.
"""

import os

import pytest
import torch
from calls import assert_one_sentence, assert_right_gradients, draw_call, run, slots, wants_gradient
from calls import get as argument
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from row_cases import ROWS

from lfm_fast import ops
from lfm_fast.ops._cases import numbers
from lfm_fast.ops._checks import check_per_sample, check_state
from lfm_fast.ops._registry import Op, Tolerance

FULL = os.environ.get("LFM_FAST_SAMPLE") == "full"
HEALTHY = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)


def check_any_call(row, draw):
    call = draw_call(draw, row)
    got, error = run(call, getattr(ops, row.name, row))
    if error is not None:
        assert_one_sentence(error)
    elif wants_gradient(call) and not any(argument(call.args, slot).is_meta for slot in slots(call.args)):
        assert_right_gradients(call, got)


def many(examples, derandomize, row):
    @settings(
        max_examples=examples, deadline=None, derandomize=derandomize, database=None, suppress_health_check=HEALTHY
    )
    @given(data=st.data())
    def draw_them(data):
        check_any_call(row, data.draw)

    draw_them()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_any_call_is_right_or_refused(row):
    many(50, True, row)


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_very_many_calls_are_right_or_refused(row):
    many(2_000 if FULL else 150, not FULL, row)


def check_product(x, scale):
    check_state("x", x)
    check_per_sample("scale", scale, x.shape[:1], "x", x)
    if x.dim() != 2:
        raise ValueError("x is not (B, N).")


# A row of a test: x * scale per sample
PRODUCT = Op(
    name="product",
    schema="(Tensor x, Tensor scale) -> Tensor",
    reference=lambda x, scale: x * scale[:, None],
    check=check_product,
    backends=(),
    arguments=lambda shape: {"x": numbers(shape, 1), "scale": torch.arange(shape[0]) % 2 + 1.0},
    cases=({"shape": (3, 5)},),
    sizes=(),
    cost=lambda x, scale: (0, 0),
    tolerance=Tolerance(absolute=1e-6, relative=1e-6, origin="one rounding"),
)
PRODUCT.argument_names = ("x", "scale")


def writing_before_it_refuses(x, scale):
    if isinstance(x, torch.Tensor) and x.dtype is torch.float32 and x.numel() and not x.requires_grad:
        x.neg_()
    check_product(x, scale)
    return x * scale[:, None]


def returning_its_input(x, scale):
    return x if (scale == 1).all() else x * scale[:, None]


def broadcasting(x, scale):
    both = isinstance(x, torch.Tensor) and isinstance(scale, torch.Tensor)
    fits = both and x.dim() == 2 and scale.numel() in (1, x.shape[0])
    check_product(x, scale.reshape(-1).expand(x.shape[0]) if fits else scale)
    return x * scale.reshape(-1, 1)


FAULTS = {
    "broadcasts": (broadcasting, False, "had to be refused"),
    "serves all with sample 0": (lambda x, scale: x * scale[:1, None], True, "differ; worst at"),
    "ignores strides": (lambda x, s: x.as_strided(x.shape, (x.shape[1], 1)) * s[:, None], True, "differ; worst at"),
    "writes to its input": (lambda x, scale: x.detach().mul_(scale[:, None]).clone(), True, "x was written to"),
    "writes before it refuses": (writing_before_it_refuses, False, "x was written to"),
    "returns its input": (returning_its_input, True, "shares memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_row_is_caught(fault):
    function, checked, found = FAULTS[fault]

    def operator(x, scale):
        if checked:
            check_product(x, scale)
        return function(x, scale)

    @settings(max_examples=300, deadline=None, derandomize=True, database=None, report_multiple_bugs=False,
              phases=[Phase.generate], suppress_health_check=HEALTHY)  # fmt: skip
    @given(data=st.data())
    def draw_them(data):
        run(draw_call(data.draw, PRODUCT), operator)

    with pytest.raises(AssertionError, match=found):
        draw_them()

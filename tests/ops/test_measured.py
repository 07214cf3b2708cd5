"""The choice of attention's backend by measurement: when it is made, what is remembered, and what it obeys."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lfm_fast import ops
from lfm_fast.ops import _measured
from lfm_fast.ops._registry import row

ROW = row("attention")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("LFM_FAST_MEASURE", "always")
    monkeypatch.setattr(_measured, "_known", {})
    return tmp_path


def tensors(tokens=20, gradient=False, **case):
    return [x.requires_grad_(gradient) for x in list(ROW.arguments(shape=(2, 2, tokens, 8), **case).values())[:3]]


def table(folder):
    file = folder / "attention.json"
    return json.loads(file.read_text()) if file.exists() else {}


def no_measuring(*args):
    raise AssertionError("measured")


def test_each_kind_of_call_is_measured_once(folder, monkeypatch):
    ops.attention(*tensors())
    (key,) = table(folder)
    assert "float32, 4 heads, 32 queries, 32 keys of 8, forward" in key
    assert set(table(folder)[key]) == {"sdpa", "math"}
    ops.attention(*tensors(gradient=True))
    ops.attention(*tensors(dtype=torch.bfloat16))
    ops.attention(*tensors(tokens=40))
    assert len(table(folder)) == 4
    monkeypatch.setattr(_measured, "measure", no_measuring)
    monkeypatch.setattr(_measured, "_known", {})  # as in another process
    ops.attention(*tensors(tokens=31))
    ops.attention(*tensors(gradient=True))


@pytest.mark.parametrize("best", ["sdpa", "math"])
def test_the_fastest_runs_and_explain_says_why(folder, best):
    ops.attention(*tensors())
    (key,) = table(folder)
    other = {"sdpa": "math", "math": "sdpa"}[best]
    (folder / "attention.json").write_text(json.dumps({key: {best: 0.001, other: 0.0025}}))
    _measured._known.clear()
    explanation = ops.explain("attention", *tensors())
    assert explanation.backend == best
    assert explanation.refused[other] == f"{best} was measured to be faster, 1 ms against 2.5 ms"
    with ops.use_backend(other, ops="attention"):
        assert ops.explain("attention", *tensors()).backend == other, "a name is stronger than a measurement"


def test_on_the_cpu_nothing_is_measured_unless_asked(folder, monkeypatch):
    for setting in ("auto", "never", None):
        if setting is None:
            monkeypatch.delenv("LFM_FAST_MEASURE")
        else:
            monkeypatch.setenv("LFM_FAST_MEASURE", setting)
        ops.attention(*tensors())
        assert table(folder) == {}


def test_what_was_measured_counts_later(folder, monkeypatch):
    ops.attention(*tensors())
    (key,) = table(folder)
    (folder / "attention.json").write_text(json.dumps({key: {"math": 0.001, "sdpa": 0.0025}}))
    for setting in ("auto", "never"):
        _measured._known.clear()
        monkeypatch.setenv("LFM_FAST_MEASURE", setting)
        assert ops.explain("attention", *tensors()).backend == "math"


def test_never_while_a_graph_is_traced(folder):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: ops.attention(*x), fullgraph=True, backend="aot_eager")
    compiled(*tensors(gradient=True)).sum().backward()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        ops.attention(*(mode.from_tensor(x) for x in tensors()))
    with FlopCounterMode(display=False):
        ops.attention(*tensors())
    assert table(folder) == {}


def test_a_graph_takes_what_is_remembered(folder):
    torch._dynamo.reset()
    ops.attention(*tensors())
    (key,) = table(folder)
    for best, other in (("math", "sdpa"), ("sdpa", "math")):
        (folder / "attention.json").write_text(json.dumps({key: {best: 0.001, other: 0.0025}}))
        _measured._known.clear()
        torch._dynamo.reset()
        with torch.no_grad(), torch.profiler.profile() as profile:
            torch.compile(lambda *x: ops.attention(*x), fullgraph=True, backend="aot_eager", dynamic=True)(*tensors())
        ran = {event.key for event in profile.key_averages()}
        assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in ran) == (best == "sdpa")


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_broken_contender_is_out_with_its_reason(folder, monkeypatch, fault):
    def broken(q, k, v, scale=None):
        if fault == "raises":
            raise RuntimeError("no kernel image.\nDetails")
        return ROW.reference(q, k, v, scale) + 1.0

    monkeypatch.setitem(ROW.kernels, "sdpa", broken)
    explanation = ops.explain("attention", *tensors())
    assert explanation.backend == "math"
    said = "no kernel image" if fault == "raises" else "its result is off by 1"
    assert explanation.refused["sdpa"] == f"it failed when it was measured ({said})"


def test_gradients_flow_while_it_is_measured(folder):
    """The measurement runs on tensors of its own: no gradient of it reaches the caller's."""
    q, k, v = tensors(gradient=True)
    got = torch.autograd.grad(ops.attention(q, k, v).square().sum(), (q, k, v))
    assert len(table(folder)) == 1
    assert q.grad is None
    with ops.use_backend("reference"):
        want = torch.autograd.grad(ops.attention(q, k, v).square().sum(), (q, k, v))
    for g, w in zip(got, want):
        assert torch.allclose(g, w, atol=1e-5)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"key": 3}', '{"key": {"sdpa": []}}'])
def test_a_spoilt_table_is_made_again(folder, text):
    (folder / "attention.json").write_text(text)
    ops.attention(*tensors())
    (key,) = table(folder)
    assert "forward" in key


def test_the_rows_of_other_processes_stay(folder):
    ops.attention(*tensors())
    (folder / "attention.json").write_text(json.dumps({"another": {"sdpa": 0.5}, **table(folder)}))
    ops.attention(*tensors(tokens=40))
    assert len(table(folder)) == 3


def test_without_a_writable_folder_it_works_all_the_same(monkeypatch, folder):
    (folder / "file").write_text("")
    monkeypatch.setenv("LFM_FAST_CACHE", str(folder / "file" / "under"))
    assert ops.attention(*tensors()).shape == (2, 2, 20, 8)


def test_an_unknown_setting_is_refused(monkeypatch):
    monkeypatch.setenv("LFM_FAST_MEASURE", "sometimes")
    with pytest.raises(ValueError, match="LFM_FAST_MEASURE is 'sometimes', expected one of auto, always, never"):
        ops.attention(*tensors())

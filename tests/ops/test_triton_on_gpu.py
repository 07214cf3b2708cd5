"""The Triton kernels on a GPU: what the interpreter cannot show, and once more what it did."""

import importlib
import os

import pytest
import torch
from compare import assert_same_bits
from row_cases import ROWS, all_cases, arguments_of, first_cases, in_float64, map_tensors, outputs
from test_rows import assert_row_close

from lfm_fast import ops

DEVICE = os.environ.get("LFM_FAST_TRITON_DEVICE", "cuda")  # cpu, in the interpreter, runs what needs no stream
WITH_TRITON = {name: row for name, row in ROWS.items() if any(b.name == "triton" for b in row.backends)}
DRAWING = ("philox_normal", "interpolate", "posterior_interpolate", "velocity_loss", "guided_step")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no CUDA device on this machine", allow_module_level=True)


def served(cases):
    return [p for p in cases if p.values[0].name in WITH_TRITON]


def on_device(row, case):
    args = arguments_of(row, {**case, "device": DEVICE})
    reason = row.named("triton").refusal(args, forced=True)
    if reason is not None:
        assert "float64" in reason
        pytest.skip(reason)
    return args


def on_cpu(found):
    return map_tensors(torch.Tensor.cpu, found)


def run(row, args):
    with ops.use_backend("triton", ops=row.name):
        return outputs(row(*args))


@pytest.mark.parametrize(("row", "case"), served(all_cases()))
def test_result_is_that_of_float64(row, case):
    args = on_device(row, case)
    want = outputs(row.reference(*in_float64(on_cpu(args))))
    assert_row_close(row, args, on_cpu(run(row, args)), want, "of triton")


@pytest.mark.parametrize(("row", "case"), served(first_cases()))
def test_every_configuration_and_every_run_gives_the_same_bits(row, case):
    """On a GPU the layout of a sum follows from num_warps as well, which the interpreter does not see."""
    from lfm_fast.kernels.triton import _tuning

    module = importlib.import_module(f"lfm_fast.kernels.triton.{row.name}")
    most = max(len(value.configurations) for value in vars(module).values() if isinstance(value, _tuning.Tuned))
    for shape in (case["shape"], row.sizes[0]["shape"]):
        args = on_device(row, {**case, "shape": shape})
        tuned = run(row, args)
        for number in (*range(most), 0):
            with _tuning.use_configuration(number):
                for got, want in zip(run(row, args), tuned):
                    assert_same_bits(got.cpu(), want.cpu(), f"{row.name} at {shape}, configuration {number}")


@pytest.mark.parametrize("name", DRAWING)
def test_noise_has_the_bits_of_the_cpu(name):
    """No contraction, correctly rounded roots: not 4 ulp but none."""
    index, count = torch.tensor([2**34 + 5, -3, 7], device=DEVICE), 70_000
    noise = ops.philox_normal(index.cpu(), count, seed=11)
    zeros, ones = torch.zeros(3, count, device=DEVICE), torch.ones(3, device=DEVICE)
    pick = torch.stack((0 * ones, ones, 0 * ones, ones))
    with ops.use_backend("triton", ops=name):
        if name == "philox_normal":
            assert_same_bits(ops.philox_normal(index, count, seed=11).cpu(), noise)
        elif name == "interpolate":
            for part in ops.interpolate(zeros, pick, index=index, seed=11):
                assert_same_bits(part.cpu() + 0.0, noise + 0.0)
        elif name == "posterior_interpolate":
            pick, rows = torch.stack((ones, 0 * ones, 0 * ones, ones)), torch.arange(3, device=DEVICE)
            drawn, later = ops.posterior_interpolate(zeros, rows, index, pick, zeros, 11)
            assert_same_bits(later.cpu() + 0.0, noise + 0.0)
            want = ops.philox_normal(index.cpu(), count, seed=11, stream=2)
            assert_same_bits(drawn.cpu() + 0.0, want + 0.0)
        elif name == "velocity_loss":
            loss = ops.velocity_loss(noise.to(DEVICE), z_0=zeros, coefficients=pick, index=index, seed=11)
            assert (loss == 0).all()
        else:
            none = torch.zeros(3, 2, device=DEVICE)
            step = ops.guided_step(zeros, zeros, None, None, [], none, None, 0.0, 0.0, ones, index, 11, 6)[0]
            want = ops.philox_normal(index.cpu(), count, seed=11, stream=5, offset=6)
            assert_same_bits(step.cpu() + 0.0, want + 0.0)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a stream")
@pytest.mark.parametrize(("row", "case"), served(first_cases()))
@pytest.mark.parametrize("tuned", [False, True])
def test_a_cuda_graph_replays_the_same_bits(row, case, tuned):
    """Captured after a call that tuned, and captured first of all, when the default configuration has to do."""
    args = on_device(row, {**case, "shape": (3, *row.sizes[-1]["shape"][1:])})
    from lfm_fast.kernels.triton import _tuning

    with _tuning.use_configuration(0):  # compiles, and tunes nothing
        want = run(row, args)
    if tuned:
        want = run(row, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(row, args)
    for g in got:
        g.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for g, w in zip(got, want):
        assert_same_bits(g.cpu(), w.cpu(), f"{row.name} replayed")

"""The CUDA kernels on a GPU: the CPU's bits, the same ones every time, in graphs, on streams and on a second device.

The rows' own tests run there too, through the fixture `backend`; without a GPU see test_cuda_emulated.py.
"""

from contextlib import nullcontext

import pytest
import torch
from compare import assert_close, assert_same_bits
from emulated import WITH_CUDA
from row_cases import ROWS, arguments_of, map_tensors, result_names, results
from test_cuda_emulated import LAYOUTS, SIZES, calls, optimizer_arguments, served_cases

from lfm_fast import ops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.usefixtures("cuda_library"),
]


def on(device, args):
    """Copies there with the same strides, gaps and alignment."""

    def move(x):
        if x.numel() == 0:
            return x.to(device)
        reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
        start = x.storage_offset() % 4  # what decides whether vectors can be read
        memory = torch.empty(start + reach, dtype=x.dtype, device=device)
        memory[start:] = x.as_strided((reach,), (1,))
        return memory.as_strided(x.shape, x.stride(), start)

    return map_tensors(move, args)


def on_cpu(tensors):
    return [x.cpu() for x in tensors]


def on_gpu(row, args, backend="cuda"):
    with torch.no_grad(), ops.use_backend(backend, ops=row.name) if backend else nullcontext():
        return results(row, args)


def compare(row, args, what=""):
    """With the CPU kernel: to the bit, but for adamw_ema, whose powers of the decays are the device's own."""
    if row.named("cpp").why_not(*args) is not None:
        return
    got = on_cpu(results(row, on("cuda", args), row.kernels["cuda"]))
    want = results(row, args, row.kernels["cpp"])
    for name, g, w in zip(result_names(row, args), got, want, strict=True):
        if row.name == "adamw_ema":
            half = torch.finfo(g.dtype).eps / 2 if g.element_size() == 2 else 0.0  # may round to the other side
            assert_close(g, w, absolute=1e-7, relative=2.0**-21 + half, what=f"{name} {what}")
        else:
            assert_same_bits(g, w, f"{row.name}.{name} {what}")


@pytest.mark.parametrize(("row", "case"), served_cases())
def test_every_case_has_the_cpu_kernels_bits(row, case, library):
    compare(row, arguments_of(row, case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_odd_sizes_alignments_and_strides(layout, dtype, library):
    for size in SIZES:
        for name, args in calls(size, layout, dtype):
            compare(WITH_CUDA[name], args, f"of {size} elements, {layout}, {dtype}")


def test_noise_is_the_cpus_to_the_bit_over_ten_million_draws(library):
    compare(WITH_CUDA["philox_normal"], (torch.arange(1000) * 2**33 - 7, 10_007, 2**62 + 5, 3, 2**31))


def large_calls():
    """A call of every row that is large enough to keep many blocks busy, several of them on each sample."""
    for row in WITH_CUDA.values():
        if row.name == "adamw_ema":
            yield row, optimizer_arguments([(300, 257), (4096,), (5,)] * 200)
        else:
            extra = {"error": True, "num_stored": 3, "noise": True, "keep": True} if row.name == "guided_step" else {}
            shape = (64, 10_007) if row.name == "philox_normal" else (64, 4, 33, 32)  # two chunks a sample
            yield row, arguments_of(row, {"shape": shape, **extra})


LARGE_CALLS = [pytest.param(row, args, id=row.name) for row, args in large_calls()]


@pytest.mark.parametrize(("row", "args"), LARGE_CALLS)
def test_every_run_gives_the_same_bits(row, args):
    args = on("cuda", args)
    first = on_cpu(on_gpu(row, args))
    for _ in range(5):
        for g, w in zip(on_cpu(on_gpu(row, args)), first):
            assert_same_bits(g, w, row.name)


def captured():
    """Every row on each of its backends for GPUs; attention, whose backends are PyTorch's, on its own choice."""
    for row in ROWS.values():
        for name in ("cuda", "triton"):
            if any(b.name == name for b in row.backends):
                yield pytest.param(row, name, id=f"{row.name}-{name}")
    yield pytest.param(ROWS["attention"], None, id="attention")


def spoil(x):
    """Other numbers in the same memory; integers stay, they say which noise."""
    if x.is_floating_point() and x.numel():
        x.copy_(x * 0.75 + 0.125)


@pytest.mark.parametrize(("row", "backend"), captured())
def test_a_captured_graph_follows_its_inputs(row, backend):
    """Captured once, replayed on other numbers: nothing was read by the host, and nothing was left out."""
    args = on("cuda", arguments_of(row, row.cases[0]))

    def call():
        with torch.no_grad(), ops.use_backend(backend, ops=row.name) if backend else nullcontext():
            return row(*args)

    state = map_tensors(torch.clone, args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for x, y in zip(flat(args), flat(state), strict=True):
        x.copy_(y)
        if not row.mutates:
            spoil(x)
    want = on_cpu(on_gpu(row, args, backend))
    graph.replay()
    torch.cuda.synchronize()
    written = [x for n in row.mutates for x in args[row.argument_names.index(n)]]
    got = written if row.mutates else out if isinstance(out, tuple) else (out,)
    for what, g, w in zip(result_names(row, args), got, want, strict=True):
        assert_same_bits(g.cpu(), w, f"{row.name}.{what}")


def flat(args):
    return [x for a in args for x in (a if isinstance(a, list) else [a]) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(("row", "args"), LARGE_CALLS)
def test_streams_keep_their_order(row, args):
    """Work on another stream comes after what that stream waits for, here inputs that arrive late."""
    args = on("cuda", args)
    want = on_cpu(on_gpu(row, args))
    late = map_tensors(torch.zeros_like, args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: about ten milliseconds in which nothing else of the stream may run
        for x, y in zip(flat(late), flat(args)):
            x.copy_(y)
        with torch.no_grad(), ops.use_backend("cuda", ops=row.name):
            got = row(*late)
        kept = [x for n in row.mutates for x in late[row.argument_names.index(n)]]
        got = kept if row.mutates else got if isinstance(got, tuple) else (got,)
        other = on_gpu(row, args) if not row.mutates else want  # a second call while the first is still waiting
    torch.cuda.current_stream().wait_stream(stream)
    for g, o, w in zip(on_cpu(got), on_cpu(other), want, strict=True):
        assert_same_bits(g, w, row.name)
        assert_same_bits(o, w, row.name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize(("row", "args"), LARGE_CALLS)
def test_a_second_device_is_used_and_the_first_stays_current(row, args):
    torch.cuda.set_device(0)
    want = on_cpu(on_gpu(row, on("cuda:0", args)))
    got = on_gpu(row, on("cuda:1", args))
    assert torch.cuda.current_device() == 0
    for g, w in zip(got, want, strict=True):
        assert g.device.index == 1
        assert_same_bits(g.cpu(), w, row.name)


@pytest.mark.parametrize(("row", "args"), LARGE_CALLS)
def test_tensors_on_two_devices_are_refused(row, args):
    """By the kernel itself, with no row in front of it."""
    moved = list(on("cuda", args))
    kernel = row.kernels["cuda"]
    for position, value in enumerate(args[1:], start=1):
        if isinstance(value, torch.Tensor) or (isinstance(value, list) and value):
            with pytest.raises(RuntimeError, match="must be on"):
                kernel(*moved[:position], value, *moved[position + 1 :])


def test_more_than_2_31_elements():
    """The last elements of a tensor of 2^31 + 8 are those that fewer elements at the same place have."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("less than 30 GiB of GPU memory are free")
    count = 2**31 + 8
    row, index = WITH_CUDA["philox_normal"], torch.tensor([3], device="cuda")
    whole = on_gpu(row, (index, count, 1, 0, 0))[0]
    tail = on_gpu(row, (index, 4096, 1, 0, (count - 4096) // 4))[0]
    assert_same_bits(whole[:, -4096:].cpu(), tail.cpu())
    coefficients = torch.tensor([[2.0], [1.0], [1.0], [0.0]], device="cuda")
    z_t, target = on_gpu(WITH_CUDA["interpolate"], (whole, coefficients, whole, None, 0, 0))
    assert_same_bits(target[:, -4096:].cpu(), tail.cpu())
    assert_same_bits(z_t[:, -4096:].cpu(), 3 * tail.cpu())


def test_a_call_there_is_no_memory_for_leaves_the_next_one_alone():
    index = torch.arange(2**20, device="cuda")
    with pytest.raises(RuntimeError):
        on_gpu(WITH_CUDA["philox_normal"], (index, 2**30, 1, 0, 0))
    assert on_gpu(WITH_CUDA["philox_normal"], (index, 4, 1, 0, 0))[0].isfinite().all()

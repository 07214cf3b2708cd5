"""The CUDA sources without a GPU: their own code, run as loops over CPU tensors, gives the CPU kernels' bits."""

import math
import re

import pytest
import torch
from compare import assert_close, assert_same_bits
from emulated import ROOT, WITH_CUDA
from row_cases import (
    ROWS,
    all_cases,
    arguments_of,
    in_float64,
    map_tensors,
    result_names,
    results,
)

CHUNK = 4096  # elements of a sample that one block does
ORDERS = [(0, 1 << 16), (1, 3), (2, 1)]  # of threads and blocks, and the largest grid


def served_cases():
    cases = (p for p in all_cases() if p.values[0].name in WITH_CUDA)
    return [p for p in cases if p.values[0].named("cuda").why_not(*arguments_of(*p.values)) is None]


def compare(emulated, row, args, what="", exact=True):
    """With the CPU kernel to the bit, or where there is none with the reference in float64."""
    got = results(row, args, emulated.kernel_of(row))
    with_cpu = any(b.name == "cpp" and b.why_not(*args) is None for b in row.backends)
    want = results(row, args, row.kernels["cpp"]) if with_cpu else results(row, in_float64(args), row.reference)
    for name, g, w in zip(result_names(row, args), got, want, strict=True):
        if with_cpu and exact:
            assert_same_bits(g, w, f"{row.name}.{name} {what}")
        else:
            assert_close(g, w, absolute=row.tolerance.absolute, relative=row.tolerance.relative, what=f"{name} {what}")


@pytest.mark.parametrize(("row", "case"), served_cases())
def test_every_case_has_the_cpu_kernels_bits(row, case, emulated, library):
    for order, most_blocks in ORDERS:
        emulated.choose(order, most_blocks)
        compare(emulated, row, arguments_of(row, case), f"order {order}, {most_blocks} blocks")


SIZES = (1, 2, 3, 4, 5, 255, 256, 257, 1023, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)
LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "one element late": lambda x: wide(x, 1, 0),
    "rows with gaps": lambda x: wide(x, 0, 8),
    "rows with odd gaps": lambda x: wide(x, 4, 3),
    "expanded": lambda x: x[:1].expand(x.shape),
    "strided": lambda x: wide(x.repeat_interleave(2, 1), 0, 1)[:, ::2],
}


def wide(x, before, after):
    """The same values as a slice of a wider tensor: another alignment, another distance between samples."""
    around = torch.full((x.shape[0], before + x.shape[1] + after), math.nan, dtype=x.dtype)
    around[:, before : before + x.shape[1]] = x
    return around[:, before : before + x.shape[1]]


def calls(size, layout, dtype):
    """(row name, arguments) of each row with samples, on three samples of this size."""
    generator = torch.Generator().manual_seed(size)

    def field(kind=torch.float32):
        return LAYOUTS[layout](torch.randn(3, size, generator=generator).to(kind))

    def table(*shape):  # every second column of a wider one, so that no stride is 1
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]

    index = torch.tensor([5, 0, -1, 0, 2**40, 0])[::2]
    yield "philox_normal", (index, size, -3, 2, 2**32 - size // 4 - 1)
    yield "interpolate", (field(dtype), table(4, 3), field(dtype), None, 0, 0)
    yield "interpolate", (field(dtype), table(4, 3), None, index, 9, 1)
    rows = torch.tensor([2, 9, 0, 9, 2, 9])[::2]
    yield "posterior_interpolate", (field(dtype), rows, index, table(4, 3), field(dtype), 7)
    yield "posterior_interpolate", (field(dtype), rows, index, table(4, 3), None, 7)
    yield "velocity_loss", (field(dtype), field(), table(3).abs(), None, None, None, 0, 0)
    yield "velocity_loss", (field(dtype), None, None, field(dtype), table(4, 3), index, 9, 1)
    stored = [field(), field(dtype), field(dtype)]
    common = (field(dtype), table(3), stored, table(3, 5))
    yield "guided_step", (field(), field(dtype), *common, table(3, 4), 1e-2, 1e-2, table(3), index, 4, 7, True)
    yield "guided_step", (field(), field(dtype), None, None, [], table(3, 2), None, 0.0, 0.0, None, None, 0, 0, False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_odd_sizes_alignments_and_strides(layout, dtype, emulated, library):
    for number, size in enumerate(SIZES):
        emulated.choose(*ORDERS[number % 3])
        for name, args in calls(size, layout, dtype):
            compare(emulated, WITH_CUDA[name], args, f"of {size} elements, {layout}, {dtype}")


@pytest.mark.parametrize("count", [1023, 1024])
def test_large_batches_of_long_samples_are_summed_in_one_launch(count, emulated, library):
    """From 1024 samples on a block does a whole sample; the bits stay."""
    size = CHUNK + 5
    generator = torch.Generator().manual_seed(count)
    a, b = (torch.randn(1, size, generator=generator) for _ in range(2))
    scale = torch.linspace(0.5, 2, count)
    z = (a * scale[:, None]).contiguous()
    compare(emulated, WITH_CUDA["velocity_loss"], (z, b.expand(z.shape), scale, None, None, None, 0, 0))
    weights, errors = torch.ones(count, 2), torch.ones(count, 1)
    step = (z, b.expand(z.shape), None, None, [], weights, errors, 1e-3, 1e-3, None, None, 0, 0, False)
    compare(emulated, WITH_CUDA["guided_step"], step)


def test_nan_and_infinity_pass_through(emulated, library):
    for value in (math.nan, math.inf, -math.inf):
        for name, args in calls(CHUNK + 9, "contiguous", torch.float32):
            if name != "philox_normal":
                args[0][1, -1] = value
            compare(emulated, WITH_CUDA[name], args, f"with {value}", exact=False)


def test_samples_more_than_2_31_elements_apart(emulated, library):
    """Of memory that is reserved and, but for the two samples, never touched."""
    distance = 2**31 + 4
    far = torch.empty(distance + 8, dtype=torch.bfloat16).as_strided((2, 8), (distance, 1))
    far.copy_(torch.arange(16.0).view(2, 8))
    args = (far, torch.ones(4, 2), far, None, 0, 0)
    assert_same_bits(emulated.kernel_of(WITH_CUDA["interpolate"])(*args)[0], 2 * far)


def parameters(shapes, dtype=torch.float32):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, shape in enumerate(shapes)]


def optimizer_arguments(shapes, low=torch.bfloat16, gradient=torch.bfloat16):
    schedule = torch.tensor([1e-2, 7, 0.99], dtype=torch.float64)
    squares = [x.square() for x in parameters(shapes)]
    copies = parameters(shapes, low) if low else []
    lists = (parameters(shapes), parameters(shapes, gradient), parameters(shapes), squares, parameters(shapes), copies)
    return (schedule, *lists, 0.9, 0.999, 1e-8, 0.01, torch.tensor(0.25))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_more_tensors_than_one_launch_takes(order, emulated):
    """500 fit; the empty ones take no place, and the last of one launch and the first of the next are both whole."""
    shapes = [(0,) if i % 7 == 0 else (i % 5 + 1, i % 11 + 1) for i in range(1200)]
    shapes[5], shapes[600] = (CHUNK + 3,), (2, CHUNK)
    emulated.choose(*order)
    compare(emulated, WITH_CUDA["adamw_ema"], optimizer_arguments(shapes))


def test_tensors_of_any_strides_are_changed_in_place(emulated):
    """Alike and dense: where they are. Otherwise a copy is worked on, and copied back."""
    shape = (3, 4, 5, 6)
    last = {"memory_format": torch.channels_last}
    layouts = {
        "all channels last": [lambda x: x.contiguous(**last)] * 6,
        "gradient alone": [torch.clone, lambda x: x.contiguous(**last), *[torch.clone] * 4],
        "every second element": [lambda x: torch.stack((x, x), -1)[..., 0]] * 6,
        "each its own": [torch.clone, *[lambda x: x.transpose(0, 3).contiguous().transpose(0, 3)] * 3, torch.clone,
                         lambda x: x.contiguous(**last)],
    }  # fmt: skip
    row = WITH_CUDA["adamw_ema"]
    for name, layout in layouts.items():
        args = list(optimizer_arguments([shape, (7,)]))
        want = results(row, args, emulated.kernel_of(row))
        for k, change in enumerate(layout, start=1):
            args[k] = [change(args[k][0]), args[k][1]]
        before = [x.stride() for k in (1, 3, 4, 5, 6) for x in args[k]]
        emulated.kernel_of(row)(*args)
        got = [x for k in (1, 3, 4, 5, 6) for x in args[k]]
        assert [x.stride() for x in got] == before
        for g, w in zip(got, want, strict=True):
            assert_same_bits(g, w, name)


def test_memory_that_is_changed_twice_is_refused(emulated):
    """Called without the row in front of it, which sees tensors that start together; the kernel sees overlaps too."""
    kernel = emulated.kernel_of(WITH_CUDA["adamw_ema"])
    for k in range(1, 7):
        for other in (k, 1, 3):
            args = optimizer_arguments([(9,), (9,)], low=torch.bfloat16, gradient=torch.float32)
            memory = torch.zeros(14, dtype=args[k][0].dtype)  # elements 9 to 13 in two tensors
            if args[other][1].dtype != memory.dtype or (k == other == 2):
                continue
            args[k][0], args[other][1] = memory[:9], memory[5:]
            with pytest.raises(RuntimeError, match="a tensor to change shares memory with another one"):
                kernel(*args)
            assert not memory.any(), "refused before any work"
    gaps = torch.zeros(9, 2)
    args = optimizer_arguments([(9,), (9,)])
    args[1][0], args[1][1] = gaps[:, 0], gaps[:, 1]  # each lives in the other's gaps
    kernel(*args)
    args = optimizer_arguments([(9,), (9,)], gradient=torch.float32)
    args[2][0] = args[2][1]  # one gradient may serve two parameters
    kernel(*args)


def test_what_would_read_out_of_bounds_is_refused(emulated):
    """Called without the row in front of them: a tensor of another shape, dtype or number is refused by each kernel."""
    for name, args in calls(9, "contiguous", torch.float32):
        kernel = emulated.kernel_of(WITH_CUDA[name])
        for position, value in enumerate(args):
            for x in value if isinstance(value, list) else [value]:
                if isinstance(x, torch.Tensor):
                    spoilt = [x.to(torch.complex64)] + ([x[..., :-1]] if position else [])
                    for y in spoilt:
                        changed = [y if k is x else k for k in value] if isinstance(value, list) else y
                        with pytest.raises(RuntimeError, match=r"must|cannot|pass"):
                            kernel(*args[:position], changed, *args[position + 1 :])
    good = optimizer_arguments([(3, 2), (4,)])
    kernel = emulated.kernel_of(WITH_CUDA["adamw_ema"])
    for k in range(2, 7):
        for wrong in (good[k][:1], [x[:1] for x in good[k]], map_tensors(torch.Tensor.double, (good[k],))[0]):
            with pytest.raises(RuntimeError, match=r"must|cannot|holds"):
                kernel(*good[:k], wrong, *good[k + 1 :])


def test_arguments_that_do_not_go_together_are_refused(emulated, library):
    """By the kernels themselves, on the CPU as on a GPU: with neither of two there would be nothing to read."""
    z, table, index = torch.ones(2, 5), torch.ones(4, 2), torch.tensor([3, 4])
    calls = [
        ("interpolate", "pass exactly one of z_1 and index", (z, table, z, index, 0, 0), (z, table, None, None, 0, 0)),
        (
            "velocity_loss",
            "pass either target, or z_0, coefficients and index|without target, pass all of",
            *((z, z, None, *more, 0, 0) for more in ((z, None, None), (None, table, None), (None, None, index))),
            *((z, None, None, *more, 0, 0) for more in ((z, table, None), (z, None, index), (None, table, index))),
        ),
    ]
    for name, words, *wrong in calls:
        for kernel in (emulated.kernel_of(ROWS[name]), ROWS[name].kernels["cpp"]):
            for args in wrong:
                with pytest.raises(RuntimeError, match=words):
                    kernel(*args)


def test_noise_that_would_begin_again_is_refused(emulated, library):
    """There are 2^32 blocks of four normals: the last one may be used, and no element behind it."""
    z, weights, index = torch.ones(2, 9), torch.ones(2, 2), torch.tensor([3, 4])
    for offset, fits in ((2**32 - 3, True), (2**32 - 2, False)):
        step = (z, z, None, None, [], weights, None, 0.0, 0.0, torch.ones(2), index, 0, offset, False)
        for name, args in (("guided_step", step), ("philox_normal", (index, 9, 0, 5, offset))):
            for kernel in (emulated.kernel_of(ROWS[name]), ROWS[name].kernels["cpp"]):
                if fits:
                    kernel(*args)
                else:
                    with pytest.raises(RuntimeError, match="offset"):
                        kernel(*args)


def test_all_cuda_sources_are_emulated():
    text = (ROOT / "csrc/cuda/emulated.cpp").read_text()
    sources = {f"cuda/{path.name}" for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert set(re.findall(r'#include "(cuda/\w+\.cu)"', text)) == sources

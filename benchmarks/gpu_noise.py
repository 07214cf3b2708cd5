"""The counter's noise against the CPU's to the last bits, and whether every row gives the same bits twice."""

import functools

import torch
from torch import Tensor

from benchmarks import gpu, gpu_shapes
from benchmarks.gpu import Results
from benchmarks.gpu_parts import attempt, until
from benchmarks.plain import forced
from benchmarks.workloads import ForwardBackward, OpWorkload, tensors_of
from lfm_fast.ops import _registry

MOST_ULP = 4
DRAWS = (2442, 4096)  # 10^7 numbers
SEEDS = ((0, 0), (2**63 - 25, 5), (-7, 2))  # (seed, stream)


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many float32 numbers lie between, element by element: their bits as integers that are in order."""

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return (ordered(a) - ordered(b)).abs()


def noise(results: Results) -> None:
    """philox_normal's backends against the CPU's own, in units in the last place, over 10^7 draws."""
    row = _registry.row("philox_normal")
    shape = (4, 64) if results.smoke else DRAWS
    for seed, stream in SEEDS:
        args = row.bind(**row.arguments(shape=shape, seed=seed, stream=stream))
        expected = row(*args)
        on_device = tuple(a.to(results.device) if isinstance(a, Tensor) else a for a in args)
        names = [*row.willing(on_device, forced=True), "reference"]
        for name in names:
            title = f"noise, seed {seed}, stream {stream}, {name}"
            with attempt(results, title):
                with forced(name):
                    off = ulps(row(*on_device).cpu(), expected)
                most, differ = int(off.max()), int((off > 0).sum())
                facts = {"right": most <= MOST_ULP, "differ": differ}
                note = f"{differ:,} of {off.numel():,} differ at all"
                results.add(title, most, "ulp", MOST_ULP, at_most=True, note=note, **facts)


def repeatable(results: Results) -> None:
    """Every row three times on the same numbers: how many elements of its results have other bits."""
    chosen = {case.row: case for case in reversed(gpu_shapes.cases(results.smoke))}
    work = [(OpWorkload, name, case) for name, case in chosen.items()]
    backward = [(name, case) for name, case in chosen.items() if f"{name}_backward" in _registry.rows()]
    work += [(ForwardBackward, name, case) for name, case in backward]
    for kind, name, case in until(results, work, reserve=10.0):
        with attempt(results, _titled(kind, name, case)):
            _repeat(results, kind, name, case)
        gpu.release(results.device)


def _titled(kind, name: str, case: gpu_shapes.Case) -> str:
    return f"{name} {case.title}" + (", with gradients" if kind is ForwardBackward else "")


def _repeat(results: Results, kind, name: str, case: gpu_shapes.Case) -> None:
    workload = kind(name, {**case.size, "device": results.device.type})
    args = next(workload.sets)
    workload.sets = iter(lambda: args, None)  # the same inputs each time, not a copy of them
    for backend in [n for n in workload.row.willing(args, forced=True) if n in ("cpp", "cuda", "triton")]:
        title = f"{_titled(kind, name, case)}, {backend}, three runs"
        with attempt(results, title):
            found = different(functools.partial(_results, workload, backend))
            results.add(title, found, "elements differ", 0, at_most=True, right=found == 0)


def _results(workload: OpWorkload, backend: str) -> list[Tensor]:
    with forced(backend):
        return tensors_of(workload.call())


def different(call, times: int = 3) -> int:
    """How many elements of what the call returns have other bits in its later runs than in the first."""
    first = [_bits(x) for x in call()]
    return sum(int((_bits(x) != b).sum()) for _ in range(times - 1) for x, b in zip(call(), first))


def _bits(x: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(kinds[x.element_size()])

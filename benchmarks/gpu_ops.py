"""Every row of the op table on a GPU: share of the copy's rate, against PyTorch and Inductor, right and repeatable.

`bash scripts/gpu_bench_ops.sh [PART ...]`; the parts are the last lines of this file. Bytes are those that the row's
`cost` counts, read once and written once; its ceilings are measured by each part. Inputs rotate through several times
the L2 cache, and the host's time for a call is not in its time (`gpu.timed`).
"""

import functools
import time

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu, gpu_attention, gpu_code, gpu_counters, gpu_noise, gpu_shapes
from benchmarks.elsewhere import elsewhere
from benchmarks.gpu import Results
from benchmarks.gpu_parts import Part, attempt, each, main, until
from benchmarks.measure import spread
from benchmarks.names import COMPILED, EAGER
from benchmarks.optimizer import OptimizerStep
from benchmarks.plain import forced
from benchmarks.workloads import Contender, ForwardBackward, OpWorkload, relative_error
from lfm_fast.ops import _registry

KINDS = {"op": OpWorkload, "op and gradient": ForwardBackward}
# without CUDA graphs: events leave the host's time out, and a graph would copy every input
AT_ITS_BEST, AT_ONCE = {"mode": "max-autotune-no-cudagraphs"}, {"backend": "eager"}
AGAINST_INDUCTOR = 1.2  # times as fast, forward and backward together
SMALL = {"depth": 1, "hidden_size": 64, "num_heads": 2}
COMPILING = 60.0  # seconds that Inductor may take for a row; with its choice of configurations it takes 5 to 20


def own_backends(workload: OpWorkload) -> list[str]:
    """Of this row on this device, those that the table would take first first."""
    args = next(workload.sets)
    return [name for name in workload.row.willing(args, forced=True) if name in ("cpp", "cuda", "triton")]


def call_of(contender: Contender) -> None:
    with forced(contender.backend):
        contender.call()


def result_of(contender: Contender) -> list[torch.Tensor]:
    with forced(contender.backend):
        return contender.result()


def tried(contender: Contender, truth: list[torch.Tensor]) -> float | None:
    """The error of a contender, None where nothing of it compares; raises what calling it raises."""
    if contender.result is None:
        return call_of(contender)
    got = result_of(contender)
    return relative_error(got, truth[: len(got)])


def measured(results: Results, title: str, workload: OpWorkload, seconds: float) -> tuple[list[str], dict, dict]:
    """Our backends of a workload, {contender: seconds of its calls}, {contender: error}; theirs are beside ours.

    Without those that raise.
    """
    backends = own_backends(workload)
    found = {name: Contender(workload.call, workload.result, name) for name in (*backends, "reference")}
    found |= {name: Contender(call, result) for name, (call, result) in workload.others().items()}
    truth = workload.truth()
    errors = each(results, title, found, functools.partial(tried, truth=truth))
    del truth
    times = gpu.timed({name: functools.partial(call_of, found[name]) for name in errors}, results.device, seconds)
    return [name for name in backends if name in errors], times, errors


def launches(call, device) -> list[str] | None:
    """The names of the kernels that a call launches, copies and fills among them; None where nobody can tell."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        gpu.wait(device)
    return [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA] or None


def add_shares(results: Results, title: str, workload: OpWorkload, wanted: float | None, factor: float) -> None:
    """A line for each of our backends; what is wanted is wanted of the one that the table takes first."""
    ceilings, seconds = gpu.ceilings(results.smoke), 0.005 if results.smoke else 0.3
    willing = own_backends(workload)
    backends, times, errors = measured(results, title, workload, seconds)
    medians = {name: gpu.median(taken) for name, taken in times.items()}
    others = {name: medians[name] for name in (EAGER, "reference", "torch.randn") if name in medians}
    moved = workload.moved * factor
    for backend in backends:
        taken, error = medians[backend], errors[backend]
        facts = {
            "bytes": moved,
            "bytes_per_second": moved / taken,
            "flops_per_second": workload.flops / taken,
            "share_of_gemm": workload.flops / taken / ceilings["gemm_flops_per_second"][workload.precision],
            "seconds": {name: spread(all_taken) for name, all_taken in times.items()},
            "errors": errors,
        }
        note = f"{1e6 * taken:,.0f} us; "
        note += ", ".join(f"{name} {seconds / taken:.2f} x" for name, seconds in others.items())
        results.add(
            f"{title}, {backend}", moved / taken / ceilings["copy_bytes_per_second"], "of copy",
            wanted if backend == willing[0] else None, right=error <= workload.largest_error([]), note=note, **facts,
        )  # fmt: skip
    if not willing:
        args = next(workload.sets)
        refused = (f"{b.name}: {b.refusal(args, forced=True)}" for b in workload.row.backends)
        results.not_run(title, "; ".join(refused))


def size_on(case: gpu_shapes.Case, device) -> dict:
    return {**case.size, "device": device.type}


def rows(results: Results) -> None:
    """Each row at its sizes, forward and backward: bytes per second as a share of a copy's, and the launches."""
    work = [(case, backward) for case in gpu_shapes.cases(results.smoke) for backward in (False, True)]
    rows_there = _registry.rows()
    for case, backward in until(results, work, reserve=20.0):
        row = case.row + ("_backward" if backward else "")
        if row in rows_there:
            with attempt(results, f"{row} {case.title}"):
                _row(results, row, case, backward)
            gpu.release(results.device)


def _row(results: Results, row: str, case: gpu_shapes.Case, backward: bool) -> None:
    workload, title = OpWorkload(row, size_on(case, results.device)), f"{row} {case.title}"
    wanted = case.backward if backward else case.forward
    add_shares(results, title, workload, wanted, 1.0 if backward else case.bytes_factor)
    for backend in own_backends(workload) if case.launches is not None and not backward else ():
        with attempt(results, f"{title}, {backend}, launches"):
            found = launches(functools.partial(call_of, Contender(workload.call, None, backend)), results.device)
            add_launches(results, f"{title}, {backend}", found, case.launches)


def add_launches(results: Results, title: str, found: list[str] | None, wanted: int) -> None:
    if found is None:
        results.not_run(f"{title}, launches", "PyTorch's profiler sees no kernels here")
    else:
        results.add(f"{title}, launches", len(found), "", wanted, at_most=True, kernels=found)


def optimizer(results: Results) -> None:
    """adamw_ema over DiT-XL/2's parameters: share of a copy's rate, launches, PyTorch's optimizers beside it."""
    network, settings = ("DiT-S/2", SMALL) if results.smoke else ("DiT-XL/2", {})
    workload = OptimizerStep(network, results.device.type, **settings)
    truth = workload.truth()
    backends = [name for name in ("cpp", "cuda") if _serves("adamw_ema", name, results.device)]
    found = {name: Contender(workload.call, workload.result, name) for name in backends}
    found |= {name: Contender(call, result) for name, (call, result) in workload.others().items()}
    start = f"AdamW and EMA, {network}"
    errors = each(results, start, found, functools.partial(tried, truth=truth))
    del truth
    gpu.release(results.device)
    backends = [name for name in backends if name in errors]
    calls = {name: functools.partial(call_of, found[name]) for name in errors}
    times = gpu.timed(calls, results.device, 0.01 if results.smoke else 3.0)
    medians, copied = {k: gpu.median(v) for k, v in times.items()}, gpu.ceilings(results.smoke)["copy_bytes_per_second"]
    for name in errors:
        ours, right = name in backends, errors[name] <= workload.largest_error([])
        first = backends[0] if backends else name
        results.add(
            f"{start}, {name}", workload.moved / medians[name] / copied, "of copy",
            0.85 if ours else None, right=right, seconds=spread(times[name]), error=errors[name],
            note=f"{1e3 * medians[name]:.2f} ms, {medians[name] / medians[first]:.2f} x {first}'s time",
        )  # fmt: skip
    for name in backends:
        title = f"{start}, {name}"
        with attempt(results, f"{title}, launches"):
            add_launches(results, title, launches(calls[name], results.device), 1)
        with attempt(results, f"{title}, two runs"):
            different = gpu_noise.different(functools.partial(result_of, found[name]), times=2)
            results.add(f"{title}, two runs", different, "elements differ", 0, at_most=True, right=different == 0)


def _serves(row: str, backend: str, device) -> bool:
    of = _registry.row(row)
    args = of.bind(**of.arguments(**of.cases[0], device=device.type))
    return of.named(backend).refusal(args, forced=True) is None


def by_inductor(kind: str, row: str, size: dict, seconds: float, how: dict) -> dict:
    """What Inductor makes of a row's reference, in whatever process this is called: seconds of its calls and error."""
    start, workload = time.perf_counter(), KINDS[kind](row, size)
    workload.compile_how = how
    contender = workload.compiled(COMPILED)
    got = contender.result()
    compiling = time.perf_counter() - start
    error = relative_error(got, workload.truth()[: len(got)])
    times = gpu.timed({COMPILED: contender.call}, torch.device(size["device"]), seconds)[COMPILED]
    gpu.release(torch.device(size["device"]))
    torch.compiler.reset()
    return {"seconds": times, "error": error, "compile_seconds": compiling}


def compiled(results: Results) -> None:
    """Against torch.compile (max-autotune, a process of its own), forward and backward together, then forward alone."""
    chosen = gpu_shapes.cases(results.smoke)[:1] if results.smoke else gpu_shapes.cases(False)
    with_gradient = [case for case in chosen if f"{case.row}_backward" in _registry.rows()]
    work = [("op and gradient", case) for case in with_gradient] + [("op", case) for case in chosen]
    with elsewhere() as there:
        for kind, case in until(results, work[:1] if results.smoke else work, reserve=COMPILING):
            title = f"{case.row} {case.title}" + (", with gradients" if kind != "op" else "")
            with attempt(results, title):
                _beside_inductor(results, title, kind, case, there)
            gpu.release(results.device)


def _beside_inductor(results: Results, title: str, kind: str, case: gpu_shapes.Case, there) -> None:
    size, seconds = size_on(case, results.device), 0.005 if results.smoke else 0.3
    ours = KINDS[kind](case.row, size)
    backends = own_backends(ours)
    if not backends:
        results.not_run(title, "none of our backends serves it here")
        return
    call = functools.partial(call_of, Contender(ours.call, None, backends[0]))
    before = gpu.timed({"": call}, results.device, seconds)[""]
    try:
        if results.smoke:
            theirs = by_inductor(kind, case.row, size, seconds, AT_ONCE)
        else:
            theirs = there(by_inductor, kind, case.row, size, seconds, AT_ITS_BEST, seconds=COMPILING)
    except Exception as error:  # whatever it is, the other rows are measured
        results.not_run(title, f"Inductor: {str(error).partition(chr(10))[0]}")
        return
    after = gpu.timed({"": call}, results.device, seconds)[""]
    add_ratio(results, title, ours, kind, before, after, theirs)


def add_ratio(results, title, workload, kind, before, after, theirs) -> None:
    """How many times as long Inductor's kernels take; our time before and after it tells the noise."""
    ours, wanted = gpu.median(before + after), AGAINST_INDUCTOR if kind != "op" else None
    norms = workload.row.name in ("modulated_layer_norm", "gated_residual_norm")
    results.add(
        title, gpu.median(theirs["seconds"]) / ours, "x", wanted if norms else None,
        right=theirs["error"] <= workload.largest_error([]),
        note=f"ours {1e6 * ours:,.0f} us, again {gpu.median(after) / gpu.median(before):.3f} x",
        ours=spread(before + after), **{**theirs, "seconds": spread(theirs["seconds"])},
    )  # fmt: skip


PARTS = {
    "noise": Part(gpu_noise.noise, 60.0, anywhere=True),
    "repeatable": Part(gpu_noise.repeatable, 60.0),
    "rows": Part(rows, 420.0),
    "optimizer": Part(optimizer, 90.0),
    "attention": Part(gpu_attention.attention, 300.0),
    "compiled": Part(compiled, 450.0),
    "counters": Part(gpu_counters.counters, 240.0, usual=False),
    "code": Part(gpu_code.code, 120.0, usual=False, anywhere=True),
}

if __name__ == "__main__":
    raise SystemExit(main("ops", "benchmarks.gpu_ops", PARTS))

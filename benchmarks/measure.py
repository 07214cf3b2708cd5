"""Timing contenders side by side: warmed up, interleaved round by round, each with its error against float64."""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch.profiler import ProfilerActivity, profile

from benchmarks import ceilings
from benchmarks.plain import EAGER, plain_pytorch
from benchmarks.settings import FEWEST_ROUNDS, LONG, MOST_ROUNDS, WARM_UP
from benchmarks.worker import Worker, why_no_compiler
from benchmarks.workloads import Workload, relative_error
from lfm_fast import ops

FAST, AGAIN, REFERENCE = "fast path", "fast path, again", "reference path"
COMPILED, FAST_COMPILED = "torch.compile", "fast path + torch.compile"
PLAIN = "plain"  # among backends: the networks without the ops of the table
SLEEP = 2e-3  # after a turn elsewhere: threads of the other process go on spinning for about a millisecond

records: list[dict] = []  # of this session, in order: what the summary draws


class Turns:
    """One timed call at a time, with a backend forced or, with None, the one that the table chooses."""

    def __init__(self, call: Callable, backend: str | None):
        self.call, self.backend = call, backend
        with forced(backend):
            self.short = _seconds(call) < LONG  # the first call allocates, fills caches and chooses
            self.short = self.short and _seconds(call) < WARM_UP

    def __call__(self) -> float:
        with self.ready():
            return _seconds(self.call)

    @contextlib.contextmanager
    def ready(self):
        """The backend forced, and the process awake."""
        with forced(self.backend):
            start = time.perf_counter()
            while self.short and time.perf_counter() - start < WARM_UP:
                self.call()
            yield


@contextlib.contextmanager
def forced(backend: str | None):
    """Context in which the ops run on `backend`; None leaves the choice to the table, PLAIN takes them out."""
    if backend is None:
        yield
    elif backend == PLAIN:
        with plain_pytorch(), ops.use_backend("reference"):
            yield
    else:
        with ops.use_backend(backend):
            yield


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass
class Contender:
    """Who takes a turn, and what is known of it beside its times."""

    turn: Callable[[], float]
    facts: dict = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def compare(benchmark, title: str, workload: Workload, *, seconds: float, specification=None, compiled=()) -> None:
    """Time the workload's fast path with pytest-benchmark's fixture and every other contender in the same rounds.

    specification: what `catalogue.build` makes the workload of in another process; compiled: which of COMPILED and
    FAST_COMPILED run there, or a sentence why none does. seconds: how long the rounds may take together.
    """
    load = os.getloadavg()[0]
    truth = workload.truth()
    contenders, worker, not_run = _contenders(workload, truth, specification, compiled)
    fast = Turns(workload.call, None)
    times: list[float] = []

    def others_then_warm_up():
        order = list(contenders.values())
        first = len(times) % len(order)
        for contender in order[first:] + order[:first]:
            contender.seconds.append(contender.turn())
        with fast.ready():
            pass

    def call():
        times.append(_seconds(workload.call))

    rounds = _rounds(contenders, seconds)
    benchmark.pedantic(call, setup=others_then_warm_up, rounds=rounds, iterations=1)
    if worker is not None:
        worker.close()
    contenders = {FAST: Contender(fast, _facts(workload, FAST, workload.call, truth), times), **contenders}
    record = {
        "title": title,
        "precision": workload.precision,
        "bytes": workload.moved,
        "flops": workload.flops,
        "images": workload.images,
        "note": workload.note,
        "rounds": len(times),
        "load_average": [load, os.getloadavg()[0]],
        "noise": spread([a / b for a, b in zip(contenders[AGAIN].seconds, times)]),
        "not_run": not_run,
        "contenders": {name: _summary(c, times, workload) for name, c in contenders.items()},
    }
    benchmark.extra_info.update(record)
    records.append({"group": benchmark.group, **record})


def _contenders(workload, truth, specification, compiled):
    """All but the fast path itself: {name: Contender}, the other process or None, and {name: why it did not run}."""
    found = {REFERENCE: Contender(Turns(workload.call, "reference"))}
    with forced("reference"):
        found[REFERENCE].facts = _facts(workload, REFERENCE, workload.call, truth)
    found[AGAIN] = Contender(Turns(workload.call, None))
    if workload.has_network:
        found[EAGER] = Contender(Turns(workload.call, PLAIN))
        with forced(PLAIN):
            found[EAGER].facts = _facts(workload, EAGER, workload.call, truth, workload.result)
    for name, (call, result) in workload.others().items():
        found[name] = Contender(Turns(call, None), _facts(workload, name, call, truth, result))
    reason = compiled if isinstance(compiled, str) else why_no_compiler()
    if reason or not compiled:
        return found, None, {COMPILED: reason} if reason else {}
    backends = {name: PLAIN if name == COMPILED else None for name in compiled}
    worker = Worker(specification, tuple(backends.values()))
    for name, backend in backends.items():
        error = relative_error(worker.results[backend], truth)
        found[name] = Contender(_elsewhere(worker, backend), {"error": error, **worker.facts[backend]})
    return found, worker, {}


def _elsewhere(worker: Worker, backend: str | None) -> Callable[[], float]:
    def turn():
        time.sleep(SLEEP)
        seconds = worker.turn(backend)
        time.sleep(SLEEP)
        return seconds

    return turn


def _facts(workload, name, call, truth, result=None) -> dict:
    own = name in (FAST, REFERENCE)
    facts = {"peak_bytes": peak_bytes(call)}
    if truth is not None and (own or result is not None):
        got = workload.result() if own else result()
        facts["error"] = relative_error(got, truth if own else truth[: len(got)])  # others may leave statistics out
    if name in getattr(workload, "nfe", {}):
        facts["nfe"] = workload.nfe[name]
    return facts


def _rounds(contenders, seconds: float) -> int:
    """How many rounds fit, from one turn of each; the fast path counts as its second contender."""
    start = time.perf_counter()
    for contender in [*contenders.values(), contenders[AGAIN]]:
        contender.turn()
    round_seconds = time.perf_counter() - start
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / round_seconds)))


def spread(values: list[float]) -> dict:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high, "least": min(values)}


def _summary(contender: Contender, fast_times: list[float], workload: Workload) -> dict:
    """Times in seconds; ratio: this contender's time over the fast path's of the same round (above 1: slower)."""
    seconds = spread(contender.seconds)
    ratio = spread([a / b for a, b in zip(contender.seconds, fast_times)])
    return {"seconds": seconds, "ratio": ratio, **contender.facts, **_rates(workload, seconds["median"])}


def _rates(workload: Workload, seconds: float) -> dict:
    found = {}
    if workload.moved:
        found["bytes_per_second"] = workload.moved / seconds
    if workload.flops:
        found["flops_per_second"] = workload.flops / seconds
    if workload.images:
        found["images_per_second"] = workload.images / seconds
    return found


def compare_with_ceilings() -> None:
    """Put each rate's share of the machine's ceiling into the records; at the end, when the ceilings are known best."""
    ceiling = ceilings.measure()
    for record in records:
        for contender in record["contenders"].values():
            if "bytes_per_second" in contender:
                contender["share_of_copy"] = contender["bytes_per_second"] / ceiling["copy_bytes_per_second"]
            if "flops_per_second" in contender:
                best = ceiling["gemm_flops_per_second"][record["precision"]]
                contender["share_of_gemm"] = contender["flops_per_second"] / best


def peak_bytes(call: Callable) -> int:
    """The most memory that one call holds at once beside what was there before, by PyTorch's own accounting."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak

"""Timing contenders side by side: warmed up, interleaved round by round, each with its error against float64."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.profiler import ProfilerActivity, profile

from benchmarks import ceilings, worker
from benchmarks.names import AGAIN, COMPILED, FAST, REFERENCE
from benchmarks.plain import forced
from benchmarks.settings import FEWEST_LONG_ROUNDS, FEWEST_ROUNDS, LONG, LONG_ROUND, MOST_ROUNDS, WARM_UP
from benchmarks.workloads import Contender, Workload, relative_error

SLEEP = 2e-3  # after a turn elsewhere: threads of the other process go on spinning for about a millisecond
SHARES_KEPT = 8  # operators of a profile that are named, the rest being one

records: list[dict] = []  # of this session, in order: what the summary draws


class Turns:
    """One timed call of a contender at a time, on its backend."""

    def __init__(self, contender: Contender, warm_up: bool = True):
        self.call, self.backend = contender.call, contender.backend
        self.seconds, self.short = 0.0, False
        if warm_up:
            self._warm_up()

    def _warm_up(self) -> None:
        with forced(self.backend):
            self.seconds = _seconds(self.call)  # the first call allocates, fills caches and chooses
            self.short = self.seconds < LONG
            if self.short:
                self.seconds = _seconds(self.call)
                self.short = self.seconds < WARM_UP

    def __call__(self) -> float:
        with self.ready():
            return _seconds(self.call)

    @contextmanager
    def ready(self):
        """The backend forced, and the process awake."""
        with forced(self.backend):
            start = time.perf_counter()
            while self.short and time.perf_counter() - start < WARM_UP:
                self.call()
            yield


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass
class Entrant:
    """A contender in a comparison: what takes a turn, how long one is, and what is known of it."""

    turn: Callable[[], float]
    expected: float
    facts: dict
    seconds: list[float] = field(default_factory=list)


def compare(benchmark, title: str, workload: Workload, *, seconds: float, specification=None, compiled=()) -> None:
    """Time the workload's fast path with pytest-benchmark's fixture and every other contender in the same rounds.

    specification: what `catalogue.build` makes the workload of in another process; compiled: the contenders that
    Inductor compiles there, or a sentence why there are none. seconds: how long the rounds may take together.
    Raises AssertionError, when all is recorded, if a contender's error is more than rounding explains.
    """
    load = os.getloadavg()[0]
    contenders = workload.contenders()
    facts = {name: _facts(workload, name, contender) for name, contender in contenders.items()}
    turns = {name: Turns(contender, workload.rounds is None) for name, contender in contenders.items()}
    entrants = {name: Entrant(turn, turn.seconds, facts[name]) for name, turn in turns.items()}
    elsewhere, not_run = _compiled(workload, specification, compiled)
    entrants |= elsewhere
    fast, others = entrants[FAST], [entrant for name, entrant in entrants.items() if name != FAST]

    def others_then_warm_up():
        first = len(fast.seconds) % len(others)
        for entrant in others[first:] + others[:first]:
            entrant.seconds.append(entrant.turn())
        with fast.turn.ready():
            pass

    def call():
        fast.seconds.append(_seconds(fast.turn.call))

    benchmark.pedantic(call, setup=others_then_warm_up, rounds=_rounds(workload, entrants, seconds), iterations=1)
    if elsewhere:
        worker.shared().forget()
    record = _record(title, workload, entrants, load, not_run)
    benchmark.extra_info.update(record)
    records.append({"group": benchmark.group, **record})
    check_errors(record)


def _compiled(workload, specification, names) -> tuple[dict[str, Entrant], dict[str, str]]:
    """The contenders of the other process, and {name: why it did not run}."""
    reason = names if isinstance(names, str) else worker.why_no_compiler()
    if reason or not names:
        return {}, {COMPILED: reason} if reason else {}
    found = {}
    for name, result, facts in worker.shared().build(specification, names):
        truth = workload.truth_of(name)
        turn = _elsewhere(name)
        found[name] = Entrant(turn, turn(), {"error": relative_error(result, truth[: len(result)]), **facts})
    return found, {}


def _elsewhere(name: str) -> Callable[[], float]:
    def turn():
        time.sleep(SLEEP)
        seconds = worker.shared().turn(name)
        time.sleep(SLEEP)
        return seconds

    return turn


def _facts(workload: Workload, name: str, contender: Contender) -> dict:
    """Error, memory and operators of a contender of this process."""
    if name == AGAIN:
        return {}
    facts = {}
    with forced(contender.backend):
        truth = workload.truth_of(name) if contender.result is not None else None
        if truth is not None:
            got = contender.result()
            whole = name in (FAST, REFERENCE)  # others may leave statistics out
            facts["error"] = relative_error(got, truth if whole else truth[: len(got)])
        if workload.measures_memory:
            call = contender.peak or contender.call
            if contender.result is None:
                call()  # what only the first call holds is not counted
            facts["peak_bytes"], shares = profiled(call)
            if name in workload.profiled:
                facts["shares"] = shares
    return facts


def _rounds(workload: Workload, entrants: dict[str, Entrant], seconds: float) -> int:
    if workload.rounds is not None:
        return workload.rounds
    round_seconds = sum(entrant.expected for entrant in entrants.values())
    fewest = FEWEST_LONG_ROUNDS if round_seconds > LONG_ROUND else FEWEST_ROUNDS
    return max(fewest, min(MOST_ROUNDS, int(seconds / round_seconds)))


def _record(title: str, workload: Workload, entrants: dict[str, Entrant], load: float, not_run: dict) -> dict:
    times = entrants[FAST].seconds
    noise = [again / first for again, first in zip(entrants[AGAIN].seconds, times)]
    return {
        "title": title,
        "precision": workload.precision,
        "bytes": workload.moved,
        "flops": workload.flops,
        "images": workload.images,
        "note": workload.note,
        "rounds": len(times),
        "load_average": [load, os.getloadavg()[0]],
        "noise": spread(noise),
        "not_run": not_run,
        "largest_error": workload.largest_error([e.facts["error"] for e in entrants.values() if "error" in e.facts]),
        "contenders": {name: _summary(name, entrant, times, workload) for name, entrant in entrants.items()},
    }


def check_errors(record: dict) -> None:
    """Fail a workload in which somebody is fast and wrong."""
    largest = record["largest_error"]
    errors = {name: c["error"] for name, c in record["contenders"].items() if "error" in c}
    wrong = [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= largest]
    assert not wrong, f"{record['title']}: {', '.join(wrong)}; no more than {largest:.1e} is rounding"


def spread(values: list[float]) -> dict:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high, "least": min(values)}


def _summary(name: str, entrant: Entrant, fast_times: list[float], workload: Workload) -> dict:
    """Times in seconds; ratio: this contender's time over the fast path's of the same round (above 1: slower)."""
    seconds = spread(entrant.seconds)
    ratio = spread([a / b for a, b in zip(entrant.seconds, fast_times)])
    rates = _rates(workload, seconds["median"])
    return {"seconds": seconds, "ratio": ratio, **entrant.facts, **rates, **workload.facts(name, seconds["median"])}


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


def profiled(call: Callable) -> tuple[int, dict[str, float]]:
    """(bytes, {operator: share of the time}) of one call, by PyTorch's own accounting.

    The bytes are the most that it holds at once beside what was there before; the shares are of the operators' own
    time, children not counted, the largest first and the rest together as "other".
    """
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
    return peak, _shares({e.key: e.self_cpu_time_total for e in profiler.key_averages()})


def _shares(times: dict[str, float]) -> dict[str, float]:
    total = sum(times.values())
    largest = sorted(times, key=times.get, reverse=True)[:SHARES_KEPT]
    found = {name: times[name] / total for name in largest if times[name]}
    return {**found, "other": 1 - sum(found.values())} if found else {}

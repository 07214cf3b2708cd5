"""What the benchmarks for a GPU share: facts of the device, timing by its clock, result files, and their table.

A benchmark is a set of named parts (see `gpu_parts.main`). A part adds lines to its `Results` as it measures them: what
was reached, and what is wanted. The file is written anew with each line, so that a part which is stopped loses none.
Everything runs on a CPU as well, in a tiny form (`--smoke`), whose numbers mean nothing.
"""

import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.measure import spread
from lfm_fast import _library
from lfm_fast.checkpoint import atomic_write

PACKAGES = ("torch", "triton", "xformers", "diffusers", "torchdiffeq", "numpy")
_WARM_UPS = 3
_FEWEST, _MOST = 5, 200  # rounds
_QUEUED = 256  # calls that the host issues ahead of the device: its queue of launches is not much longer than 1,000
_CYCLES = 2.0e9  # of the device in a second, at most: how long it has to sleep until the host is ahead
_LARGEST_SLEEP = 0.2  # seconds; a call that the host takes longer for has work of its own


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def about(arguments: list[str]) -> dict:
    """The device, driver, versions and commit: what a number means nothing without."""
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": arguments,
        "device": "cpu",
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "commit": _said("git", "rev-parse", "HEAD"),
        "changed": bool(_said("git", "status", "--porcelain", "--untracked-files=no")),
        "why_no_cpp": _library.load(),
        "why_no_cuda": _library.load_cuda(),
    }
    if device().type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": torch.cuda.get_device_name(0),
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
            "cuda": torch.version.cuda,
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return found


def headline(about: dict) -> str:
    words = [about["device"]]
    if "driver" in about:
        words += [f"driver {about['driver']}", f"CUDA {about['cuda']}"]
    words += [f"{name} {version}" for name, version in about["versions"].items()]
    commit = f"commit {about['commit'][:12] or 'unknown'}"
    return ", ".join([*words, commit + (" and changes" if about["changed"] else "")])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str:
    """The first line of what a program says, "" where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip()


class Results:
    """The lines of one part of a benchmark, in a file that other parts have written theirs to.

    file: {"about", "parts": {part: {"status", "seconds", "lines"}}}, made where it is not there. seconds: after which
    the part should have ended by itself; `left` says how many remain. smoke: sizes and times as small as they go.
    """

    def __init__(self, file: Path, part: str, seconds: float, smoke: bool = False, arguments: tuple[str, ...] = ()):
        self.file, self.part, self.smoke, self.device = file, part, smoke, device()
        self._began, self._seconds, self._lines = time.monotonic(), seconds, []
        self._about = {**about(list(arguments)), "smoke": smoke}
        self.write("stopped")

    def left(self) -> float:
        return self._seconds - (time.monotonic() - self._began)

    def add(
        self, title: str, reached: float, unit: str, wanted: float | None = None, *,
        at_most: bool = False, right: bool = True, note: str = "", **facts,
    ) -> None:  # fmt: skip
        """A figure, and the one that is wanted (None: it is only told); at_most: wanted is a limit from above.

        right: False where what was timed computes something else than it should. note: a few words that the table has
        beside it. facts: whatever else is known, for the file alone, such as `seconds=spread(...)`.
        """
        met = None if wanted is None else bool(reached <= wanted if at_most else reached >= wanted)
        figures = {"reached": reached, "unit": unit, "wanted": wanted, "at_most": at_most, "met": met, "right": right}
        self._take({"title": title, **figures, "note": note, "facts": facts})

    def not_run(self, title: str, why: str) -> None:
        """Something that could not be measured; why: one sentence."""
        self._take({"title": title, "why_not": why})

    def _take(self, line: dict) -> None:
        self._lines.append(line)
        print("  ".join(cell for cell in row(self.part, line) if cell), flush=True)
        self.write("stopped")

    def write(self, status: str) -> None:
        """status: "ok", "failed", or, until it is known, "stopped"."""
        part = {"status": status, "seconds": time.monotonic() - self._began, "lines": self._lines}
        found = read(self.file) if self.file.is_file() else {"parts": {}}
        replace(self.file, {**found, "about": self._about, "parts": {**found["parts"], self.part: part}})


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def replace(file: Path, found: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        Path(temporary).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


COLUMNS = ("part", "what", "reached", "wanted", "")


def row(part: str, line: dict) -> tuple[str, ...]:
    """A line of the table."""
    if "why_not" in line:
        return (part, line["title"], "not run", "", line["why_not"])
    unit = line["unit"]
    wanted = "" if line["wanted"] is None else f"{'<=' if line['at_most'] else '>='} {number(line['wanted'])} {unit}"
    verdict = {None: "", True: "met", False: "BELOW" if not line["at_most"] else "ABOVE"}[line["met"]]
    reached = f"{number(line['reached'])} {unit}"
    words = [verdict if line["right"] else "WRONG RESULT", line["note"]]
    return (part, line["title"], reached, wanted, "; ".join(word for word in words if word))


def number(value: float) -> str:
    """Three digits, more of larger numbers."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(found: dict) -> str:
    """The short table of a result file: a line for each figure, then one for each part that did not end well."""
    rows = [COLUMNS, *(row(part, line) for part, of in found["parts"].items() for line in of["lines"])]
    widths = [max(len(cells[k]) for cells in rows) for k in range(len(COLUMNS))]
    lines = [headline(found["about"])]
    if found["about"]["smoke"]:
        lines.append("SMOKE: whether it all runs; these numbers mean nothing.")
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in rows]
    for part, of in found["parts"].items():
        lines.append(f"{part}: {of['status']} after {of['seconds']:.0f} s, {len(of['lines'])} lines")
    return "\n".join(lines)


def well(found: dict) -> bool:
    """Whether every part ended well and computed what it should (not whether everything wanted was reached)."""
    parts = found["parts"].values()
    return all(of["status"] == "ok" and all(line.get("right", True) for line in of["lines"]) for of in parts)


def timed(calls: dict[str, Callable], device, seconds: float, fewest: int = _FEWEST) -> dict[str, list[float]]:
    """Seconds that each call takes the device, in turns, round after round, for as long as `seconds`.

    On CUDA between events. The device sleeps first while the host issues a few rounds, so that what the host takes for
    a call is not in its time: what only waits for the host shows in wall-clock time (`graphs.in_turns`).
    """
    for call in [*calls.values()] * _WARM_UPS:
        call()
    wait(device)
    start = time.perf_counter()
    for call in calls.values():
        call()
    issued = time.perf_counter() - start
    wait(device)
    together = time.perf_counter() - start
    rounds = max(fewest, min(_MOST, int(seconds / max(together, 1e-9))))
    found = {name: [] for name in calls}
    at_once = max(1, min(_QUEUED // len(calls), 20))
    for first in range(0, rounds, at_once):
        batch = range(first, min(first + at_once, rounds))
        sleep = min(1.5 * issued * len(batch), _LARGEST_SLEEP)
        for name, times in _rounds(calls, batch, device, sleep).items():
            found[name] += times
    return found


def _rounds(calls: dict[str, Callable], rounds: range, device, sleep: float) -> dict[str, list[float]]:
    """Every round begins with another call."""
    names = list(calls)
    if device.type == "cuda":
        torch.cuda._sleep(int(sleep * _CYCLES))
    taken = []
    for k in rounds:
        for name in names[k % len(names) :] + names[: k % len(names)]:
            start = mark(device)
            calls[name]()
            taken.append((name, start, mark(device)))
    wait(device)
    found = {name: [] for name in names}
    for name, start, end in taken:
        found[name].append(between(start, end))
    return found


def mark(device):
    """A moment of the device's clock; how long it was between two of them says `between`, once the device is there."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device) -> None:
    """Give back what the allocator keeps of tensors that are gone."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def ratio(times: list[float], yardstick: list[float]) -> dict:
    """Median and quartiles of times over those of the same rounds of another: above 1 is slower than it."""
    return spread([a / b for a, b in zip(times, yardstick)])


@functools.cache
def ceilings(smoke: bool = False) -> dict:
    """{"copy_bytes_per_second", "gemm_flops_per_second": {name: ...}} of this device, of drawn numbers, medians.

    The copy's bytes are read and written ones; the products are of square matrices, in TF32 as well on CUDA.
    """
    where = device()
    on_gpu = where.type == "cuda"
    numel, side = (2**20, 256) if smoke else (2**30, 8192) if on_gpu else (2**26, 2048)
    source = torch.randn(numel, device=where)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source)}
    a, b = (torch.randn(side, side, device=where) for _ in range(2))
    low = a.to(torch.bfloat16), b.to(torch.bfloat16)
    calls["bfloat16"] = lambda: low[0] @ low[1]
    calls["float32"] = functools.partial(_product, a, b, False)
    if on_gpu:
        calls["tf32"] = functools.partial(_product, a, b, True)
    found = {name: median(times) for name, times in timed(calls, where, 0.01 if smoke else 1.0).items()}
    copied = 2 * source.numel() * source.element_size() / found.pop("copy")
    return {
        "copy_bytes_per_second": copied,
        "gemm_flops_per_second": {name: 2 * side**3 / seconds for name, seconds in found.items()},
    }


def _product(a: torch.Tensor, b: torch.Tensor, tf32: bool) -> torch.Tensor:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        return a @ b
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def peak_bytes(call: Callable, device) -> int | None:
    """What one call holds on a GPU beside what was there before."""
    if device.type != "cuda":
        return None
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def results_folder() -> Path:
    return Path(os.environ.get("LFM_FAST_GPU_RESULTS") or "test-results/gpu")

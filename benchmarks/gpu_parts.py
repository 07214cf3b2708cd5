"""Running the parts of a benchmark for a GPU: each in a process of its own, stopped at its limit of time.

`main` is the command line that all of them have:

    python -m benchmarks.gpu_ops [PART ...] [--smoke] [--seconds N] [--output FILE.json]
    python -m benchmarks.gpu_ops --table FILE.json
"""

import argparse
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks import gpu

_GRACE = 20.0  # seconds a part gets beyond its own before it is stopped
_LONGEST_REASON = 200  # characters


@dataclass(frozen=True)
class Part:
    """run adds its lines to the Results it is given and ends after about `seconds`; where no part is named, those run
    that are `usual`. anywhere: it is worth its time without a GPU."""

    run: Callable[[gpu.Results], None]
    seconds: float
    usual: bool = True
    anywhere: bool = False


def main(name: str, module: str, parts: dict[str, Part], arguments: list[str] | None = None) -> int:
    """name: of the result file, DATE-DEVICE-NAME.json; module: what `python -m` runs again for each part.

    Returns 0 where every part ended well and computed what it should.
    """
    given = _parser(name, parts).parse_args(arguments)
    if given.table is not None:
        print(gpu.table(gpu.read(given.table)))
        return 0
    given.output = given.output or gpu.results_folder() / file_name(name)
    chosen = given.parts or [part for part in parts if parts[part].usual]
    unknown = [part for part in chosen if part not in parts]
    if unknown:
        print(f"There is no part {unknown[0]!r}; there are {', '.join(parts)}.", file=sys.stderr)
        return 2
    if gpu.device().type == "cpu" and not given.smoke and not all(parts[part].anywhere for part in chosen):
        print("PyTorch sees no GPU here: --smoke runs as little as there is of each part without one.", file=sys.stderr)
        return 2
    if not given.here:  # what runs below has a group of its own, which `_end` ends: a kill has to come to it
        signal.signal(signal.SIGTERM, _leave)
    for part in chosen:
        seconds = given.seconds or parts[part].seconds
        print(f"-- {part}, {seconds:.0f} s", flush=True)
        if given.here or given.smoke:
            _here(given, part, parts[part].run, seconds)
        else:
            told = [part, "--here", "--seconds", str(seconds), "--output", str(given.output)]
            stopped(given.output, part, run([sys.executable, "-m", module, *told], seconds + _GRACE))
    if given.here:
        return 0
    found = gpu.read(given.output)
    print(gpu.table(found))
    print(f"written to {given.output}")
    return 0 if gpu.well(found) else 1


def _parser(name: str, parts: dict[str, Part]) -> argparse.ArgumentParser:
    named = [f"{part}{'' if of.usual else ' (only where named)'}" for part, of in parts.items()]
    words = [f"  {each:<30} {inspect.getdoc(of.run).partition(chr(10))[0]}" for each, of in zip(named, parts.values())]
    parser = argparse.ArgumentParser(
        description="\n".join([f"{name} on a GPU, in parts:", *words]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="which parts, in this order")
    parser.add_argument("--smoke", action="store_true", help="as little as there is of each, on whatever device")
    parser.add_argument("--seconds", type=float, help="for each part, instead of its own")
    parser.add_argument("--output", type=Path, help="result file; what other parts wrote there stays")
    parser.add_argument("--table", type=Path, help="only print this result file's table")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser


def file_name(name: str) -> str:
    """Of this day and device."""
    device = "cpu"
    if gpu.device().type == "cuda":
        import torch

        device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return f"{date.today().isoformat()}-{device}-{name}.json"


def _here(given, part: str, run: Callable, seconds: float) -> None:
    results = gpu.Results(given.output, part, seconds, given.smoke, (part,))
    try:
        run(results)
    except BaseException:
        results.write("failed")
        raise
    results.write("ok")


def run(command: list[str], seconds: float) -> str | None:
    """Run a program and whatever it starts, for so long; returns why it did not end well, or None."""
    with grouped(command) as process:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"out of time after {seconds:g} s"
    return None if status == 0 else f"failed with status {status}"


@contextmanager
def grouped(command: list[str], **how):
    """Within: a program in a group of its own, and in the end, however it comes, all that the group has left.

    No session of its own: what ends this program's whole session, such as a lost terminal, ends it as well.
    """
    process = subprocess.Popen(command, preexec_fn=os.setpgrp, **how)
    try:
        yield process
    finally:
        _end(process)


def _leave(*_) -> None:
    """As an exception, so that what is to be ended in the end is."""
    sys.exit(128 + signal.SIGTERM)


def _end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stopped(file: Path, part: str, why: str | None) -> None:
    """Put it into the result file that a part did not end well, whose lines so far stand there."""
    if why is None:
        return
    found = gpu.read(file) if file.is_file() else {"about": {**gpu.about([part]), "smoke": False}, "parts": {}}
    before = found["parts"].get(part, {"seconds": 0.0, "lines": []})
    gpu.replace(file, {**found, "parts": {**found["parts"], part: {**before, "status": why}}})


@contextmanager
def attempt(results: gpu.Results, title: str):
    """Within: what goes wrong is the reason why `title` was not run, and no reason to stop what comes after it."""
    try:
        yield
    except Exception as error:
        results.not_run(title, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:_LONGEST_REASON])
        with suppress(Exception):  # a device that has failed for good fails here too
            gpu.release(results.device)


def each(results: gpu.Results, title: str, items: dict, function: Callable) -> dict:
    """{name: function(item)} of those for which it raises nothing; of the others it is said why they were not run."""
    found = {}
    for name, item in items.items():
        with attempt(results, f"{title}, {name}"):
            found[name] = function(item)
    return found


def until(results: gpu.Results, work: list, reserve: float = 0.0):
    """The items of `work` as long as time is left, those first that matter most; says how many were left out.

    reserve: seconds that an item may take.
    """
    for k, item in enumerate(work):
        if results.left() < reserve:
            results.not_run(f"{len(work) - k} more", f"no time was left for them in {results.part}")
            return
        yield item

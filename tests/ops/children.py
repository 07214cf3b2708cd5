"""Tests that may take the interpreter along run in a child process, which writes down what it is about to do."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("baseline", "avx2", "avx512")


class Journal:
    """The line of the call now running; the parent reads the last one when the child has died."""

    def __init__(self, path):
        self.path = Path(path)

    def __call__(self, line):
        self.path.write_text(str(line), encoding="utf-8")


def run_child(code, journal, seconds, **environment):
    """Run Python code beside the tests of this folder: its standard output, or an AssertionError that names the call.

    None where this machine has no such CPU level.
    """
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    began = time.monotonic()
    try:
        child = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", code],
            capture_output=True, text=True, env=variables, cwd=ROOT, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end after {seconds} s in {Path(journal).read_text()}") from None
    if "which this machine does not have" in child.stderr:
        return None
    last = Path(journal).read_text() if Path(journal).exists() else "nothing yet"
    took = time.monotonic() - began
    assert child.returncode == 0, (
        f"ended with {child.returncode} after {took:.0f} s in {last}:\n{child.stdout}{child.stderr[-3000:]}"
    )
    return child.stdout

"""The Triton kernels without a GPU: run by Triton's interpreter, compiled by its compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).with_name("interpreter")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_interpreted(marks):
    """In a process of its own: see interpreter/conftest.py."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marks, "--tb=short", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, cwd=INTERPRETED.parents[2], capture_output=True, text=True)
    print(result.stdout[-20_000:], result.stderr[-5_000:], sep="\n")
    assert result.returncode == 0, "a kernel fails in the interpreter: its report is above"


def test_every_row_in_the_interpreter():
    run_interpreted("not slow")


@pytest.mark.slow
@pytest.mark.fuzz
def test_very_many_calls_in_the_interpreter():
    run_interpreted("slow")

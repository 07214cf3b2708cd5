"""What a run of the benchmarks measures, and for how long: the full set, or the quick one that a CI run can afford."""

import os

_MODES = ("full", "quick")
MODE = os.environ.get("LFM_FAST_BENCH", "full")
if MODE not in _MODES:
    raise ValueError(f"LFM_FAST_BENCH is {MODE!r}, expected one of {', '.join(_MODES)}.")
QUICK = MODE == "quick"

# A call shorter than this follows untimed ones of this length: otherwise it would measure how the process wakes up.
WARM_UP = 1e-3
LONG = 0.1  # a call from here on is warm after one

FEWEST_ROUNDS = 3 if QUICK else 5
MOST_ROUNDS = 50 if QUICK else 300


def seconds_for(full: float, quick: float) -> float:
    """Time to spend on the rounds of one workload."""
    return quick if QUICK else full

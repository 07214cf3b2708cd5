"""What a run of the benchmarks measures, and for how long.

standard: a choice of sizes, meant to end within 10 minutes on two cores; full: everything; quick: whether it all runs
(CI).
"""

import os

_MODES = ("standard", "full", "quick")
MODE = os.environ.get("LFM_FAST_BENCH", "standard")
if MODE not in _MODES:
    raise ValueError(f"LFM_FAST_BENCH is {MODE!r}, expected one of {', '.join(_MODES)}.")
QUICK, FULL = MODE == "quick", MODE == "full"

# A call shorter than this follows untimed ones of this length: otherwise it would measure how the process wakes up.
WARM_UP = 1e-3
LONG = 0.1  # a call from here on is warm after one

FEWEST_ROUNDS, FEWEST_LONG_ROUNDS = (3, 2) if QUICK else (5, 3)
LONG_ROUND = 30.0 if FULL else 10.0  # seconds
MOST_ROUNDS = FEWEST_ROUNDS if QUICK else 300


def seconds_for(full: float, quick: float) -> float:
    """Time to spend on the rounds of one workload; standard lies between the two."""
    return {"quick": quick, "standard": (full + quick) / 2, "full": full}[MODE]

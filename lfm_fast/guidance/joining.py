"""Whether both velocities of a guided evaluation come from one forward of 2B rows, or from one after the other.

One forward is the default. For a DiT-S/2 of 256 pixels on one CPU core of a busy machine, two took as long in float32
(1 and 4 samples: medians of 0.91 and 0.95 of the time, minima of 1.03 and 1.05) and in bfloat16 1.03 to 1.15 of it (1,
4 and 16 samples, medians).
"""

import torch

from lfm_fast.ops import _measured

_TABLE = "guidance"
_CLEARLY = 0.95  # the times of two runs of one thing differ by this much


def joining_pays(network, z, rows, runs):
    """Whether one forward of all rows is the faster way; both give the same velocities up to rounding.

    runs: "joint" and "apart", functions of nothing. It is, but where they were timed and "apart" clearly wins. They are
    timed once for a kind of call, and remembered; `lfm_fast.ops._measured` says when: by default on CUDA only. Ask only
    for a network that has a sampling form: a further call of another model might change what it computes next.
    """
    key = (z.shape, z.device, None if rows is None else len(rows.numbers))
    if key not in network.joins:
        network.joins[key] = _measured_choice(network, z, key[-1], runs)
    return network.joins[key]


def _measured_choice(network, z, count, runs):
    key = _key(network, z, count)
    times, calls = _measured.remembered(_TABLE).get(key), network.count.calls
    if times is None and _measured.may_measure((z,)):
        times = _measured.measure(_TABLE, key, runs, z.device)
        network.count.calls = calls  # the integration's own
    joint, apart = ((times or {}).get(name) for name in ("joint", "apart"))
    if not isinstance(apart, float):
        return True
    return isinstance(joint, float) and joint * _CLEARLY <= apart


def _key(network, z, count):
    size = sum(p.numel() for p in network.model.parameters())
    rows = [_measured.bucket(n) for n in (len(z), len(z) if count is None else count)]
    kind = f"{type(network.model).__name__} of {size} {network.dtype}".replace("torch.", "")
    sizes = "x".join(map(str, z.shape[1:]))
    return f"torch {torch.__version__}, {_measured.device_name(z.device)}: {kind}, {rows[0]} + {rows[1]} of {sizes}"

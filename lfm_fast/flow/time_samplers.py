"""How training draws t: one t per SAMPLE, from stream 1 of its sample number.

A time sampler turns what the counter gives into t in (0, 1); a new one is a function and one line in TIME_SAMPLERS.
"""

import torch

from lfm_fast import ops
from lfm_fast.flow.checks import check_times
from lfm_fast.flow.noise import check_seed
from lfm_fast.ops.streams import STREAM_TIME


def uniform(index, seed):
    """t ~ U[0, 1)."""
    return ops.philox_uniform(index, 1, seed, STREAM_TIME)[:, 0]


def logit_normal(index, seed):
    """t = sigmoid(n), n ~ N(0, 1): more weight on the middle (Esser et al., arXiv 2403.03206, section 3.1)."""
    return torch.sigmoid(ops.philox_normal(index, 1, seed, stream=STREAM_TIME)[:, 0])


TIME_SAMPLERS = {"uniform": uniform, "logit_normal": logit_normal}


def draw(name, index, seed, t_min=0.0, t_max=1.0):
    """t (B,) float32 in [t_min, t_max] for the samples numbered `index` (B,) int64.

    name: a row of TIME_SAMPLERS, or a callable (index, seed) -> (B,) in [0, 1].
    Raises ValueError for an unknown name, or a callable that returns anything else.
    """
    seed = check_seed(seed)
    if callable(name):
        t = name(index, seed)
        check_times(t, index.shape[0], 0.0, 1.0, source="What time_sampler returned")
    elif isinstance(name, str) and name in TIME_SAMPLERS:
        t = TIME_SAMPLERS[name](index, seed)
    else:
        raise ValueError(f"Unknown time sampler {name!r}; there are {', '.join(TIME_SAMPLERS)}, or give a callable.")
    return t if (t_min, t_max) == (0.0, 1.0) else t_min + (t_max - t_min) * t

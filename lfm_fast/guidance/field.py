"""The field that a solver integrates: a network under a guidance object."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a guidance object may ask about the integration it is begun for."""

    model: Any
    batch_size: int
    y: torch.Tensor | None = None  # (B,) labels
    null_label: int | None = None
    path: Any  # a Path
    method: str
    adaptive: bool = False  # steps are tried, and of each sample its own


class GuidedField:
    """The field (see lfm_fast.solvers) of a network under a guidance object; counts its evaluations in `nfe`."""

    def __init__(self, network, guidance):
        self.network, self.guidance, self.nfe = network, guidance, 0

    def __call__(self, t, z):
        return self._evaluate(t, z)

    def prepare(self, times):
        """Announce the times that `at` will be asked for, floats in order."""
        prepare = getattr(self.guidance, "prepare", None)
        if prepare is None:
            self.network.prepare(times, getattr(self.guidance, "guided", True))
        else:
            prepare(self.network, times)

    def at(self, time):
        """The field at one time of the whole batch, known on the host."""
        return partial(self._evaluate, time=time)

    def watching(self, on_step):
        """on_step(step, t, z), or None, for the solver to call after each step: a guidance that counts steps learns of
        them too."""
        stepped = getattr(self.guidance, "stepped", None)
        if stepped is None:
            return on_step

        def both(step, t, z):
            stepped()
            return None if on_step is None else on_step(step, t, z)

        return both

    def _evaluate(self, t, z, time=None):
        self.nfe += 1
        return self.guidance(self.network, t, z, time=time)

"""The field that a solver integrates: a network under a guidance object."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lfm_fast.guidance.network import Rows


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
        self.network, self.guidance = network, guidance

    def __call__(self, t, z):
        return self._evaluate(t, z)

    @property
    def nfe(self):
        """Evaluations so far, of the whole batch or of some of its samples."""
        return self.network.count.nfe

    @property
    def selects(self):
        """Whether `select` will do: not where the model takes further arguments, which are of the whole batch."""
        return self.network.selects

    def select(self, numbers, index):
        """The field of some samples of the whole batch, by their numbers on the host and (R,) int64 on the device.

        t and z hold these samples only then. What it costs is counted together with the whole.
        """
        part = copy.copy(self)
        part.network = self.network.select(Rows(numbers, index))
        return part

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

    def at_each(self, times):
        """The field where every sample has a time of its own and the host knows them, (B,) float64 of NumPy."""
        return partial(self._evaluate, times=times)

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

    def _evaluate(self, t, z, time=None, times=None):
        self.network.times = times
        self.network.count.nfe += 1
        return self.guidance(self.network, t, z, time=time)

"""The field that a solver integrates: a network under a guidance object."""

from functools import partial


class GuidedField:
    """The field (see lfm_fast.solvers) of a network under a guidance object; counts its evaluations in `nfe`."""

    def __init__(self, network, guidance):
        self.network, self.guidance, self.nfe = network, guidance, 0

    def __call__(self, t, z):
        return self._evaluate(t, z)

    def prepare(self, times):
        """Announce the times that `at` will be asked for, floats in order."""
        self.network.prepare(times, getattr(self.guidance, "guided", True))

    def at(self, time):
        """The field at one time of the whole batch, known on the host."""
        return partial(self._evaluate, time=time)

    def _evaluate(self, t, z, time=None):
        self.nfe += 1
        return self.guidance(self.network, t, z, time=time)

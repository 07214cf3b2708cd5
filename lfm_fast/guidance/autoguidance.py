"""Guidance of a network by a weaker one."""

from lfm_fast.flow.checks import check_model
from lfm_fast.flow.paths import agree, path_of
from lfm_fast.guidance.linear import LinearGuidance


class Autoguidance(LinearGuidance):
    """Away from a weaker network: v = scale v_model + (1 - scale) v_weak, both under the same labels, or none.

    The forwards of both count; outside the interval, and for samples of scale 1, the weaker one is not asked.

    Args:
        weak_model: the weaker velocity, called as the model is: smaller, or trained for less time, on the same data.
        scale, interval: as of LinearGuidance.

    Raises ValueError as LinearGuidance does, and for a weak_model that cannot be called, or that says another
    path (as the adapters of lfm_fast.interop do).

    >>> import torch, lfm_fast
    >>> model, weak = lambda t, z: 2 * z, lambda t, z: z
    >>> guidance = lfm_fast.guidance.Autoguidance(weak, 2.0)  # 2 x 2 z - z
    >>> lfm_fast.sample(model, torch.ones(1, 2), guidance=guidance, method="euler", num_steps=1)
    tensor([[-2., -2.]])

    Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", arXiv 2406.02507, eq. 4.
    """

    def __init__(self, weak_model, scale, interval=(0.0, 1.0)):
        super().__init__(scale, interval)
        check_model(weak_model, None)
        self.weak_model = weak_model

    def check(self, run):
        """Without labels both networks go without; their velocities have to be of one path."""
        own = path_of(self.weak_model)
        if own is not None and not agree(own, run.path):
            raise ValueError(
                f"weak_model says it was trained on {own!r}, but the path is {run.path!r}: the velocities of two paths "
                "make no guidance."
            )

    def prepare(self, network, times):
        network.prepare(times, guided=False)
        if self.guided:
            network.beside(self.weak_model).prepare(times, guided=False)

    def velocities(self, network, t, z, rows, time):
        velocity = network.conditional(t, z, time).clone()  # the weaker one may be the same network in another guise
        chosen = (t, z) if rows is None else (t[rows.index], z[rows.index])
        return velocity, network.beside(self.weak_model).conditional(*chosen, time, rows)

"""Classifier-free guidance as the linear blend that a solver's fused step makes."""

import copy

import torch

from lfm_fast.guidance.scale import Scale


class LinearGuidance:
    """Classifier-free guidance: v = scale v_cond + (1 - scale) v_uncond for t inside the interval, v_cond outside it.

    A sample of scale 1 costs one forward, and so does every sample outside the interval (arXiv 2404.07724).

    Args:
        scale: a number; (B,) floating; a table ((t, scale), ...), linear between its times and constant beyond; or a
            function of a tensor of times.
        interval: (low, high) in t, both ends inside.
        joint: whether both velocities come from one forward of 2 B rows. None: they do, unless this machine was found
            to be faster otherwise (`lfm_fast.guidance.joining`). Without a null label there are always two.

    Raises ValueError for a scale or an interval that is none.

    >>> import torch, lfm_fast
    >>> model = lambda t, z, y=None: -z if y is None else y[:, None] - z
    >>> settings = {"y": torch.tensor([1, 2]), "method": "euler", "num_steps": 10, "return_stats": True}
    >>> late = lfm_fast.guidance.LinearGuidance(((0.3, 1.0), (0.8, 3.0)))
    >>> lfm_fast.sample(model, torch.zeros(2, 1), guidance=late, **settings)[1].forwards
    tensor([17, 17])

    Source: Ho and Salimans, arXiv 2207.12598, eq. 6, on velocities; Kynkaanniemi et al., arXiv 2404.07724.
    """

    none = 1.0  # the scale of a sample that is not guided

    def __init__(self, scale=1.0, interval=(0.0, 1.0), joint=None):
        if joint is not None and not isinstance(joint, bool):
            raise ValueError(f"joint is {joint!r}, expected True, False, or None to choose what is faster.")
        self.scale, self.joint = Scale(scale, interval, self.none), joint
        self.guided = not self.scale.trivial  # whether any sample is, at any time

    def begin(self, run):
        """This guidance for one integration, a `Run`, with a state of its own; ValueError where it cannot guide it."""
        self.scale.check(run.batch_size)
        if self.guided:
            self.check(run)
        return copy.copy(self)

    def check(self, run):
        """Raise ValueError where the integration lacks what is needed to guide any sample."""
        check_labels_given(run)
        if run.null_label is None and getattr(run.model, "null_label", 0) is None:
            raise ValueError(
                "The network has no null label (it was built without label dropout), so it has no unconditional "
                "velocity to guide by; leave guidance_scale at 1."
            )

    @property
    def num_samples(self):
        """How many samples it is for, None being any number."""
        return None if self.scale.values is None else len(self.scale.values)

    def part(self, rows):
        """The same guidance for some of the samples, (R,) int64."""
        other = copy.copy(self)
        other.scale = self.scale.part(rows)
        other.guided = not other.scale.trivial
        return other

    def prepare(self, network, times):
        """Announce the times of an integration to the networks."""
        network.prepare(times, self.guided)

    def __call__(self, network, t, z, time=None):
        scale, rows = self.scale(network.samples, t, z, time, network.times) if self.guided else (None, None)
        if scale is None:
            return network.conditional(t, z, time), None, None
        if rows is None or not network.selects:
            return *self.velocities(network, t, z, None, time), scale
        velocity, other = self.velocities(network, t, z, rows, time)
        dtype = torch.promote_types(velocity.dtype, other.dtype)  # two networks may have weights of two types
        velocity = velocity.to(dtype)
        return velocity, velocity.index_copy(0, rows.index, other.to(dtype)), scale

    def velocities(self, network, t, z, rows, time):
        """The velocity to guide (B, ...), and the one to lead away from (R, ...) of `rows`, None being all."""
        return network.both(t, z, rows, time, self.joint)


def check_labels_given(run):
    """Raise ValueError unless there are labels."""
    if run.y is None:
        raise ValueError(
            "guidance_scale is not 1 but there are no labels y to be guided by; give y, or leave guidance_scale at 1."
        )

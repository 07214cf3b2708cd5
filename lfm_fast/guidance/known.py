"""Sampling around latents that are known: inpainting with a network that was not trained for it."""

import copy

import torch

from lfm_fast.guidance.linear import LinearGuidance


class KnownLatents:
    """The state follows the path from noise to the known latents where they are known, and the network elsewhere.

        z_t = alpha(t) z_0 + sigma(t) z_1    where known, whatever the solver made of it, before each evaluation
        v = alpha'(t) z_0 + sigma'(t) z_1    where known, the velocity of that very path, and the network's elsewhere

    So at every time the network sees data under noise of its own training: the known latents, each under the noise
    of its sample, and around them what grows. Any solver serves, and so does any guidance of the network.

    Args:
        z_0: (B, C, h, w) the latents; their values where they are not known do not matter.
        known: bool, of a shape that broadcasts to z_0 such as (B, 1, h, w).
        z_1: (B, C, h, w) the standard normal noise of the samples, as lfm_fast.noise makes it.
        guidance: another object of lfm_fast.guidance, or None.

    At the end the known latents are z_0 up to the error of the solver, on the straight path up to rounding.

    Raises ValueError for tensors that do not go together.

    >>> import torch, lfm_fast
    >>> z_1, z_0 = lfm_fast.noise(1, (1, 1, 3)), torch.tensor([[[[5.0, 0.0, 7.0]]]])
    >>> known = torch.tensor([[[[True, False, True]]]])
    >>> guidance = lfm_fast.guidance.KnownLatents(z_0, known, z_1)
    >>> lfm_fast.sample(lambda t, z: z.mean() - z, z_1, guidance=guidance, method="heun", num_steps=9)[0, 0, 0, ::2]
    tensor([5.0000, 7.0000])

    Source: Lugmayr et al. (RePaint), arXiv 2201.09865, eq. 8, for flows: with the sample's own noise.
    """

    def __init__(self, z_0, known, z_1, guidance=None):
        for name, x in (("z_0", z_0), ("z_1", z_1)):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.shape != z_0.shape:
                raise ValueError(f"{name} is {_kind(x)}, expected floating latents of one shape, z_0 and z_1 alike.")
        if not isinstance(known, torch.Tensor) or known.dtype != torch.bool:
            raise ValueError(f"known is {_kind(known)}, expected a bool tensor: True where a latent is known.")
        try:
            self.known = known.expand(z_0.shape)
        except RuntimeError:
            raise ValueError(f"known is {_kind(known)}, which does not go with latents {tuple(z_0.shape)}.") from None
        self.z_0, self.z_1 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z_0, z_1))
        self.path = None
        self.guidance = LinearGuidance() if guidance is None else guidance

    def begin(self, run):
        """This guidance, and the one inside, for one integration, a `Run`; ValueError for another batch."""
        if len(self.z_0) != run.batch_size:
            raise ValueError(f"the known latents are of {len(self.z_0)} samples, but {run.batch_size} are sampled.")
        begun = copy.copy(self)
        begun.path = run.path
        if hasattr(self.guidance, "begin"):
            begun.guidance = self.guidance.begin(run)
        return begun

    @property
    def num_samples(self):
        """How many samples it is for."""
        return len(self.z_0)

    def part(self, rows):
        """The same for some of the samples, (R,) int64."""
        inner = self.guidance.part(rows) if getattr(self.guidance, "num_samples", None) else self.guidance
        return KnownLatents(self.z_0[rows], self.known[rows], self.z_1[rows], inner)

    @property
    def zero_steps(self):
        return getattr(self.guidance, "zero_steps", 0)

    @property
    def stepped(self):
        """What the guidance inside wants to be called after each step of the solver, or None."""
        return getattr(self.guidance, "stepped", None)

    def prepare(self, network, times):
        """Announce the times of an integration."""
        if hasattr(self.guidance, "prepare"):
            self.guidance.prepare(network, times)
        else:
            network.prepare(times, getattr(self.guidance, "guided", True))

    def __call__(self, network, t, z, time=None):
        z_0, known, z_1 = self.z_0, self.known, self.z_1
        if network.samples is not None:
            z_0, known, z_1 = (x[network.samples.index] for x in (z_0, known, z_1))
        state, target = self.path.interpolate(z_0, z_1, t)
        velocity, other, scale = self.guidance(network, t, torch.where(known, state.to(z), z), time=time)
        velocity, other = (x if x is None else torch.where(known, target.to(x), x) for x in (velocity, other))
        return velocity, other, scale


def _kind(x):
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"

"""Adaptive projected guidance: the part of the push that only makes the picture stronger is held back."""

import torch

from lfm_fast.flow.paths import Linear
from lfm_fast.guidance.linear import LinearGuidance
from lfm_fast.guidance.scale import is_finite, per_sample, sums


class APG(LinearGuidance):
    """Adaptive projected guidance, on the predicted data D = E[z_0 | z_t]:

        d <- D_cond - D_uncond + momentum d of the step before
        d' = min(1, norm_threshold / |d|) d
        D = D_cond + (scale - 1) (d' - (1 - eta) (the part of d' parallel to D_cond))

    Norms and projections are over all elements of a sample. D is linear in the velocity, D = (sigma' z - sigma v) /
    (alpha sigma' - sigma alpha'), so all is done on velocities, which stay finite where sigma = 0, and |d| alone is
    taken as of data.

    With a momentum, d belongs to the steps of the solver: each evaluation adds its own difference to the d that the
    steps before have left, and what the first evaluation of a step made is kept. Within a step the d of before is one
    and the same velocity, so that a Runge-Kutta step keeps its order. An adaptive method refuses a momentum: its
    steps are tried, of each sample its own, and their error is that of a field without a memory.

    Args:
        scale, interval, joint: as of LinearGuidance. What the momentum has kept stays as it is outside the interval.
        eta: how much of the parallel part is kept; 0 is the paper's, 1 all of it.
        norm_threshold: largest norm of d, of data; None is no limit.
        momentum: beta; the paper's are negative, -0.5 to -0.75. 0 is none.

    eta=1 without threshold and momentum is LinearGuidance.

    Raises ValueError as LinearGuidance does, for numbers that are none, and for a momentum under an adaptive method.

    >>> import torch, lfm_fast
    >>> model = lambda t, z, y=None: z if y is None else z + y[:, None] * torch.tensor([1.0, -1.0])
    >>> guidance = lfm_fast.guidance.APG(4.0, eta=0.0, norm_threshold=2.5, momentum=-0.5)
    >>> z1, y = lfm_fast.noise(2, (2,)), torch.tensor([1, 2])
    >>> lfm_fast.sample(model, z1, y=y, guidance=guidance, method="heun", num_steps=10).shape
    torch.Size([2, 2])

    Source: Sadat et al., "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models",
    arXiv 2410.02416, section 4 and algorithm 1.
    """

    path = Linear()  # the integration's own once begun

    def __init__(self, scale, eta=0.0, norm_threshold=None, momentum=0.0, interval=(0.0, 1.0), joint=None):
        super().__init__(scale, interval, joint)
        for name, value in (("eta", eta), ("momentum", momentum)):
            if not is_finite(value):
                raise ValueError(f"{name} is {value!r}, expected a finite number.")
        if abs(momentum) >= 1:
            raise ValueError(f"momentum is {momentum!r}, expected a number between -1 and 1, or what is kept grows.")
        if norm_threshold is not None and (not is_finite(norm_threshold) or norm_threshold <= 0):
            raise ValueError(f"norm_threshold is {norm_threshold!r}, expected a positive number, or None for no limit.")
        self.eta, self.norm_threshold, self.momentum = eta, norm_threshold, momentum
        self.stepped = None  # what the solver calls after each step
        self._kept = self._coming = self._push = (
            None  # d of the steps before, of this one (data); the former as velocity
        )

    def begin(self, run):
        if self.momentum and run.adaptive:
            raise ValueError(
                f"{run.method} tries its steps, so that a momentum over them is none; give APG momentum=0, or choose a "
                "method of fixed steps."
            )
        begun = super().begin(run)
        begun.path = run.path
        begun.stepped = begun._stepped if self.momentum else None
        begun._kept = begun._coming = begun._push = None
        return begun

    def _stepped(self):
        if self._coming is not None:
            self._kept = self._coming
        self._coming = self._push = None

    def __call__(self, network, t, z, time=None):
        velocity, unconditional, scale = super().__call__(network, t, z, time)
        if unconditional is None:
            return velocity, None, None
        velocity, unconditional = velocity.to(z.dtype), unconditional.to(z.dtype)
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(t.double())
        determinant = alpha * d_sigma - sigma * d_alpha
        to_data = per_sample(-sigma / determinant, z)  # of a difference of velocities
        push = velocity - unconditional
        if self.momentum:
            push = self._remembering(push, to_data)
        if self.norm_threshold is not None:
            norm = to_data.abs() * _norm(push, z)
            push = push * torch.where(norm > self.norm_threshold, self.norm_threshold / norm, 1.0)
        if self.eta != 1:
            data = per_sample(d_sigma / determinant, z) * z + to_data * velocity
            size = _norm(data, z).square()
            share = torch.where(size > 0, per_sample(sums(push * data), z) / size, 0.0)
            push = push - (1.0 - self.eta) * share * data
        return velocity + (per_sample(scale, z) - 1.0) * push, None, None

    def _remembering(self, push, to_data):
        if self._coming is not None:  # a later evaluation of the same step
            return push if self._push is None else push + self._push
        if self._kept is not None:
            # sigma = 0 at the start of a step is the start of all, but for a field that is asked there again
            self._push = self.momentum * torch.where(to_data != 0, self._kept / to_data, 0.0)
            push = push + self._push
        self._coming = to_data * push
        return push


def _norm(v, z):
    """Of each sample, as a factor of z."""
    return per_sample(sums(v.square()).sqrt(), z)

"""Classifier-free guidance whose blend is shaped by the velocities themselves, sample by sample."""

import torch

from lfm_fast.guidance.linear import LinearGuidance
from lfm_fast.guidance.scale import is_finite, per_sample, sums


class Rescale(LinearGuidance):
    """Classifier-free guidance whose velocity keeps the spread of the conditional one, which large scales blow up.

        v = (phi std(v_cond) / std(v_cfg) + 1 - phi) v_cfg,    v_cfg = scale v_cond + (1 - scale) v_uncond

    std is over the elements of a sample. The paper rescales what the network puts out, and so does this: the velocity.

    Args:
        scale, interval, joint: as of LinearGuidance.
        factor: phi in [0, 1]; 0 is LinearGuidance, 1 gives v the spread of v_cond. The paper uses 0.7.

    Raises ValueError as LinearGuidance does, and for a factor outside [0, 1].

    >>> import torch, lfm_fast
    >>> model = lambda t, z, y=None: z if y is None else z * y[:, None]
    >>> guidance = lfm_fast.guidance.Rescale(4.0, factor=1.0)
    >>> z1, y = torch.tensor([[1.0, -1.0]]), torch.tensor([2])
    >>> z0 = lfm_fast.sample(model, z1, y=y, guidance=guidance, method="euler", num_steps=1)
    >>> torch.allclose(z0, -z1)  # as without guidance, whose velocity is 2 z; that of plain guidance is 5 z
    True

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891, eqs. 14-17.
    """

    def __init__(self, scale, factor=0.7, interval=(0.0, 1.0), joint=None):
        super().__init__(scale, interval, joint)
        if not is_finite(factor) or not 0.0 <= factor <= 1.0:
            raise ValueError(f"factor is {factor!r}, expected a number in [0, 1].")
        self.factor = factor

    def __call__(self, network, t, z, time=None):
        velocity, unconditional, scale = super().__call__(network, t, z, time)
        if unconditional is None:
            return velocity, None, None
        velocity, unconditional = velocity.to(z.dtype), unconditional.to(z.dtype)
        guided = torch.lerp(unconditional, velocity, per_sample(scale, z))
        wanted, found = _variances(velocity), _variances(guided)
        ratio = torch.where(found > 0, (wanted / found).sqrt(), 1.0)
        return guided * per_sample(1.0 + self.factor * (ratio - 1.0), z), None, None


def _variances(v):
    """Over the elements of each sample, (B,)."""
    count = v[0].numel()
    return sums((v - per_sample(sums(v) / count, v)).square()) / count


class CFGZeroStar(LinearGuidance):
    """CFG-Zero*: the unconditional velocity is first fitted to the conditional one, and the first steps are left out.

        v = scale v_cond + (1 - scale) s v_uncond,    s = <v_cond, v_uncond> / |v_uncond|^2,    by sample
        v = 0 in the first `zero_steps` steps of the time grid

    A velocity of 0 leaves the state as it is. So `lfm_fast.sample` begins after these steps, with any method: they cost
    nothing, and a multistep method starts behind them rather than remember zeros. For an adaptive method they are
    steps of its time grid, too, which num_steps makes.

    Args:
        scale, interval, joint: as of LinearGuidance; outside the interval v is v_cond.
        zero_steps: how many; the paper advises about 4 % of all. 0 leaves the fitted scale alone.

    Raises ValueError as LinearGuidance does, and for a zero_steps that is no count; `lfm_fast.sample` for one that
    leaves no step.

    >>> import torch, lfm_fast
    >>> model = lambda t, z, y=None: -z if y is None else y[:, None] - z
    >>> guidance = lfm_fast.guidance.CFGZeroStar(3.0, zero_steps=2)
    >>> settings = {"y": torch.tensor([1, 2]), "method": "heun", "num_steps": 25, "return_stats": True}
    >>> lfm_fast.sample(model, torch.ones(2, 3), guidance=guidance, **settings)[1].nfe  # 2 x 23
    tensor([46, 46])

    Source: Fan et al., "CFG-Zero*", arXiv 2503.18886, section 4 (optimized scale, zero-init).
    """

    def __init__(self, scale, zero_steps=1, interval=(0.0, 1.0), joint=None):
        super().__init__(scale, interval, joint)
        if not isinstance(zero_steps, int) or isinstance(zero_steps, bool) or zero_steps < 0:
            raise ValueError(f"zero_steps is {zero_steps!r}, expected a whole number from 0 on.")
        self.zero_steps = zero_steps

    def __call__(self, network, t, z, time=None):
        velocity, unconditional, scale = super().__call__(network, t, z, time)
        if unconditional is None:
            return velocity, None, None
        velocity, unconditional = velocity.to(z.dtype), unconditional.to(z.dtype)
        size = sums(unconditional.square())
        fitted = torch.where(size > 0, sums(velocity * unconditional) / size, 0.0)
        return velocity, per_sample(fitted, z) * unconditional, scale

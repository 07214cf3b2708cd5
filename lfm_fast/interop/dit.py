"""DiT's networks: called network(x, t, y), predicting noise at the timesteps of a discrete schedule, with sigmas.

And the guidance DiT samples with, which leaves the channels past the third alone.
"""

import torch
from torch import Tensor

from lfm_fast.guidance import LinearGuidance
from lfm_fast.guidance.scale import per_sample
from lfm_fast.interop.adapter import Adapter
from lfm_fast.interop.discrete import DiscretePath, linear_betas


class DiTVelocity(Adapter):
    """A network of DiT, trained to predict noise as DDPM is, as our velocity field.

        u(z, t) = (alpha' z + (alpha sigma' - sigma alpha') noise) / alpha,    noise = network(z, N t - 1, y)

    with alpha and sigma of the table that it was trained on, at t = (i + 1) / N for step i (see DiscretePath). The
    second half of 2 C channels, learned sigmas, is dropped. `lfm_fast.sample` takes the path from here: sampling ends
    at t = 1 / N, as far towards data as the table goes.

    network: a module or function network(x (B, C, H, W), timestep (B,), y (B,)). alphas_cumprod: (N,), that of DiT
    (1000 steps, betas from 1e-4 to 0.02) when left out. predicts: "noise", "data", "v" or "score". null_label: what
    y=None stands for (1000 in the published ImageNet networks).

    Raises ValueError for what cannot be used, before the network is called.

    >>> field = DiTVelocity(lambda x, timestep, y: x.repeat(1, 2, 1, 1), null_label=1000)
    >>> z0 = lfm_fast.sample(field, torch.ones(2, 4, 8, 8), method="euler", num_steps=10)
    >>> z0.shape
    torch.Size([2, 4, 8, 8])

    Source: Peebles & Xie, arXiv 2212.09748, section 4; Ho et al., arXiv 2006.11239; Lipman et al., arXiv 2210.02747,
    section 4.1, for the velocity.
    """

    needs_labels = True

    def __init__(self, network, *, alphas_cumprod=None, predicts: str = "noise", null_label: int | None = None):
        path = DiscretePath(linear_betas() if alphas_cumprod is None else alphas_cumprod)
        super().__init__(network, predicts=predicts, path=path, null_label=null_label, learned_sigma=True)
        if predicts == "velocity":
            raise ValueError(
                "A DiT that predicts a velocity is no noise-predicting DiT; use it as it is, or SiTVelocity."
            )

    def described(self) -> dict:
        """The arguments that, with the network, make this adapter again; JSON-able."""
        return {
            "predicts": self.predicts,
            "null_label": getattr(self, "null_label", None),
            "alphas_cumprod": self.path.alphas_cumprod.tolist(),
        }

    def their_time(self, t: Tensor) -> Tensor:
        return self.path.timestep(t)

    def call(self, z: Tensor, time: Tensor, y: Tensor | None, **kwargs):
        return self.network(z, time, y, **kwargs)


class ThreeChannelGuidance(LinearGuidance):
    """Classifier-free guidance of the first three channels only, as DiT and SiT sample their latents of four.

        v[:, :3] = scale v_cond[:, :3] + (1 - scale) v_uncond[:, :3],    v[:, 3:] = v_cond[:, 3:]

    The same for predictions of noise, of which a velocity is a linear function channel by channel. scale, interval and
    joint as of LinearGuidance; channels: how many are guided. Give it to `lfm_fast.sample` as `guidance`, with y and
    null_label.

    >>> field = lambda t, z, y: y[:, None, None, None] * torch.ones_like(z)
    >>> settings = {"y": torch.tensor([1, 2]), "null_label": 0, "method": "euler", "num_steps": 1}
    >>> z0 = lfm_fast.sample(field, torch.zeros(2, 4, 1, 1), guidance=ThreeChannelGuidance(3.0), **settings)
    >>> z0.flatten(1).tolist()
    [[-3.0, -3.0, -3.0, -1.0], [-6.0, -6.0, -6.0, -2.0]]

    Source: Ho & Salimans, arXiv 2207.12598, eq. 6; DiT's published samples are made so (arXiv 2212.09748, appendix A).
    """

    def __init__(self, scale=1.0, interval=(0.0, 1.0), channels: int = 3, joint: bool | None = None):
        super().__init__(scale, interval, joint)
        if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
            raise ValueError(f"channels is {channels!r}, expected how many are guided, 1 or more.")
        self.channels = channels

    def __call__(self, network, t, z, time=None):
        velocity, unconditional, scale = super().__call__(network, t, z, time)
        if unconditional is None:
            return velocity, None, None
        blended, first = velocity.to(z.dtype, copy=True), slice(None, self.channels)
        blended[:, first] = torch.lerp(unconditional.to(z.dtype)[:, first], blended[:, first], per_sample(scale, z))
        return blended, None, None

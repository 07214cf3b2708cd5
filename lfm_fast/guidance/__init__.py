"""Guidance: from a model to the field that a solver integrates.

    v = scale v_conditional + (1 - scale) v_unconditional          (Ho & Salimans, arXiv 2207.12598, on velocities)

The blend is left to the solver's fused step. A guidance object is anything called

    guidance(network, t, z, time=None) -> (velocity, unconditional or None, scale (B,) or None)

with a `Network` to evaluate, t (B,), z (B, ...), and `time` the same t as a Python float where the whole batch shares
it; handing it on to the network lets a model that prepares its times use them. One that is no linear blend returns
(velocity, None, None). Where it has a `guided` that is false, no unconditional velocity will be wanted. A velocity may
be a buffer that the model writes again: what is kept beyond the network's next call has to be cloned.
"""

from lfm_fast.guidance.field import GuidedField
from lfm_fast.guidance.linear import LinearGuidance
from lfm_fast.guidance.network import Network, Rows

__all__ = ["GuidedField", "LinearGuidance", "Network", "Rows"]

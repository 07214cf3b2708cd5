"""Guidance: from a model to the field that a solver integrates.

    v = scale v_conditional + (1 - scale) v_unconditional          (Ho & Salimans, arXiv 2207.12598, on velocities)

The blend is left to the solver's fused step. `lfm_fast.sample` takes one of these as guidance=..., in place of
guidance_scale:

    LinearGuidance         the blend; scale by sample, or by time; an interval of times
    Rescale                the blend with the spread of the conditional velocity (Lin et al., arXiv 2305.08891)

A guidance object is anything called

    guidance(network, t, z, time=None) -> (velocity, unconditional or None, scale (B,) or None)

with a `Network` to evaluate, t (B,), z (B, ...), and `time` the same t as a Python float where the whole batch shares
it; handing it on to the network lets a model that prepares its times use them. One that is no linear blend returns
(velocity, None, None). t and z may hold some of the samples only: `network.samples` are their Rows then, else None. A
velocity may be a buffer that the model writes again: what is kept beyond the network's next call has to be cloned.

What it may have besides:

    begin(run) -> guidance     asked before any work, with a `Run`: it refuses what it cannot do (ValueError, one
                               sentence), and returns what is called in this integration, with a state of its own
    prepare(network, times)    all times of a method that knows them beforehand; without it the network prepares both
                               velocities, or the conditional one where a `guided` of the object is false
    stepped()                  called after each step of the solver
"""

from lfm_fast.guidance.field import GuidedField, Run
from lfm_fast.guidance.linear import LinearGuidance, Rescale
from lfm_fast.guidance.network import Network, Rows

__all__ = ["GuidedField", "LinearGuidance", "Network", "Rescale", "Rows", "Run"]

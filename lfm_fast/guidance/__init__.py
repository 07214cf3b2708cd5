"""Guidance: from a model to the field that a solver integrates.

    v = scale v_conditional + (1 - scale) v_unconditional          (Ho & Salimans, arXiv 2207.12598, on velocities)

The blend is left to the solver's fused step. `lfm_fast.sample` takes one of these as guidance=..., in place of
guidance_scale:

    LinearGuidance         the blend; scale by sample, or by time; an interval of times
    Rescale                the blend with the spread of the conditional velocity (Lin et al., arXiv 2305.08891)
    APG                    without the part of the push that only strengthens (Sadat et al., arXiv 2410.02416)
    CFGZeroStar            with a fitted unconditional velocity, and without the first steps (Fan et al., 2503.18886)
    Autoguidance           away from a weaker network instead of the unconditional one (Karras et al., 2406.02507)
    ClassifierGuidance     by the gradient of a classifier of noisy latents (Dhariwal and Nichol, arXiv 2105.05233)
    KnownLatents           around latents that are known, with any of these for the others (Lugmayr et al., 2201.09865)

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
    zero_steps                 how many steps of the time grid are left out first, the state staying as it is
"""

from lfm_fast.guidance.autoguidance import Autoguidance
from lfm_fast.guidance.classifier import ClassifierGuidance
from lfm_fast.guidance.field import GuidedField, Run
from lfm_fast.guidance.known import KnownLatents
from lfm_fast.guidance.linear import LinearGuidance
from lfm_fast.guidance.network import Network, Rows
from lfm_fast.guidance.projected import APG
from lfm_fast.guidance.shaped import CFGZeroStar, Rescale

__all__ = [
    "APG",
    "Autoguidance",
    "CFGZeroStar",
    "ClassifierGuidance",
    "GuidedField",
    "KnownLatents",
    "LinearGuidance",
    "Network",
    "Rescale",
    "Rows",
    "Run",
]

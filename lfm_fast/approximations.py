"""Fewer or cheaper evaluations for a little error, on request: velocities reused between steps, a small network first.

Nothing here is used unless asked for, and `compare` says what it cost: the distance from the solve without it.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from lfm_fast.flow.checks import check_model
from lfm_fast.flow.paths import agree, path_of
from lfm_fast.guidance import LinearGuidance, Rows
from lfm_fast.guidance.scale import is_finite, per_sample
from lfm_fast.sampling import sample

_SAME_TIME = 1e-6  # closer, two evaluations differ by their states, not by their times
_SLACK = 1e-7  # of an interval's ends, as guidance has it


@dataclass
class Tally:
    """Rows of the field that a solver asked for and that the network was evaluated for, one per sample and time."""

    asked: int = 0
    computed: int = 0

    @property
    def saved(self):
        """The share that was not computed."""
        return 1 - self.computed / self.asked if self.asked else 0.0


class Reuse:
    """A guidance whose velocity is extrapolated from the last ones wherever that is predicted to be precise enough.

        v(t, z) ~ v_1 + s (v_1 - v_2),    s = (t - t_1) / (t_1 - t_2)

    v_1 and v_2 are the guided velocities of the sample's last two evaluations (at distinct times). The relative error
    predicted for it is

        L |z - z_1 - s (z_1 - z_2)| / |z_1|  +  c |(t - t_1) (t - t_2)|

    with L the relative change of v by that of z between the two, and c what the same extrapolation missed
    when the network was last asked. Below the threshold the network is not asked, above it is: by sample. Both labels'
    velocities and the guidance scale are in v, so that guidance needs nothing more.

    For methods of fixed steps. Whether to ask is read back from the device at each evaluation.

    Args:
        guidance: what to approximate: a guidance object (see lfm_fast.guidance), or the scale of a LinearGuidance.
        threshold: largest relative error predicted; 0 approximates nothing.

    `tally` counts over all its integrations; `tally.saved` is the share of evaluations that it saved.

    Raises ValueError for arguments that are none, and in `lfm_fast.sample` under an adaptive method (which takes an
    extrapolation for a smooth field) and with a guidance that remembers its steps (APG's momentum).

    >>> model = lambda t, z, y=None: z * (1 - t)[:, None]
    >>> reuse, z1 = lfm_fast.approximations.Reuse(threshold=0.01), lfm_fast.noise(2, (3,))
    >>> exact, z0 = (lfm_fast.sample(model, z1, method="euler", guidance=g) for g in (None, reuse))
    >>> reuse.tally.saved > 0.5, bool(((z0 - exact).norm() / exact.norm()) < 0.01)
    (True, True)

    Source: after Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv
    2411.19108, section 3, of the whole network instead of its blocks and with an error observed instead of fitted.
    """

    def __init__(self, guidance=1.0, threshold=0.05):
        if not is_finite(threshold) or threshold < 0:
            raise ValueError(f"threshold is {threshold!r}, expected a relative error of 0 or more.")
        self.guidance = guidance if callable(guidance) and hasattr(guidance, "begin") else LinearGuidance(guidance)
        self.threshold, self.tally, self._history = threshold, Tally(), None

    @property
    def guided(self):
        return getattr(self.guidance, "guided", True)

    @property
    def zero_steps(self):
        return getattr(self.guidance, "zero_steps", 0)

    @property
    def num_samples(self):
        return getattr(self.guidance, "num_samples", None)

    def part(self, rows):
        part = copy.copy(self)
        part.guidance = self.guidance.part(rows)
        return part

    def begin(self, run):
        if run.adaptive:
            raise ValueError(
                f"{run.method} judges its steps by evaluations, which Reuse leaves out; choose a method of fixed steps."
            )
        begun = copy.copy(self)  # shares the tally
        begun.guidance = self.guidance.begin(run)
        if getattr(begun.guidance, "stepped", None) is not None:
            raise ValueError(
                f"{type(begun.guidance).__name__} remembers its steps, of which Reuse leaves evaluations out; set its "
                "momentum to 0."
            )
        begun._history = None
        return begun

    def prepare(self, network, times):
        prepare = getattr(self.guidance, "prepare", None)
        if prepare is None:
            network.prepare(times, self.guided)
        else:
            prepare(network, times)

    def __call__(self, network, t, z, time=None):
        self.tally.asked += len(z)
        inside = self._inside(t)
        if self._history is None:
            self.tally.computed += len(z)
            velocity = self._ask(network, t, z, time)
            self._history = _History(t, z, velocity, inside)
            return velocity, None, None
        guess = self._history.guess(t, z, inside)
        numbers = (~(guess.error < self.threshold)).nonzero().flatten()
        rows = numbers.tolist()
        if rows and not network.selects:  # arguments of one entry per sample: all or none
            rows, numbers = list(range(len(z))), torch.arange(len(z), device=z.device)
        if not rows:
            return guess.velocity, None, None
        self.tally.computed += len(rows)
        part = network if len(rows) == len(z) else network.select(Rows(rows, numbers))
        asked = self._ask(part, t[numbers], z[numbers], time)
        velocity = guess.velocity.index_copy(0, numbers, asked)
        self._history.learn(t, z, velocity, inside, guess, numbers)
        return velocity, None, None

    def _inside(self, t):
        """Whether each sample is inside the interval of guidance, at whose ends the velocity jumps: (B,) bool."""
        low, high = getattr(getattr(self.guidance, "scale", None), "interval", (0.0, 1.0))
        return (t >= low - _SLACK) & (t <= high + _SLACK)

    def _ask(self, network, t, z, time):
        """The guided velocity, blended."""
        velocity, unconditional, scale = self.guidance(network, t, z, time=time)
        velocity = velocity.to(z.dtype, copy=True)  # it is kept, and may be the model's buffer
        return (
            velocity if unconditional is None else torch.lerp(unconditional.to(z.dtype), velocity, per_sample(scale, z))
        )


@dataclass
class _Guess:
    """velocity (B, ...); by sample: its predicted relative error, made of `apart` = the state's relative distance from
    the line that is extrapolated, and `bend` = |(t - t_1) (t - t_2)|."""

    velocity: torch.Tensor
    error: torch.Tensor
    apart: torch.Tensor
    bend: torch.Tensor


class _History:
    """The last two evaluations of each sample at distinct times, and what they tell of the next: see Reuse."""

    def __init__(self, t, z, velocity, inside):
        unknown = torch.full_like(t, torch.inf)
        self.inside, self.known = inside, torch.ones_like(t)
        self.t = self.t_before = t
        self.z = self.z_before = z
        self.velocity = self.velocity_before = velocity
        self.rate = self.curvature = unknown  # L and c

    def guess(self, t, z, inside):
        gap = self.t - self.t_before
        share = torch.where(self.known > 1, (t - self.t) / gap, 0.0)
        share_z = per_sample(share, z)
        velocity = self.velocity + share_z * (self.velocity - self.velocity_before)
        apart = _relative(z - self.z - share_z * (self.z - self.z_before), self.z)
        bend = ((t - self.t) * (t - self.t_before)).abs()
        error = torch.where(apart > 0, self.rate * apart, 0.0) + torch.where(bend > 0, self.curvature * bend, 0.0)
        trusted = (self.known > 1) & (inside == self.inside)
        return _Guess(velocity, torch.where(trusted, error, torch.inf), apart, bend)

    def learn(self, t, z, velocity, inside, guess, rows):
        """Take the network's velocities of `rows` (R,), the others being guesses."""
        asked = torch.zeros_like(t, dtype=torch.bool).index_fill(0, rows, True)
        moved = asked & ((t - self.t).abs() > _SAME_TIME)
        missed = (_relative(velocity - guess.velocity, velocity) - self.rate * guess.apart).clamp_min(0)
        self.curvature = torch.where(moved & (self.known > 1), missed / guess.bend, self.curvature)
        rate = _relative(velocity - self.velocity, velocity) / _relative(z - self.z, z)
        self.rate = torch.where(moved, rate, self.rate)
        self.known = self.known + moved.to(t.dtype)
        back, new = per_sample(moved, z) > 0, per_sample(asked, z) > 0
        self.t_before = torch.where(moved, self.t, self.t_before)
        self.z_before = torch.where(back, self.z, self.z_before)
        self.velocity_before = torch.where(back, self.velocity, self.velocity_before)
        self.t, self.z = torch.where(asked, t, self.t), torch.where(new, z, self.z)
        self.velocity = torch.where(new, velocity, self.velocity)
        self.inside = torch.where(asked, inside, self.inside)


def _relative(x, of):
    """|x| / |of| by sample, (B,)."""
    return x.flatten(1).norm(dim=1) / of.flatten(1).norm(dim=1)


class SmallThenLarge(nn.Module):
    """A velocity field: one network near noise, t > switch, where a small one errs little, another near data.

    A module called as both are, model(t, z, y, **kwargs), with t by sample; for `lfm_fast.sample` like any network,
    under every guidance and method. Both have to know the same labels. A step that crosses the switch is of first
    order; have a time of the grid there.

    Args:
        small: for t > switch. large: for t <= switch.
        switch: a time between 0 and 1.

    `tally` counts rows, those of the large network being the computed ones. On a device that is not a CPU, t is read
    back at each evaluation.

    Raises ValueError for a switch that is no time in [0, 1], and for networks that cannot be called or say two paths.

    >>> small, large = lambda t, z: z, lambda t, z: z + 0.01 * (1 - t)[:, None]
    >>> model = lfm_fast.approximations.SmallThenLarge(small, large, switch=0.5)
    >>> z0 = lfm_fast.sample(model, lfm_fast.noise(2, (3,)), method="euler", num_steps=10)
    >>> model.tally.saved
    0.5

    Source: Pan et al., "T-Stitch: Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching",
    arXiv 2402.14167.
    """

    def __init__(self, small, large, switch=0.5):
        super().__init__()
        check_model(small, None)
        check_model(large, None)
        if not is_finite(switch) or not 0.0 <= switch <= 1.0:
            raise ValueError(f"switch is {switch!r}, expected a time in [0, 1].")
        self.large, self.small, self.switch, self.tally = large, small, float(switch), Tally()
        known = [path for model in (small, large) if (path := path_of(model)) is not None]
        if len(known) == 2 and not agree(*known):
            raise ValueError(
                f"small says it was trained on {known[0]!r}, large on {known[1]!r}; one path has to be both's."
            )
        if known:
            self.path = known[0]  # for lfm_fast.sample, which else would take Linear()

    def forward(self, t, z, y=None, **kwargs):
        near_noise = t > self.switch
        count = int(near_noise.sum())
        self.tally.asked += len(z)
        self.tally.computed += len(z) - count
        if count in (0, len(z)):
            return _called(self.small if count else self.large, t, z, y, kwargs)
        if kwargs:  # they may hold one entry per sample
            first = _called(self.small, t, z, y, kwargs).clone()  # the two may write to one buffer
            second = _called(self.large, t, z, y, kwargs)
            return torch.where(near_noise.reshape(-1, *[1] * (z.ndim - 1)), first, second)
        parts = []
        for model, rows in ((self.small, near_noise.nonzero()[:, 0]), (self.large, (~near_noise).nonzero()[:, 0])):
            parts.append((rows, _called(model, t[rows], z[rows], None if y is None else y[rows], {}).clone()))
        velocity = torch.empty_like(z, dtype=torch.promote_types(*(v.dtype for _, v in parts)))
        for rows, part in parts:
            velocity[rows] = part.to(velocity.dtype)
        return velocity


def _called(model, t, z, y, kwargs):
    """The model's velocity, from z in the type of its weights."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), z) if isinstance(model, nn.Module) else z
    named = kwargs if y is None else {"y": y, **kwargs}
    return model(t, z.to(weight.dtype), **named)


@dataclass(frozen=True)
class Comparison:
    """What an approximation saved, and its distance from the exact solve.

    errors: (B,) |z - z_exact| / |z_exact|. forwards, seconds: of the exact solve and of the approximation, network rows
    and wall-clock time.
    """

    errors: torch.Tensor
    forwards: tuple[int, int]
    seconds: tuple[float, float]

    def __str__(self):
        median, high, largest = self.errors.median(), self.errors.quantile(0.9), self.errors.max()
        return (
            f"{1 - self.forwards[1] / self.forwards[0]:.0%} of {self.forwards[0]} network rows saved, "
            f"{self.seconds[1]:.2f} s instead of {self.seconds[0]:.2f} s; error against the exact solve: median "
            f"{median:.1e}, 90th percentile {high:.1e}, largest {largest:.1e} of {len(self.errors)} samples"
        )


def compare(z1, exact, approximate, **sampling):
    """Solve twice from the same noise, and say what the approximation saved and what it cost in accuracy.

    Args:
        z1: (B, ...) as `lfm_fast.sample` takes it.
        exact, approximate: the arguments of `lfm_fast.sample` in which the two differ, model= and guidance= say.
        sampling: those that they share.

    Returns: a Comparison. Raises whatever `lfm_fast.sample` raises.

    >>> model, reuse = lambda t, z: z * (1 - t)[:, None], lfm_fast.approximations.Reuse(threshold=0.01)
    >>> exact, approximate = {"guidance": None}, {"guidance": reuse}
    >>> found = lfm_fast.approximations.compare(
    ...     lfm_fast.noise(2, (3,)), exact, approximate, model=model, method="euler"
    ... )
    >>> found.forwards[1] < found.forwards[0] / 2, bool(found.errors.max() < 0.01)
    (True, True)
    """
    # the approximation first: what it refuses costs no exact solve, and warming up counts against it
    z_0, cheap = sample(z1=z1, return_stats=True, **approximate, **sampling)
    truth, full = sample(z1=z1, return_stats=True, **exact, **sampling)
    stats = (full, cheap)
    return Comparison(
        _relative((z_0 - truth).double(), truth.double()),
        tuple(int(found.forwards.sum()) for found in stats),
        tuple(found.seconds for found in stats),
    )

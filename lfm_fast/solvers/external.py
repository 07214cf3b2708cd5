"""torchdiffeq's solvers on the blended field, by name; torchdiffeq is imported when one of them runs.

One step size is shared by the whole batch: torchdiffeq measures one error over all samples.
"""

from dataclasses import dataclass

import torch

from lfm_fast.solvers.solution import Solution


@dataclass(frozen=True)
class External:
    """A method of torchdiffeq; kind: "adaptive", "fixed" (on our grid), "adams" (fixed, equidistant) or "scipy"."""

    name: str
    kind: str
    order: int | None
    evaluations_per_step: int | None = None


EXTERNALS = {
    row.name: row
    for row in (
        External("dopri5", "adaptive", 5),
        External("dopri8", "adaptive", 8),
        External("bosh3", "adaptive", 3),
        External("fehlberg2", "adaptive", 2),
        External("adaptive_heun", "adaptive", 2),
        External("euler", "fixed", 1, 1),
        External("midpoint", "fixed", 2, 2),
        External("heun2", "fixed", 2, 2),
        External("heun3", "fixed", 3, 3),
        External("rk4", "fixed", 4, 4),  # the 3/8 rule
        External("explicit_adams", "adams", 4),
        External("implicit_adams", "adams", 4),
        External("fixed_adams", "adams", 4),
        External("scipy_solver", "scipy", None),
    )
}


class _Stopped(Exception):
    """max_nfe evaluations are used and one more is asked for, or on_step returned False."""


class _Watched:
    """The blended field as torchdiffeq calls it: counts, keeps time inside the grid, stops at the budget."""

    def __init__(self, field, z, times, settings):
        self.field, self.settings = field, settings
        self.low, self.high, self.last = min(times), max(times), times[-1]
        self.state, self.time = z, times[0]  # the last accepted state
        self.nfe = self.accepted = self.rejected = 0
        self.states = [z] if settings.trajectory else None  # of its own steps, in case it is stopped
        self.cancelled = False

    def __call__(self, t, z):
        if self.nfe == self.settings.max_nfe:
            raise _Stopped
        self.nfe += 1
        if self.settings.inside:
            t = t.clamp(self.low, self.high)  # the first guess of a step size may look beyond the end
        velocity, unconditional, scale = self.field(t.to(z).expand(z.shape[0]), z)
        if unconditional is None:
            return velocity.to(z.dtype, copy=True)  # kept over several evaluations: the model's buffer may not be
        velocity = velocity.to(z.dtype)
        scale = scale.reshape(-1, *[1] * (z.ndim - 1))
        return scale * velocity + (1 - scale) * unconditional.to(z.dtype)

    def solution(self, z, **more):
        return Solution.shared(z, time=self.time, nfe=self.nfe, accepted=self.accepted, rejected=self.rejected, **more)

    def _arrived(self, time, z):
        self.state, self.time = z, time
        self.accepted += 1
        if self.states is not None:
            self.states.append(z)
        on_step = self.settings.on_step
        if on_step is not None and on_step(self.accepted, time, z) is False and time != self.last:
            self.cancelled = True
            raise _Stopped


class _WatchedFixed(_Watched):
    """torchdiffeq announces each step before it is made; the k-th one starts at the k-th time."""

    def __init__(self, field, z, times, settings):
        super().__init__(field, z, times, settings)
        self.times, self.begun = times, 0

    def callback_step(self, t, z, dt):
        if self.begun:
            self._arrived(self.times[self.begun], z)
        self.begun += 1


class _WatchedAdaptive(_Watched):
    """torchdiffeq announces each attempt with the state it starts from, and whether the attempt before was accepted."""

    def __init__(self, field, z, times, settings):
        super().__init__(field, z, times, settings)
        self.unreported = False

    def callback_accept_step(self, t, z, dt):
        self.unreported = True

    def callback_reject_step(self, t, z, dt):
        self.rejected += 1

    def callback_step(self, t, z, dt):
        if self.unreported:
            self._arrived(float(t), z)
            self.unreported = False


_WATCHED = {"adaptive": _WatchedAdaptive, "fixed": _WatchedFixed, "adams": _WatchedFixed, "scipy": _Watched}


def integrate(row, field, z, times, settings):
    """dz/dt = field(t, z) from times[0] to times[-1] with torchdiffeq; as fixed.integrate.

    A spent budget (settings.max_nfe), or on_step returning False, returns the last accepted state with reached=False;
    a trajectory is then that of the steps made, which those of an adaptive method are not at the grid's times. Raises
    RuntimeError where torchdiffeq gives up (steps too small, velocities that are not finite).
    """
    from torchdiffeq import odeint

    watched = _WATCHED[row.kind](field, z, times, settings)
    grid = torch.tensor(times, dtype=torch.float64, device=z.device)
    asked = grid if settings.trajectory else grid[[0, -1]]
    options = {}
    if row.kind in ("fixed", "adams"):
        options["grid_constructor"] = lambda func, z, t: grid
    elif row.kind == "adaptive" and settings.inside:
        options["step_t"] = grid[-1:]  # else the last step runs past the end and is read off inside
    try:
        states = odeint(watched, z, asked, rtol=settings.rtol, atol=settings.atol, method=row.name, options=options)
    except _Stopped:
        return watched.solution(watched.state, reached=False, cancelled=watched.cancelled, states=watched.states)
    except AssertionError as error:  # torchdiffeq's way to say that it cannot go on; its text may print the whole state
        raise RuntimeError(
            f"torchdiffeq's {row.name} gave up after t = {watched.time:g}: {str(error)[:120]}"
        ) from error
    if len(states) != len(asked):
        raise RuntimeError(
            f"torchdiffeq's {row.name} returned {len(states)} of {len(asked)} states: its solver failed."
        )
    if row.kind != "scipy":  # scipy does not tell its steps
        watched._arrived(times[-1], states[-1])
    watched.time = times[-1]
    return watched.solution(states[-1], states=list(states) if settings.trajectory else None)

"""Fixed-step Runge-Kutta: every stage is one ops.guided_step, and nothing in the loop waits for the device."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from lfm_fast import ops
from lfm_fast.solvers.solution import Solution


@dataclass(frozen=True)
class Stage:
    """What follows evaluation i: the next stage's point, or at last the next state, from z and the velocities."""

    stored: tuple[int, ...]  # earlier evaluations with a weight here
    keep: bool  # a later stage needs this one's blended velocity
    factors: tuple[float, ...]  # of dt, for this evaluation and the stored ones


def plan(tableau):
    """The stages of a tableau, with only the velocities that have a weight."""
    targets = [*tableau.a[1:], tableau.b]  # after evaluation i: the point of stage i + 1, at last z'
    stages = []
    for i, row in enumerate(targets):
        stored = tuple(j for j in range(i) if row[j] != 0)
        keep = any(later[i] != 0 for later in targets[i + 1 :])
        stages.append(Stage(stored, keep, (row[i], *(row[j] for j in stored))))
    return stages


def integrate(tableau, field, z, times, settings):
    """dz/dt = field(t, z) over the given times with an explicit Runge-Kutta method.

    tableau: a tableaus.Tableau. field: see lfm_fast.solvers. z (B, ...) float32 or float64, the state at times[0].
    times: floats, in either direction. settings: a Settings. Returns a Solution.
    """
    stages, moments = plan(tableau), stage_times(tableau, times)
    if hasattr(field, "prepare"):
        field.prepare([time for step in moments for time in step])
    field_at = getattr(field, "at", lambda time: field)
    weights = _weights(stages, times, z)
    states = [z] if settings.trajectory else None
    for n, step in enumerate(moments):
        point, kept = z, {}
        for i, (stage, now) in enumerate(zip(stages, step)):
            t = torch.full(z.shape[:1], now, dtype=z.dtype, device=z.device)  # no value is read back for it
            velocity, unconditional, scale = field_at(now)(t, point)
            point, blended, _ = ops.guided_step(
                z,
                velocity,
                unconditional,
                scale,
                [kept[j] for j in stage.stored],
                weights[i][n],
                keep=stage.keep,
            )
            kept[i] = blended
        z = point
        if settings.trajectory:
            states.append(z)
        if settings.on_step is not None:
            settings.on_step(n + 1, times[n + 1], z)
    num_steps = len(times) - 1
    nfe = num_steps * tableau.num_stages
    return Solution.shared(z, states=states, time=times[-1], nfe=nfe, accepted=num_steps)


def stage_times(tableau, times):
    """The times of the evaluations in each step, as floats; where two steps meet they are one number."""
    return [
        [after if c == 1 else before + c * (after - before) for c in tableau.c] for before, after in pairwise(times)
    ]


def _weights(stages, times, z):
    """guided_step's weights after evaluation i of step n, (B, 2 + K_i), computed in float64 and moved to the device
    once."""
    dt = torch.tensor(times, dtype=torch.float64).diff()[:, None]
    weights = []
    for stage in stages:
        factors = torch.cat([torch.ones_like(dt), dt * torch.tensor(stage.factors, dtype=torch.float64)], dim=1)
        weights.append(factors.to(z)[:, None].expand(-1, z.shape[0], -1).unbind(0))
    return weights

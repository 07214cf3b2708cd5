"""Embedded Runge-Kutta pairs, every sample with its own steps: its own error, acceptance, step size and end.

An attempted step of the whole batch sends one small table of times and weights to the device and reads one number a
sample back.
"""

import numpy as np
import torch

from lfm_fast.solvers.attempt import Table, inside_weights
from lfm_fast.solvers.control import StepControl
from lfm_fast.solvers.per_sample import OVERFLOW, PerSample


def integrate(pair, field, z, times, settings):
    """dz/dt = field(t, z) from times[0] to times[-1] with an embedded.Pair.

    field: see lfm_fast.solvers. z (B, ...) float32 or float64, the state at times[0]. times: floats, in either
    direction; those between the ends are where a trajectory is read off inside the steps. settings: a Settings.
    Returns a Solution. Raises RuntimeError for a velocity that is not finite and for steps that get lost in the
    rounding of time.
    """
    return _Run(pair, field, z, times, settings).integrate()


class _Run(PerSample):
    """One integration with a pair."""

    def __init__(self, pair, field, z, times, settings):
        control = StepControl(z.shape[0], times[0], times[-1], pair.controlled, pair.evaluations, settings.max_nfe)
        super().__init__(control, field, z, times, settings)
        self.pair = pair
        self.first = None  # (R, ...) the velocities at z
        self.table = None  # made for the batch size

    def take(self, rows, index):
        self.first, self.table = self.first.index_select(0, index), None

    def start(self):
        """The first velocities and step sizes."""
        control, z = self.control, self.z
        one = z.new_ones(z.shape[0], 1)
        here, ratio = torch.cat([one, 0 * one], 1), one
        _, self.first, slope = self._evaluate(self._on_device(control.t), z, [], here, ratio)
        scale = self._combine(z, [], here, ratio)[2]
        scale, slope = self._read(scale, slope)
        self._refuse_nonfinite(slope, [self.first], [0.0])
        control.probe(scale, slope)
        dt, _ = self._on_device(control.dt)
        point = self._combine(self.first, [], torch.cat([one, dt[:, None]], 1))[0]
        t = self._on_device(control.t + control.dt)
        weights = torch.cat([one, 0 * one, 0 * one], 1)
        _, there, change = self._evaluate(t, point, [self.first], weights, torch.cat([one, -one], 1), base=z)
        (change,) = self._read(change)
        self._refuse_nonfinite(change, [there], [1.0])
        control.first_step(slope, change)

    def attempt(self):
        """One step of every sample in the batch, each of its own size; accepted or not, each by its own error."""
        control, z, before = self.control, self.z, self.control.t
        if self.table is None:
            self.table = Table(self.pair, z)
        table, velocities = self.table, [self.first]
        after = control.propose()
        table.fill(before, control.dt, after)
        point = self._combine(self.first, [], table.points[0][1])[0]
        for t, (stored, weights) in zip(table.t, table.points[1:]):
            point, velocity, _ = self._evaluate(t, point, [velocities[j] for j in stored], weights, base=z)
            velocities.append(velocity)
        error = self._error(point, velocities)
        active = control.active
        accept = control.judge(error, after)
        if self.states is not None:
            self._read_off(velocities, before, after, accept)
        mask = self._move(point, accept, active)
        self.first = velocities[-1] if mask is None else torch.where(mask, velocities[-1], self.first)
        self._finish(active & ~control.active)
        self._refuse_stuck()

    def _error(self, point, velocities):
        """The last evaluation, at the new state, and every sample's error in units of its tolerance, (R,) float64."""
        table, z = self.table, self.z
        stored = [velocities[j] for j in table.judged]
        _, last, error = self._evaluate(table.t_last, point, stored, table.state, table.errors[0], base=z)
        velocities.append(last)
        more = [self._combine(last, stored, table.state, weights)[2] for weights in table.errors[1:]]
        error, *more = self._read(error, *more)
        self._refuse_nonfinite(error, velocities, self.pair.c)
        if more:
            error = np.where(np.isfinite(more[0]), error, np.inf)
            with np.errstate(invalid="ignore"):  # 0 / 0 is 0 here, and inf / inf too much
                error = np.where(error == 0, 0.0, error**2 / np.sqrt(error**2 + 0.01 * more[0] ** 2))
        return np.where(np.isfinite(error), error, OVERFLOW)

    def _read_off(self, velocities, before, after, accept):
        """The states at those times of the grid that accepted steps went over; the last time is the last state."""
        control, passed = self.control, self._passed(before, after, accept)
        if passed and self.pair.extra_c:
            velocities = [*velocities, *self._extra(velocities)]
            control.nfe += len(self.pair.extra_c) * np.any([rows for _, rows in passed], axis=0)
        for number, rows in passed:
            share = np.divide(self.times[number] - before, control.dt, out=np.zeros_like(before), where=rows)
            columns, weights = inside_weights(self.pair, share, control.dt)
            weights = torch.from_numpy(weights).to(self.z)
            one, *others = (velocities[j] for j in columns)
            value = self._combine(one, others, weights)[0]
            self._scatter(self.states[number], rows, value)

    def _extra(self, velocities):
        """The velocities of the stages that only the inside of the step needs."""
        table, found = self.table, []
        for t, (stored, weights) in zip(table.t_extra, table.extra):
            known = [*velocities, *found]
            point = self._combine(known[-1], [known[j] for j in stored], weights)[0]
            same = weights[:, :2]
            found.append(self._evaluate(t, point, [], same)[1])
        return found

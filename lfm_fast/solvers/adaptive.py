"""Embedded Runge-Kutta pairs, every sample with its own steps: its own error, acceptance, step size and end.

Step sizes live on the host in float64; the state, the velocities and the error norm on the device. An attempted step
of the whole batch sends one small table of times and weights there and reads one number a sample back. Samples that
have arrived leave the batch where the field can do without them, in batch sizes of a short list, so that a network
that is compiled or captured for each size meets few.
"""

import numpy as np
import torch

from lfm_fast.ops.guided_step import GuidedSteps
from lfm_fast.solvers.attempt import Table, inside_weights
from lfm_fast.solvers.control import StepControl
from lfm_fast.solvers.solution import Solution

_ATOL = torch.finfo(torch.float32).tiny  # an element that is 0 and stays there has no error, and not 0 / 0
_OVERFLOW = 1e30  # error of a step whose velocities are finite and whose error is not


def integrate(pair, field, z, times, settings):
    """dz/dt = field(t, z) from times[0] to times[-1] with an embedded.Pair.

    field: see lfm_fast.solvers. z (B, ...) float32 or float64, the state at times[0]. times: floats, in either
    direction; those between the ends are where a trajectory is read off inside the steps. settings: a Settings.
    Returns a Solution. Raises RuntimeError for a velocity that is not finite and for steps that get lost in the
    rounding of time.
    """
    run = _Run(pair, field, z, times, settings)
    run.start()
    rounds = 0
    while run.control.active.any():
        run.compact()
        run.attempt()
        rounds += 1
        if settings.on_step is not None and settings.on_step(rounds, *run.snapshot()) is False:
            break
    return run.solution()


def bucket(number):
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds `number`."""
    power = 1 << (number - 1).bit_length()
    return power * 3 // 4 if power >= 4 and number <= power * 3 // 4 else power


class _Run:
    """One integration: the batch of samples that are under way, and what is known of those that are not."""

    def __init__(self, pair, field, z, times, settings):
        self.pair, self.times, self.settings = pair, np.array(times), settings
        self.tolerance = (max(settings.atol, _ATOL), settings.rtol)
        self.after_field, self.after_own = GuidedSteps(), GuidedSteps()  # by whose velocity comes last
        self.whole = self.field = field
        self.selects = getattr(field, "selects", False)
        self.total = self.control = StepControl(
            z.shape[0], times[0], times[-1], pair.controlled, pair.evaluations, settings.max_nfe
        )
        self.z, self.first = z, None  # of the batch: the states, and their velocities
        self.out = None  # (B, ...) the states of finished samples, from when some are and others are not
        self.table = None  # made for the batch size
        self.states = None
        if settings.trajectory:
            self.states = [z, *(torch.full_like(z, torch.nan) for _ in times[1:])]

    def start(self):
        """The first velocities and step sizes."""
        control, z = self.control, self.z
        if not control.active.any():
            return
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
        self._move(point, velocities[-1], accept, active)
        self._finish(active & ~control.active)
        self._refuse_stuck()

    def _evaluate(self, t, point, stored, weights, error_weights=None, base=None):
        """The blended velocity at (t, point), and what guided_step makes of it: (next point, velocity, error).

        t: (R,) on the device and the same on the host."""
        base = point if base is None else base
        t, known = t
        at_each = getattr(self.field, "at_each", None)
        velocities = (self.field if at_each is None else at_each(known))(t, point)
        return self.after_field(
            base, *velocities, stored, weights, error_weights, *self.tolerance, None, None, 0, 0, True
        )

    def _on_device(self, values):
        """(R,) of the host in the type of the state, and as they are."""
        return torch.tensor(values, dtype=self.z.dtype, device=self.z.device), values

    def _combine(self, velocity, stored, weights, error_weights=None):
        """guided_step of the states with a velocity that is blended already: (next point, nothing, error)."""
        return self.after_own(
            self.z, velocity, None, None, stored, weights, error_weights, *self.tolerance, None, None, 0, 0, False
        )

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
        return np.where(np.isfinite(error), error, _OVERFLOW)

    def _move(self, point, last, accept, active):
        if (accept | ~active).all():  # a finished sample's step was 0
            self.z, self.first = point, last
        elif accept.any():
            mask = torch.from_numpy(accept).to(point.device).view(-1, *[1] * (point.ndim - 1))
            self.z, self.first = torch.where(mask, point, self.z), torch.where(mask, last, self.first)

    def _finish(self, rows):
        """Keep the states of these samples, which are not going on."""
        if self.out is None and rows.all():
            self.out = self.z
        elif rows.any():
            if self.out is None:
                self.out = self.z.new_empty(len(self.total.t), *self.z.shape[1:])
            self._scatter(self.out, rows, self.z)

    def _scatter(self, whole, rows, batch):
        """Write the batch's chosen rows to their samples' places in (B, ...)."""
        rows = np.flatnonzero(rows)
        to, of = (torch.from_numpy(x).to(whole.device) for x in (self.control.numbers[rows], rows))
        whole.index_copy_(0, to, batch.index_select(0, of))

    def compact(self):
        """Let finished samples leave, where that reaches a smaller size of the list."""
        active = self.control.active
        size = bucket(int(active.sum())) if self.selects else len(active)
        if size >= len(active):
            return
        order = np.argsort(~active, kind="stable")[:size]  # finished ones fill the size up
        rows = np.sort(order)
        self.control.put_into(self.total)
        self.control, self.table = self.control.take(rows), None
        index, numbers = (torch.from_numpy(x).to(self.z.device) for x in (rows, self.control.numbers))
        self.z, self.first = self.z.index_select(0, index), self.first.index_select(0, index)
        self.field = self.whole.select(self.control.numbers.tolist(), numbers)

    def _read_off(self, velocities, before, after, accept):
        """The states at those times of the grid that accepted steps went over; the last time is the last state."""
        control, sign = self.control, self.control.sign
        middle = self.times[1:-1, None]
        passed = (sign * (middle - before) > 0) & (sign * (middle - after) <= 0) & accept
        if not passed.any():
            return
        if self.pair.extra_c:
            velocities = [*velocities, *self._extra(velocities)]
            control.nfe += len(self.pair.extra_c) * passed.any(0)
        for number in np.flatnonzero(passed.any(1)):
            rows = passed[number]
            share = np.divide(middle[number] - before, control.dt, out=np.zeros_like(before), where=rows)
            columns, weights = inside_weights(self.pair, share, control.dt)
            weights = torch.from_numpy(weights).to(self.z)
            one, *others = (velocities[j] for j in columns)
            value = self._combine(one, others, weights)[0]
            self._scatter(self.states[1 + number], rows, value)

    def _extra(self, velocities):
        """The velocities of the stages that only the inside of the step needs."""
        table, found = self.table, []
        for t, (stored, weights) in zip(table.t_extra, table.extra):
            known = [*velocities, *found]
            point = self._combine(known[-1], [known[j] for j in stored], weights)[0]
            same = weights[:, :2]
            found.append(self._evaluate(t, point, [], same)[1])
        return found

    def snapshot(self):
        """(times (B,), states (B, ...)) of all samples."""
        self.control.put_into(self.total)
        if self.out is None:
            z = self.z.clone()
        else:
            z = self.out.clone()
            if self.control.active.any():
                self._scatter(z, self.control.active, self.z)
        return torch.from_numpy(self.total.t.copy()), z

    def solution(self):
        total = self.total
        cancelled = bool(self.control.active.any())  # by on_step
        if cancelled:
            self._finish(self.control.active)
        self.control.put_into(total)
        z = self.z if self.out is None else self.out
        if self.states is not None:
            there = torch.from_numpy(total.reached).to(z.device).view(-1, *[1] * (z.ndim - 1))
            self.states[-1] = z if total.reached.all() else torch.where(there, z, torch.nan)
        counts = {name: torch.from_numpy(getattr(total, name)) for name in ("nfe", "accepted", "rejected", "reached")}
        return Solution(z=z, time=torch.from_numpy(total.t), cancelled=cancelled, states=self.states, **counts)

    @staticmethod
    def _read(*values):
        """(R,) of the device as float64 on the host, all at once: the one place that waits for the device."""
        values = values[0][None] if len(values) == 1 else torch.stack(values)
        return values.cpu().double().numpy()

    def _refuse_nonfinite(self, error, velocities, shares):
        bad = ~np.isfinite(error) & self.control.active
        if not bad.any():
            return
        for velocity, share in zip(velocities, shares):
            lost = bad & ~velocity.flatten(1).isfinite().all(1).cpu().numpy()
            if lost.any():
                row = int(lost.argmax())
                t = self.control.t[row] + share * self.control.dt[row]
                raise RuntimeError(
                    f"The velocity of sample {self.control.numbers[row]} at t = {t:g} is not finite "
                    f"(in its step {self.control.accepted[row] + 1}, from t = {self.control.t[row]:g})."
                )

    def _refuse_stuck(self):
        row = self.control.stuck()
        if row is not None:
            raise RuntimeError(
                f"Sample {self.control.numbers[row]} needs steps below {self.control.shortest:g} at "
                f"t = {self.control.t[row]:g}: its velocity jumps or grows without bound there, or atol and rtol are "
                "too small for it."
            )

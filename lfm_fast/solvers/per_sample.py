"""Integrating many samples, every one with its own steps: what is common to methods that control their error.

Step sizes live on the host in float64; the state, the velocities and the error norm on the device. Samples that have
arrived leave the batch where the field can do without them, in batch sizes of a short list, so that a network that is
compiled or captured for each size meets few.
"""

import numpy as np
import torch

from lfm_fast.ops.guided_step import GuidedSteps
from lfm_fast.solvers.solution import Solution

OVERFLOW = 1e30  # error of a step whose velocities are finite and whose error is not
_ATOL = torch.finfo(torch.float32).tiny  # an element that is 0 and stays there has no error, and not 0 / 0


def bucket(number):
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds `number`."""
    power = 1 << (number - 1).bit_length()
    return power * 3 // 4 if power >= 4 and number <= power * 3 // 4 else power


class PerSample:
    """One integration: the batch of samples that are under way, and what is known of those that are not.

    A method says how it starts, what an attempted step is and, as `take(rows, index)`, how what it keeps of each sample
    becomes that of some of them: numbers of rows in the batch, (R,) on the host and on the device.
    """

    def __init__(self, control, field, z, times, settings):
        self.times, self.settings = np.array(times), settings
        self.tolerance = (max(settings.atol, _ATOL), settings.rtol)
        self.after_field, self.after_own = GuidedSteps(), GuidedSteps()  # by whose velocity comes last
        self.whole = self.field = field
        self.selects = getattr(field, "selects", False)
        self.total = self.control = control  # a StepControl
        self.z = z  # of the batch
        self.out = None  # (B, ...) the states of finished samples, from when some are and others are not
        self.states = None
        if settings.trajectory:
            self.states = [z, *(torch.full_like(z, torch.nan) for _ in times[1:])]

    def integrate(self):
        """Attempt after attempt, until all samples are where they go; the Solution."""
        rounds, on_step = 0, self.settings.on_step
        if self.control.active.any():
            self.start()
        while self.control.active.any():
            self.compact()
            self.attempt()
            rounds += 1
            if on_step is not None and on_step(rounds, *self.snapshot()) is False:
                break
        return self.solution()

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

    def _combine(self, velocity, stored, weights, error_weights=None):
        """guided_step of the states with a velocity that is blended already: (next point, nothing, error)."""
        return self.after_own(
            self.z, velocity, None, None, stored, weights, error_weights, *self.tolerance, None, None, 0, 0, False
        )

    def _on_device(self, values):
        """(R,) of the host in the type of the state, and as they are."""
        return torch.tensor(values, dtype=self.z.dtype, device=self.z.device), values

    @staticmethod
    def _read(*values):
        """(R,) of the device as float64 on the host, all at once: the one place that waits for the device."""
        values = values[0][None] if len(values) == 1 else torch.stack(values)
        return values.cpu().double().numpy()

    def _move(self, point, accept, active):
        """Go to the point where the step was accepted; the mask of accepted ones, None where it was every sample's."""
        if (accept | ~active).all():  # a finished sample's step was 0
            self.z = point
            return None
        mask = torch.from_numpy(accept).to(point.device).view(-1, *[1] * (point.ndim - 1))
        self.z = torch.where(mask, point, self.z)
        return mask

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
        self.control = self.control.take(rows)
        index, numbers = (torch.from_numpy(x).to(self.z.device) for x in (rows, self.control.numbers))
        self.z = self.z.index_select(0, index)
        self.take(rows, index)
        self.field = self.whole.select(self.control.numbers.tolist(), numbers)

    def _passed(self, before, after, accept):
        """(number, rows) of each time between the grid's ends that accepted steps of some rows (R,) went over."""
        sign, middle = self.control.sign, self.times[1:-1, None]
        passed = (sign * (middle - before) > 0) & (sign * (middle - after) <= 0) & accept
        return [(1 + number, passed[number]) for number in np.flatnonzero(passed.any(1))]

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

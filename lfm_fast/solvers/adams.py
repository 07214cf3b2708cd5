"""Adams, Bashforth and Moulton's pair, every sample with its own steps: one evaluation for each attempted step.

    p  = z_n + integral over the step of the polynomial through v_n, v_(n-1), ...       (the last 5 velocities at most)
    z' = z_n + integral over the step of the polynomial through v(t', p) too,           error = z' - p

The velocity at p serves the next steps. Samples begin with one velocity and small steps; each accepted step knows one
more. Where the field is smooth, as far as steps reach, this makes about half the evaluations of a Runge-Kutta pair, and
a rejected step loses one evaluation, not six.

Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", sections III.1, III.5 and III.7.
"""

from itertools import pairwise

import numpy as np
import torch

from lfm_fast.solvers.control import StepControl
from lfm_fast.solvers.per_sample import OVERFLOW, PerSample

ORDER = 6  # of z', once all velocities are there
_MOST = 5  # velocities of the prediction; with 6 errors grow where steps are as long as the error allows
_SLOTS = _MOST + 1  # the last is for the attempt under way
# The error of an extrapolation says how the steps before it were chosen, too: it falls late, so a share of the last one
# makes steps shorter for nothing, and long ones late (34 evaluations of the embedded flow become 37). Growth is slower
# than of Runge-Kutta steps, because weights grow with the ratio of steps.
_CONTROL = {"beginning": 1, "safety": 0.8, "share": 0.0, "largest": 2.0}
# Gauss: exact for the polynomials of degree 5 through _SLOTS velocities
_POINTS, _SHARES = np.array([[0.5 - 0.15**0.5], [0.5], [0.5 + 0.15**0.5]]), (5 / 18, 4 / 9, 5 / 18)
# columns of a table: the time, the prediction's weights, the corrected state's, the error's
_COLUMNS = list(pairwise(np.cumsum([0, 1, 1 + _SLOTS, 2 + _SLOTS, 1 + _SLOTS]).tolist()))


def integrate(field, z, times, settings):
    """dz/dt = field(t, z) from times[0] to times[-1]; arguments, result and refusals as of adaptive.integrate."""
    return _Run(field, z, times, settings).integrate()


def integral_weights(nodes, start, end):
    """w (R, n) with sum_j w_j v(nodes_j) the integral from start to end, (R,) each, of the polynomial through v at
    nodes (R, n), n <= 6. Every number is of its own row's alone, to the last bit."""
    own, one = nodes.T, np.arange(nodes.shape[1])
    points = start + _POINTS * (end - start)
    apart = own[:, None] - own
    apart[one, one] = 1.0
    factors = (points[:, None, None] - own) / apart  # of point q, velocity j and each other node k
    factors[:, one, one] = 1.0
    values = factors[:, :, 0]
    for k in one[1:]:  # one by one: a reduction may go another way for another number of rows
        values = values * factors[:, :, k]
    first, second, third = values
    return ((_SHARES[0] * first + _SHARES[1] * second + _SHARES[2] * third) * (end - start)).T


class _Run(PerSample):
    """One integration. Of each sample, slots in a ring hold its last velocities, their times being on the host."""

    def __init__(self, field, z, times, settings):
        control = StepControl(z.shape[0], times[0], times[-1], 2, 1, settings.max_nfe, **_CONTROL)
        super().__init__(control, field, z, times, settings)
        self.velocities = None  # (_SLOTS, R, ...)
        self.nodes = np.full((z.shape[0], _SLOTS), float(times[0]))
        self.newest = np.zeros(z.shape[0], dtype=np.int64)  # slot of the velocity at z
        self.known = np.ones(z.shape[0], dtype=np.int64)  # velocities of the next prediction

    def take(self, rows, index):
        self.velocities = self.velocities.index_select(1, index)
        self.nodes, self.newest, self.known = self.nodes[rows], self.newest[rows], self.known[rows]

    def start(self):
        """The first velocities and step sizes."""
        control, z = self.control, self.z
        one = z.new_ones(z.shape[0], 1)
        _, first, slope = self._evaluate(self._on_device(control.t), z, [], torch.cat([one, 0 * one], 1), one)
        (slope,) = self._read(slope)
        self._refuse_nonfinite(slope, [first], [0.0])
        control.begin(slope)
        self.velocities = first.new_zeros(_SLOTS, *first.shape)
        self.velocities[0] = first

    def attempt(self):
        """One step of every sample in the batch, each of its own size; accepted or not, each by its own error."""
        control, z, before, active = self.control, self.z, self.control.t, self.control.active
        after = control.propose()
        table = torch.from_numpy(self._table(before, after)).to(z)
        t, ahead, corrected, errors = (table[:, first:last] for first, last in _COLUMNS)
        velocities = list(self.velocities.unbind(0))
        point = self._combine(velocities[0], velocities[1:], ahead)[0]
        t = (t.flatten().clone(), after)  # the model may keep what it is given
        point, velocity, error = self._evaluate(t, point, velocities, corrected, errors, base=z)
        (error,) = self._read(error)
        self._refuse_nonfinite(error, [velocity], [1.0])
        control.controlled = self.known + 1
        accept = control.judge(np.where(np.isfinite(error), error, OVERFLOW), after)
        if self.states is not None:
            self._read_off(velocity, before, after, accept)
        self._keep(velocity, after, accept)
        self._move(point, accept, active)
        self._finish(active & ~control.active)
        self._refuse_stuck()

    def _table(self, before, after):
        """What an attempt sends to the device, (R, columns)."""
        table = np.zeros((len(before), _COLUMNS[-1][1]))
        (_, first), (_, second), (_, third), _ = _COLUMNS
        table[:, 0], table[:, first], table[:, second] = after, 1.0, 1.0
        for rows, slots, nodes in self._histories(self.control.active):
            ahead = integral_weights(nodes, before[rows], after[rows])
            corrected = self._corrected(rows, nodes, before, after, after[rows])
            own, others, each = corrected[:, 0], corrected[:, 1:], rows[:, None]
            table[rows, second + 1], table[each, second + 2 + slots] = own, others
            table[rows, third], table[each, third + 1 + slots] = own, others - ahead
            table[each, first + 1 + slots] = ahead
        return table

    def _histories(self, chosen):
        """(rows, their slots and nodes (rows, k), newest first) of those that predict from k velocities."""
        for k in range(1, _MOST + 1):
            rows = np.flatnonzero(chosen & (self.known == k))
            if len(rows):
                slots = (self.newest[rows, None] - np.arange(k)) % _SLOTS
                yield rows, slots, np.take_along_axis(self.nodes[rows], slots, 1)

    @staticmethod
    def _corrected(rows, nodes, before, after, end):
        """Weights (rows, 1 + k) of the integral up to `end` with the velocity at `after`, which comes first."""
        return integral_weights(np.concatenate([after[rows, None], nodes], 1), before[rows], end)

    def _keep(self, velocity, after, accept):
        """The attempt's velocity goes to the free slot, which is the newest where the step was accepted."""
        rows, free = np.arange(len(after)), (self.newest + 1) % _SLOTS
        slots, index = (torch.from_numpy(x).to(velocity.device) for x in (free, rows))
        self.velocities[slots, index] = velocity
        self.nodes[rows, free] = after
        self.newest = np.where(accept, free, self.newest)
        self.known = np.minimum(self.known + accept, _MOST)

    def _read_off(self, velocity, before, after, accept):
        """The states at those times of the grid that accepted steps went over; the last time is the last state."""
        for number, passed in self._passed(before, after, accept):
            weights = np.zeros((len(before), 2 + _SLOTS))
            weights[:, 0] = 1.0
            for rows, slots, nodes in self._histories(passed):
                end = np.full(len(rows), self.times[number])
                corrected = self._corrected(rows, nodes, before, after, end)
                weights[rows, 1], weights[rows[:, None], 2 + slots] = corrected[:, 0], corrected[:, 1:]
            value = self._combine(velocity, list(self.velocities.unbind(0)), torch.from_numpy(weights).to(self.z))[0]
            self._scatter(self.states[number], passed, value)

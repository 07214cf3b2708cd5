"""What an attempted step of an embedded pair sends to the device: the times and weights of all its stages."""

import numpy as np
import torch


class Table:
    """The times and weights of one attempt, (C, R) on the device, and the parts that each stage reads.

    Every entry is its factor times dt, and t more where it is a time; the weight of the state itself is 1.

    t: for each stage after the first and before the last, its times (R,) and the same on the host. t_last, t_extra: of
    the last stage and of each extra one. points: after each stage
    (numbers of the stored velocities with a weight, weights (R, 2 + K)); extra: before each extra stage, likewise.
    judged: the stored velocities that make the new state or its errors; state and errors, the weights of both.
    """

    def __init__(self, pair, z):
        self.rows, self.ones = [], []
        last = pair.num_stages - 1
        times = self._block([*pair.c[1:], *pair.extra_c])
        self.num_times = times.stop
        self.at_end = [row for row, c in enumerate(pair.c[1:]) if c == 1]
        points = [self._point(row, i) for i, row in enumerate(pair.a[1:])]
        extra = [self._point(row, i) for i, row in enumerate(pair.extra_a, start=last)]
        self.judged = [j for j in range(last) if any(_entry(row, j) for row in (pair.b, *pair.errors))]
        state = self._block([None, *(_entry(pair.b, j) for j in (last, *self.judged))])
        errors = [self._block([_entry(row, j) for j in (last, *self.judged)]) for row in pair.errors]
        self._allocate(z)
        self.times, self.last = times, last
        self.points, self.extra = ([(stored, self._weights(x)) for stored, x in plan] for plan in (points, extra))
        self.state, self.errors = self._weights(state), [self._weights(block) for block in errors]

    def _block(self, entries):
        """Rows with these factors, None being the weight of the state."""
        first = len(self.rows)
        self.ones += [first + k for k, entry in enumerate(entries) if entry is None]
        self.rows += [float(entry or 0) for entry in entries]
        return slice(first, len(self.rows))

    def _point(self, row, i):
        stored = [j for j in range(i) if _entry(row, j)]
        return stored, self._block([None, _entry(row, i), *(_entry(row, j) for j in stored)])

    def _allocate(self, z):
        self.factors = np.array(self.rows)[:, None]
        self.exact = np.empty((len(self.rows), z.shape[0]))
        on_host = z.device.type == "cpu"
        self.host = torch.empty(self.exact.shape, dtype=z.dtype, pin_memory=z.device.type == "cuda")
        self.device = self.host if on_host else torch.empty_like(self.host, device=z.device)
        self.array = self.host.numpy()

    def _weights(self, block):
        return self.device[block].t()

    def fill(self, t, dt, after):
        """For steps of dt (R,) from t (R,) to after (R,). What was sent before has been used: its error was read."""
        np.multiply(self.factors, dt, out=self.exact)
        self.exact[self.ones] = 1.0
        self.exact[: self.num_times] += t
        self.exact[self.at_end] = after
        self.array[...] = self.exact
        if self.device is not self.host:
            self.device.copy_(self.host, non_blocking=True)
        t = self.device[self.times].clone().unbind(0)  # the model may keep what it is given
        t = list(zip(t, self.exact[: self.num_times]))
        self.t, self.t_last, self.t_extra = t[: self.last - 1], t[self.last - 1], t[self.last :]


def inside_weights(pair, share, dt):
    """(stages with a weight, guided_step's weights (R, 1 + K)) of the state at `share` (R,) of a step of dt (R,)."""
    columns = [j for j in range(len(pair.inside[0])) if any(row[j] for row in pair.inside)]
    weights = np.zeros((len(share), len(columns)))
    basis = share  # x, x (1 - x), x^2 (1 - x), ...
    for number, row in enumerate(pair.inside):
        weights += basis[:, None] * np.array([row[j] for j in columns])
        basis = basis * (share if number % 2 else 1 - share)
    return columns, np.concatenate([np.ones((len(share), 1)), weights * dt[:, None]], 1)


def _entry(row, position):
    return row[position] if position < len(row) else 0.0

"""Step sizes of many samples, each controlled on its own, in float64 on the host.

    dt_next = dt safety error_n^(-alpha) error_(n-1)^beta,    alpha = (1 - 3/4 share) / k,  beta = share / k

with k = `controlled`, the order in which the error of a step falls. Every operation is elementwise and powers are taken
one by one, so that a sample's steps do not depend on which others there are.

Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", II.4 (initial step), and "... II", IV.2
(proportional and integral control).
"""

import copy
import math

import numpy as np

SAFETY = 0.9
SHARE = 0.2  # of the error before; dopri5's beta = 0.04 in Hairer's code
LARGEST, SMALLEST = 10.0, 0.2  # factors between one step and the next
STRETCH = 1.1  # a step that would end this near before the end goes there: its error grows by less than safety left
_LEAST = math.log(SMALLEST)
_REST = 1e-14  # steps below this share of the times would drown in their rounding


class StepControl:
    """Where each sample of the batch is and how far it goes next; every array is (R,) for the R samples of the batch.

    numbers: which samples they are. active: not finished. dt: of the attempt under way, 0 for a finished sample, which
    rides along. An attempt costs `evaluations`, and a sample that cannot afford one is finished too, not `reached`.
    """

    def __init__(
        self, batch_size, start, end, controlled, evaluations, max_nfe,
        *, beginning=2, safety=SAFETY, share=SHARE, largest=LARGEST,
    ):  # fmt: skip
        self.end, self.sign = end, math.copysign(1.0, end - start)
        self.controlled, self.evaluations = controlled, evaluations
        self.log_safety, self.share, self.log_largest = math.log(safety), share, math.log(largest)
        self.shortest = _REST * max(abs(start), abs(end))
        self.max_nfe = math.inf if max_nfe is None else max_nfe
        self.numbers = np.arange(batch_size)
        self.t = np.full(batch_size, float(start))
        self.dt = np.zeros(batch_size)
        self.size = np.zeros(batch_size)  # of the next step, without its sign
        self.log_error = np.zeros(batch_size)  # of the last accepted step, times beta
        self.nfe, self.accepted, self.rejected = (np.zeros(batch_size, dtype=np.int64) for _ in range(3))
        self.failed = np.zeros(batch_size, dtype=bool)  # the last attempt was rejected
        self.landing = np.zeros(batch_size, dtype=bool)  # the attempt under way ends at the end
        self.active = np.full(batch_size, beginning + evaluations <= self.max_nfe)
        self.reached = np.zeros(batch_size, dtype=bool)

    _ARRAYS = (
        "numbers", "t", "dt", "size", "log_error", "failed", "landing", "active",
        "nfe", "accepted", "rejected", "reached",
    )  # fmt: skip

    def take(self, rows):
        """The same control with the samples at these places only."""
        taken = copy.copy(self)
        taken.__dict__.update({name: getattr(self, name)[rows] for name in self._ARRAYS})
        return taken

    def put_into(self, whole):
        """Write what is known of these samples to their places in the control of all."""
        for name in self._ARRAYS if whole is not self else ():
            getattr(whole, name)[self.numbers] = getattr(self, name)

    def probe(self, scale, slope):
        """A first guess of dt from the norms of z and of its velocity, for one evaluation there."""
        self.nfe += 1
        slope_is_known = (scale >= 1e-5) & (slope >= 1e-5) & np.isfinite(slope)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.size = np.where(slope_is_known, 0.01 * scale / slope, 1e-6)
        self.size = np.minimum(self.size, abs(self.end - self.t[0]))
        self.dt = self.sign * self.size

    def first_step(self, slope, change):
        """The first step's size from the norms of the velocity and of its change over the probe."""
        self.nfe += 1
        curve = change / self.size
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.array([x ** (1 / self.controlled) for x in (0.01 / np.maximum(slope, curve)).tolist()])
        flat = np.maximum(slope, curve) <= 1e-15
        wanted = np.where(flat, np.maximum(1e-6, 1e-3 * self.size), wanted)
        wanted = np.where(np.isfinite(wanted) & (wanted > 0), wanted, self.size)
        self.size = np.minimum(100 * self.size, wanted)

    def begin(self, slope):
        """The first step's size, from the norm of the velocity alone: half of the one at whose end a straight line is
        off by the tolerance, if over [0, 1] the velocity changes by as much as it is long."""
        self.nfe += 1
        wanted = np.sqrt(0.5 / np.maximum(slope, 50.0))  # a tenth at most
        self.size = np.minimum(wanted, abs(self.end - self.t))

    def propose(self):
        """Set `dt` for the next attempt; returns the times (R,) at its end."""
        left = np.abs(self.end - self.t)
        self.landing = self.size * STRETCH >= left
        self.dt = np.where(self.landing, self.end - self.t, self.sign * self.size) * self.active
        return np.where(self.landing, self.end, self.t + self.dt)

    def judge(self, error, after):
        """Accept or reject the attempt by its error (R,), `after` being its end; returns what is accepted, (R,) bool.

        Moves the accepted samples, counts, finishes those that are there and sets the size of every next step.
        """
        self.nfe += self.evaluations * self.active
        accept = (error <= 1) & self.active  # not where the error is not finite
        log_error = np.array([math.log(x) for x in np.clip(error, 1e-10, 1e30).tolist()])
        alpha, beta = (1 - 0.75 * self.share) / self.controlled, self.share / self.controlled
        growth = np.where(accept, self.log_error - alpha * log_error, -log_error / self.controlled)
        growth = np.clip(growth + self.log_safety, _LEAST, np.where(accept & ~self.failed, self.log_largest, 0.0))
        self.size = np.abs(self.dt) * np.array([math.exp(x) for x in growth.tolist()])
        self.log_error = np.where(accept, beta * np.maximum(log_error, math.log(1e-4)), self.log_error)
        self.accepted += accept
        self.failed = self.active & ~accept
        self.rejected += self.failed
        self.t = np.where(accept, after, self.t)
        self.reached |= accept & self.landing
        self.active = self.active & ~self.reached & (self.nfe + self.evaluations <= self.max_nfe)
        return accept

    def stuck(self):
        """The place of a sample whose next step would be lost in the rounding of time, or None."""
        stuck = self.failed & self.active & (self.size < self.shortest)
        return int(stuck.argmax()) if stuck.any() else None

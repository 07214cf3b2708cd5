"""How strongly each sample is guided at its time: gamma, and the interval outside of which there is none."""

import sys
from numbers import Real

import torch

from lfm_fast.flow.checks import describe
from lfm_fast.guidance.network import Rows

_SLACK = 1e-7  # times are rounded to float32 on the way; half an ulp at 1 is 6e-8


class Scale:
    """gamma by sample and time, `none` being its value that guides nowhere: 1 of a blend, 0 of a term that is added.

    value: a number; (B,) floating, one per sample; a table ((t, gamma), ...) of strictly monotone times, linear between
    them and constant beyond; or a function of times, gamma(t) with t any tensor of them, of the same shape.
    interval: (low, high) in t, both ends inside; outside it gamma is `none`.

    Raises ValueError for anything else.
    """

    def __init__(self, value, interval=(0.0, 1.0), none=1.0):
        _check_interval(interval)
        self.schedule = _schedule(value)
        if isinstance(value, torch.Tensor) and value.ndim == 0:
            value = value.item()
        elif isinstance(value, torch.Tensor):
            value = value.detach().clone()  # the caller may write to it later
        self.value, self.interval, self.none = value, tuple(interval), none
        self.values = value.tolist() if isinstance(value, torch.Tensor) else None  # of each sample
        self._known = None

    @property
    def trivial(self):
        """Whether nothing is guided at any time."""
        if self.schedule is not None:
            return False
        return all(value == self.none for value in ([self.value] if self.values is None else self.values))

    def check(self, batch_size):
        """Raise ValueError where it holds one number per sample, of another number of samples."""
        if self.values is not None and len(self.values) != batch_size:
            raise ValueError(_sentence(self.value, f"({batch_size},)"))

    def part(self, rows):
        """The same for some of the samples, (R,) int64, where it holds one number for each."""
        return self if self.values is None else Scale(self.value[rows.to(self.value.device)], self.interval, self.none)

    def __call__(self, samples, t, z, time=None, times=None):
        """(gamma (B,) in the type of z, Rows that are guided); (None, None) where none is, rows None where all are.

        samples: the Rows of the whole batch that z holds, None being all; t (B,); time: t as a float where all share
        one that the host knows, times: (B,) on the host where it knows each. t is read back only for an interval at
        unknown time.
        """
        inside = self._inside(t, time, times)
        if inside is not None and not inside:
            return None, None
        if self.schedule is not None:
            return self._scheduled(inside, t, z, time)
        # the same objects again while nothing changes, so that what is made of them is kept too
        key, known = (samples, inside, z.shape[0], z.dtype, z.device), self._known
        if known is None or known[0] != key:
            self._known = known = (key, self._fixed(samples, inside, z))
        return known[1]

    def _inside(self, t, time, times):
        """The rows whose time is inside the interval, None being all."""
        low, high = self.interval
        if low <= 0.0 and high >= 1.0:
            return None
        low, high = low - _SLACK, high + _SLACK
        if time is not None:
            return None if low <= time <= high else []
        times = (t if times is None else times).tolist()
        rows = [row for row, time in enumerate(times) if low <= time <= high]
        return None if len(rows) == len(times) else rows

    def _fixed(self, samples, inside, z):
        value = torch.as_tensor(self.value, dtype=z.dtype).to(z.device)
        if self.values is None:
            return self._on_device([] if self.value == self.none else inside, value.expand(len(z)))
        value = value if samples is None else value[samples.index]
        values = self.values if samples is None else [self.values[number] for number in samples.numbers]
        return self._on_device(self._guided(inside, values), value)

    def _guided(self, inside, values):
        """The rows of those inside that are guided, None being all."""
        rows = [row for row in (range(len(values)) if inside is None else inside) if values[row] != self.none]
        return None if len(rows) == len(values) else rows

    def _scheduled(self, inside, t, z, time):
        if time is not None:
            value = float(self.schedule(torch.tensor(time, dtype=torch.float64)))
            return self._on_device([] if value == self.none else None, z.new_full((len(z),), value))
        value = self.schedule(t.double())
        if t.device.type == "cpu":  # elsewhere it would have to be waited for
            inside = self._guided(inside, value.tolist())
        return self._on_device(inside, value.to(z.dtype))

    def _on_device(self, rows, value):
        if rows is None:
            return value, None
        if not rows:
            return None, None
        chosen = Rows(rows, torch.tensor(rows, device=value.device))
        return torch.full_like(value, self.none).index_copy(0, chosen.index, value[chosen.index]), chosen


def _check_interval(interval):
    whole = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(map(is_finite, interval))
    if not whole or not 0.0 <= interval[0] <= interval[1] <= 1.0:
        raise ValueError(f"guidance_interval is {interval!r}, expected (low, high) in t with 0 <= low <= high <= 1.")


def sums(x):
    """Of all elements of each sample, (B,): to the last bit the same whoever else is in the batch, on a CPU."""
    flat = x.flatten(1)
    # one row alone would be shared out among threads, and be summed in another order than beside others
    return flat.sum(1) if len(flat) > 1 else flat.expand(2, -1).sum(1)[:1]


def per_sample(values, z):
    """(B,) as a factor of z (B, ...)."""
    return values.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))


def is_finite(value):
    """Whether it is a number, and not infinite, NaN, True or False."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _sentence(value, shape="(B,)"):
    hint = ""
    if isinstance(value, torch.Tensor) and value.ndim and value.is_floating_point():
        hint = "; it is one number per sample, the same for all channels"
    came = describe(value) if isinstance(value, torch.Tensor) else repr(value)
    return f"guidance_scale is {came}, expected a number, {shape} floating, a function of t or ((t, scale), ...){hint}."


def _schedule(value):
    """The function of times (any shape, float64) that a scale is, or None for a number or one per sample."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or value.ndim > 1:
            raise ValueError(_sentence(value))
        if not bool(value.isfinite().all()):
            raise ValueError(f"guidance_scale is {value!r}, expected finite numbers.")
        return None
    if isinstance(value, (tuple, list)):
        return _Table(value)
    if callable(value):
        return _Function(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(_sentence(value))
    if not is_finite(value):
        raise ValueError(f"guidance_scale is {value!r}, expected finite numbers.")
    return None


class _Table:
    """Linear between the given times, constant beyond."""

    def __init__(self, rows):
        pairs = [row for row in rows if isinstance(row, (tuple, list)) and len(row) == 2 and all(map(is_finite, row))]
        self.rows = sorted(pairs)
        times = [time for time, _ in self.rows]
        if not rows or len(pairs) < len(rows) or len(set(times)) < len(times):
            raise ValueError(
                f"guidance_scale is {rows!r}, expected ((t, scale), ...) of finite numbers, each t once; one number "
                "per sample is a tensor (B,)."
            )
        self._tensors = {}

    def __call__(self, t):
        if t.device not in self._tensors:
            self._tensors[t.device] = torch.tensor(self.rows, dtype=torch.float64, device=t.device).t().contiguous()
        times, scales = self._tensors[t.device]
        if len(times) == 1:
            return scales[0].expand(t.shape)
        after = torch.searchsorted(times, t.contiguous()).clamp(1, len(times) - 1)
        share = ((t - times[after - 1]) / (times[after] - times[after - 1])).clamp(0, 1)
        return torch.lerp(scales[after - 1], scales[after], share)


class _Function:
    """A user's function of times, tried on some before it is used."""

    def __init__(self, function):
        self.function = function
        times = torch.linspace(0, 1, 11, dtype=torch.float64)
        try:
            scales = self(times)
            whole = scales.shape == times.shape and bool(scales.isfinite().all())
        except Exception as error:
            raise ValueError(f"guidance_scale failed as a function of a tensor of times ({error}).") from error
        if not whole:
            raise ValueError(
                f"guidance_scale as a function of 11 times from 0 to 1 returned {describe(scales)}, expected 11 finite "
                "numbers."
            )

    def __call__(self, t):
        scales = torch.as_tensor(self.function(t), dtype=t.dtype, device=t.device)
        return scales.expand(t.shape) if scales.ndim == 0 else scales

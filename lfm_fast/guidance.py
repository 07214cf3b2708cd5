"""Guidance: from a model to the field that a solver integrates.

    v = scale v_conditional + (1 - scale) v_unconditional          (Ho & Salimans, arXiv 2207.12598, on velocities)

The blend is left to the solver's fused step. A guidance object is anything called

    guidance(network, t, z, time=None) -> (velocity, unconditional or None, scale (B,) or None)

with a `Network` to evaluate, t (B,), z (B, ...), and `time` the same t as a Python float where the whole batch shares
it; handing it on to the network lets a model that prepares its times use them. One that is no linear blend returns
(velocity, None, None). Where it has a `guided` that is false, no unconditional velocity will be wanted. A velocity may
be a buffer that the model writes again: what is kept beyond the network's next call has to be cloned.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lfm_fast.flow.checks import check_velocity

_HALF = (torch.bfloat16, torch.float16)
_STATE = (torch.float32, torch.float64)
_SLACK = 1e-7  # times are rounded to float32 on the way; half an ulp at 1 is 6e-8


@dataclass(frozen=True, eq=False)
class Rows:
    """Some of the samples: their numbers in the batch on the host, for counting, and (R,) int64 on the device."""

    numbers: list[int]
    index: torch.Tensor


class Network:
    """A model with its labels as guidance calls it: `conditional`, `unconditional`, or `both`, in one forward if it
    can.

    Counts `calls` of the model and `forwards` (B,), the rows it computed for each sample. A model whose weights are of
    another type than the state gets z in its own type; t stays float32 for half-precision weights, because bfloat16
    would move it by up to 0.002.

    A model that says `prepares`, as DiT does, is evaluated in its sampling form at each `time` that was announced by
    `prepare` and is named in the call; elsewhere it is called, as any other model is.
    """

    def __init__(self, model, z, y=None, null_label=None, model_kwargs=None):
        self.model, self.y, self.null_label, self.kwargs = model, y, null_label, model_kwargs or {}
        self.dtype = _weight_type(model) or z.dtype
        self.time_dtype = torch.float32 if self.dtype in _HALF else self.dtype
        self.calls, self._counts = 0, Counter()  # forwards by Rows; those of all samples under None
        self._batch_size = z.shape[0]
        self._like = z.new_empty(1)  # the state's type and device
        self._prepared, self._numbers = None, {}  # the sampling form, and the number of each time in it
        self._joint = None  # (rows, null labels, samples) of the last evaluation of both, which no model gets to see

    @property
    def forwards(self):
        """Rows computed for each sample so far, (B,)."""
        total = torch.full((self._batch_size,), self._counts[None])
        for rows, count in self._counts.items():
            if rows is not None:
                total[rows.numbers] += count
        return total

    @property
    def selects(self):
        """Whether rows may be left out or repeated: not where further arguments may hold one entry per sample."""
        return not self.kwargs

    def prepare(self, times, guided=True):
        """Announce times (floats, in order of use); guided: the unconditional velocity will be asked for too.

        What the model computes beforehand is of its weights of now; it lives as long as this network.
        """
        # asked of the class: torch.compile's wrapper hands attributes through, and would be gone around
        if self.kwargs or not getattr(type(self.model), "prepares", False) or not self.model.prepares:
            return
        self._numbers = {time: number for number, time in enumerate(dict.fromkeys(times))}
        moments = torch.tensor(list(self._numbers), dtype=torch.float64).to(self._like).to(self.time_dtype)
        named = guided and self.null_label is not None
        labels = ([] if self.y is None else [self.y]) + ([self._null(self._like)] if named else [])
        unlabelled = self.y is None or (guided and not named)
        self._prepared = self.model.prepare(moments, torch.cat(labels) if labels else None, unlabelled=unlabelled)

    def conditional(self, t, z, time=None):
        """model(t, z, y) (B, ...); time: t as a float, where all samples share one that the host knows."""
        self._counts[None] += 1
        if time in self._numbers:
            return self._read(time, z, self.y)
        return self._call(t, z, {} if self.y is None else {"y": self.y.clone()})

    def unconditional(self, t, z, rows=None, time=None):
        """model(t, z, null label), or model(t, z, y=None) without one; `rows`: the samples t and z hold, or all."""
        self._counts[rows] += 1
        y = None if self.null_label is None else self._null(z)
        return self._read(time, z, y) if time in self._numbers else self._call(t, z, {"y": y})

    def both(self, t, z, rows=None, time=None):
        """(conditional (B, ...), unconditional (R, ...)) with `rows` the samples to evaluate both ways, or all.

        One forward where there is a null label and the rows can be put together, else two.
        """
        if self.null_label is None or self.y is None or not self.selects:
            chosen = (t, z) if rows is None else (t[rows.index], z[rows.index])
            velocity = self.conditional(t, z, time).clone()  # the model may write the next one to the same memory
            return velocity, self.unconditional(*chosen, rows, time)
        self._counts[None] += 1
        self._counts[rows] += 1
        null, samples = self._joined(z, rows)
        labels = torch.cat([self.y, null])
        if time in self._numbers:
            velocity = self._read(time, z, labels, samples)
        else:
            chosen = (t, z) if rows is None else (t[rows.index], z[rows.index])
            velocity = self._call(torch.cat([t, chosen[0]]), torch.cat([z, chosen[1]]), {"y": labels}, own=True)
        return velocity[: z.shape[0]], velocity[z.shape[0] :]

    def _joined(self, z, rows):
        """The null labels (R,) of `rows`, and the sample (B + R,) of each row of both evaluations."""
        if self._joint is None or self._joint[0] is not rows:
            samples = torch.arange(z.shape[0], device=z.device)
            chosen = samples if rows is None else rows.index
            self._joint = (rows, self._null(chosen), torch.cat([samples, chosen]))
        return self._joint[1:]

    def _read(self, time, z, y, samples=None):
        """The velocity in the sampling form, which writes to none of its inputs."""
        self.calls += 1
        return _for_solver(self._prepared(self._numbers[time], z.to(self.dtype), y, samples), z)

    def _null(self, z):
        dtype = torch.int64 if self.y is None else self.y.dtype
        return torch.full((z.shape[0],), self.null_label, dtype=dtype, device=z.device)

    def _call(self, t, z, labels, own=False):
        """The model's velocity; own: t and z are nobody else's, so the model may write to them."""
        self.calls += 1
        t, z_in = t.to(self.time_dtype, copy=not own), z.to(self.dtype, copy=not own)
        velocity = self.model(t, z_in, **labels, **self.kwargs)
        check_velocity(velocity, z)
        return _for_solver(velocity, z)


def _for_solver(velocity, z):
    """In a type that the solver of a state z takes."""
    as_it_is = velocity.dtype == z.dtype or (z.dtype == torch.float32 and velocity.dtype in _HALF)
    return velocity if as_it_is else velocity.to(z.dtype)


def _weight_type(model):
    """The type of the model's first floating parameter; None where it has none, or one that no state can be cast to."""
    if not isinstance(model, nn.Module):
        return None
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return first if first in _HALF + _STATE else None


class LinearGuidance:
    """Classifier-free guidance v = scale v_cond + (1 - scale) v_uncond for t inside the interval, v_cond outside it.

    scale: a number or (B,); a sample of scale 1 costs one forward, and so does every sample outside the interval
    (Kynkaanniemi et al., arXiv 2404.07724). interval: (low, high) in t, both ends inside.
    """

    def __init__(self, scale=1.0, interval=(0.0, 1.0)):
        self.scale, self.interval = scale, interval
        scales = scale.reshape(-1).tolist() if isinstance(scale, torch.Tensor) else [float(scale)]
        rows = [row for row, value in enumerate(scales) if value != 1.0]
        self.rows = None if len(rows) == len(scales) else rows  # the samples that are guided, None being all of them
        self._prepared = None

    @property
    def guided(self):
        """Whether any sample is."""
        return self.rows is None or len(self.rows) > 0

    def __call__(self, network, t, z, time=None):
        rows = self._rows_inside(t, time)
        if rows is not None and not rows:
            return network.conditional(t, z, time), None, None
        scale, chosen = self._on_device(rows, z)
        if chosen is None or not network.selects:
            return *network.both(t, z, time=time), scale
        velocity, unconditional = network.both(t, z, chosen, time)
        return velocity, velocity.index_copy(0, chosen.index, unconditional), scale

    def _rows_inside(self, t, time):
        """The samples to evaluate both ways, None being all; reads t back only for an interval at unknown time."""
        low, high = self.interval
        if low <= 0.0 and high >= 1.0:
            return self.rows
        low, high = low - _SLACK, high + _SLACK
        if time is not None:
            return self.rows if low <= time <= high else []
        times = t.tolist()
        rows = [row for row in (range(len(times)) if self.rows is None else self.rows) if low <= times[row] <= high]
        return None if len(rows) == len(times) else rows

    def _on_device(self, rows, z):
        """scale (B,), 1 outside the rows, and the Rows or None; made once and kept while nothing changes."""
        key = (rows, z.shape[0], z.dtype, z.device)
        if self._prepared is None or self._prepared[0] != key:
            scale = torch.as_tensor(self.scale, dtype=z.dtype).expand(z.shape[0]).to(z.device)
            chosen = None if rows is None else Rows(rows, torch.tensor(rows, device=z.device))
            if chosen is not None:
                scale = torch.ones_like(scale).index_copy(0, chosen.index, scale[chosen.index])
            self._prepared = (key, scale, chosen)
        return self._prepared[1:]


class GuidedField:
    """The field (see lfm_fast.solvers) of a network under a guidance object; counts its evaluations in `nfe`."""

    def __init__(self, network, guidance):
        self.network, self.guidance, self.nfe = network, guidance, 0

    def __call__(self, t, z):
        return self._evaluate(t, z)

    def prepare(self, times):
        """Announce the times that `at` will be asked for, floats in order."""
        self.network.prepare(times, getattr(self.guidance, "guided", True))

    def at(self, time):
        """The field at one time of the whole batch, known on the host."""
        return partial(self._evaluate, time=time)

    def _evaluate(self, t, z, time=None):
        self.nfe += 1
        return self.guidance(self.network, t, z, time=time)

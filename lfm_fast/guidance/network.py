"""A model with its labels, as guidance and solvers call it."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from lfm_fast.flow.checks import check_velocity

_HALF = (torch.bfloat16, torch.float16)
_STATE = (torch.float32, torch.float64)


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

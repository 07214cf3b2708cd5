"""A model with its labels, as guidance and solvers call it."""

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from lfm_fast.flow.checks import check_velocity
from lfm_fast.guidance.joining import joining_pays

_HALF = (torch.bfloat16, torch.float16)
_STATE = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some of the samples: their numbers in the batch on the host, for counting, and (R,) int64 on the device."""

    numbers: list[int]
    index: torch.Tensor


class Count:
    """What the networks of one integration cost together: evaluations of the field, `nfe`; `calls` of a model; and rows
    by sample of the whole batch."""

    def __init__(self, batch_size):
        self.nfe, self.calls, self.batch_size = 0, 0, batch_size
        self._evaluations = Counter()  # by (the samples that a network holds, those of them it computed); None is all

    def add(self, samples, rows):
        """One row more for each of `rows`, numbered among `samples`."""
        self._evaluations[samples, rows] += 1

    @property
    def forwards(self):
        """Rows computed for each sample so far, (B,)."""
        total = torch.zeros(self.batch_size, dtype=torch.int64)
        for (samples, rows), count in self._evaluations.items():
            numbers = range(self.batch_size) if samples is None else samples.numbers
            total[[numbers[row] for row in rows.numbers] if rows is not None else list(numbers)] += count
        return total


class Network:
    """A model with its labels as guidance calls it: `conditional`, `unconditional`, or `both`, in one forward if it
    can.

    Counts `calls` of the model and `forwards` (B,), the rows it computed for each sample. A model whose weights are of
    another type than the state gets z in its own type; t stays float32 for half-precision weights, because bfloat16
    would move it by up to 0.002. `samples`: the Rows of the whole batch that t and z hold, None being all of them.

    A model that says `prepares`, as DiT does, is evaluated in its sampling form at each `time` that was announced by
    `prepare` and is named in the call; elsewhere it is called, as any other model is.

    Further arguments of the model that it names among its `sample_arguments` hold one entry per sample, and go with
    their samples; any others are of the whole batch, whose rows can then be neither left out nor repeated.
    """

    samples = None
    recorded = False  # whether it runs inside a CUDA graph, which the host must not be waited for in
    times = None  # (B,) the times of the evaluation under way, on the host, where the solver knows them

    def __init__(self, model, z, y=None, null_label=None, model_kwargs=None):
        self.y, self.null_label = y, null_label
        of_samples = getattr(model, "sample_arguments", ())
        self.kwargs = {name: value for name, value in (model_kwargs or {}).items() if name not in of_samples}
        self.entries = {name: value for name, value in (model_kwargs or {}).items() if name in of_samples}
        self._chosen = None  # (rows, their entries) of the last evaluation of some rows
        self.count = Count(z.shape[0])
        self._like = z.new_empty(1)  # the state's type and device
        self._null_labels = None  # (B, rows, null labels, samples) of the last evaluation of both
        self.joins = {}  # what joining_pays found, by kind of evaluation
        self._others = {}  # networks of other models beside this one, by the model's id and the samples
        self._take(model)

    def _take(self, model):
        self.model, self.dtype = model, weight_type(model) or self._like.dtype
        self.time_dtype = torch.float32 if self.dtype in _HALF else self.dtype
        self._prepared, self._numbers = None, {}  # the sampling form, and the number of each time in it
        # Whether it writes to its inputs is seen at its first call. Elsewhere than on the CPU it would have to be
        # waited for, and in inference mode tensors do not tell.
        tells = not any(x.is_inference() for x in (self._like, self.y) if x is not None)
        self._writes = None if self._like.device.type == "cpu" and tells else True

    def beside(self, model):
        """The network of another model under the same labels, counted together with this one; made once."""
        key = (id(model), self.samples)
        if key not in self._others:
            other = copy.copy(self)
            other.joins = {}
            other._take(model)
            self._others[key] = other
        return self._others[key]

    def restart(self, y, entries):
        """Count from zero, for as many samples under other labels, with other entries; what is prepared stays."""
        self._others = {key: other for key, other in self._others.items() if key[1] is None}
        count = Count(self.count.batch_size)
        for network in (self, *self._others.values()):
            network.y, network.entries, network._chosen, network.count = y, entries, None, count

    def select(self, rows):
        """The network of some samples of the whole batch, Rows; counted together with it."""
        assert self.samples is None
        part = copy.copy(self)
        part.samples, part.y = rows, None if self.y is None else self.y[rows.index]
        part.entries, part._chosen = self._entries(rows), None
        return part

    def _entries(self, rows):
        """The arguments of `rows`, or of all, one entry for each."""
        if rows is None or not self.entries:
            return self.entries
        if self._chosen is None or self._chosen[0] is not rows:
            entries = {name: x if x is None else x[rows.index] for name, x in self.entries.items()}
            self._chosen = (rows, entries)
        return self._chosen[1]

    @property
    def calls(self):
        return self.count.calls

    @property
    def forwards(self):
        return self.count.forwards

    @property
    def selects(self):
        """Whether rows may be left out or repeated: not where further arguments may hold one entry per sample."""
        return not self.kwargs

    @property
    def prepares(self):
        """Whether the model is one that has a sampling form, and so no state that a further call would change."""
        # asked of the class: torch.compile's wrapper hands attributes through, and would be gone around
        return not self.kwargs and getattr(type(self.model), "prepares", False) and self.model.prepares

    def prepare(self, times, guided=True, labelled=True):
        """Announce times (floats, in order of use); guided, labelled: the unconditional, the conditional velocity will
        be asked for.

        What the model computes beforehand is of its weights of now; it lives as long as this network, and serves again
        for the same times.
        """
        if not self.prepares:
            self._prepared, self._numbers = None, {}
            return
        numbers = {time: number for number, time in enumerate(dict.fromkeys(times))}
        named = guided and self.null_label is not None
        labels = [self.y] if labelled and self.y is not None else []
        labels += [self._null(self._like)] if named else []
        unlabelled = (labelled and self.y is None) or (guided and not named)
        y = torch.cat(labels) if labels else None
        if self._prepared is None or numbers != self._numbers:
            moments = torch.tensor(list(numbers), dtype=torch.float64).to(self._like).to(self.time_dtype)
            self._prepared, self._numbers = self.model.prepare(moments, y, unlabelled=unlabelled), numbers
        elif not self.recorded:
            self._prepared.relabel(y, unlabelled)
        if self.recorded:
            self._prepared.relabel(y, unlabelled, distinct=False)

    def conditional(self, t, z, time=None, rows=None):
        """model(t, z, y) (B, ...); time: t as a float, where all samples share one that the host knows; `rows`: the
        samples that t and z hold here, None being all."""
        self.count.add(self.samples, rows)
        return self._conditional(t, z, time, rows)

    def unconditional(self, t, z, rows=None, time=None):
        """model(t, z, null label), or model(t, z, y=None) without one; time and `rows` as of `conditional`."""
        self.count.add(self.samples, rows)
        return self._unconditional(t, z, time, rows)

    def both(self, t, z, rows=None, time=None, joint=None):
        """(conditional (B, ...), unconditional (R, ...)) with `rows` the samples to evaluate both ways, or all.

        One forward where there is a null label and the rows can be put together, unless `joint` is False, or None and
        two are faster (`joining_pays`).
        """
        self.count.add(self.samples, None)
        self.count.add(self.samples, rows)
        if self.null_label is None or self.y is None or not self.selects:
            return self._apart(t, z, rows, time)
        if joint is None and self.prepares:
            runs = {"joint": lambda: self._together(t, z, rows, time), "apart": lambda: self._apart(t, z, rows, time)}
            joint = joining_pays(self, z, rows, runs)
        return (self._apart if joint is False else self._together)(t, z, rows, time)

    def _conditional(self, t, z, time, rows=None):
        y = self.y if rows is None or self.y is None else self.y[rows.index]
        if time in self._numbers:
            return self._read(time, z, y, rows)
        return self._call(t, z, {} if y is None else {"y": y}, self._entries(rows))

    def _unconditional(self, t, z, time, rows=None):
        y = None if self.null_label is None else self._null(z)
        if time in self._numbers:
            return self._read(time, z, y, rows)
        return self._call(t, z, {"y": y}, self._entries(rows))

    def _apart(self, t, z, rows, time):
        velocity = self._conditional(t, z, time).clone()  # the model may write the next one to the same memory
        chosen = (t, z) if rows is None else (t[rows.index], z[rows.index])
        return velocity, self._unconditional(*chosen, time, rows)

    def _together(self, t, z, rows, time):
        null, samples = self._joined(z, rows)
        labels = torch.cat([self.y, null])
        if time in self._numbers:
            velocity = self._read(time, z, labels, samples=samples)
        else:
            # what is put together is nobody else's: the model may write to it
            chosen = (t, z) if rows is None else (t[rows.index], z[rows.index])
            entries = {name: x if x is None else x[samples] for name, x in self.entries.items()}
            velocity = self._velocity(torch.cat([t, chosen[0]]), torch.cat([z, chosen[1]]), {"y": labels}, entries)
        return velocity[: z.shape[0]], velocity[z.shape[0] :]

    def _joined(self, z, rows):
        """The null labels (R,) of `rows`, and the sample (B + R,) of each row of both evaluations."""
        if self._null_labels is None or self._null_labels[:2] != (z.shape[0], rows):
            samples = torch.arange(z.shape[0], device=z.device)
            chosen = samples if rows is None else rows.index
            self._null_labels = (z.shape[0], rows, self._null(chosen), torch.cat([samples, chosen]))
        return self._null_labels[2:]

    def _read(self, time, z, y, rows=None, samples=None):
        """The velocity in the sampling form, which writes to none of its inputs. z and y are of `rows`; or z of all,
        and y of `samples`."""
        self.count.calls += 1
        velocity = self._prepared(self._numbers[time], z.to(self.dtype), y, samples, **self._entries(rows))
        return _for_solver(velocity, z)

    def _null(self, z):
        dtype = torch.int64 if self.y is None else self.y.dtype
        return torch.full((z.shape[0],), self.null_label, dtype=dtype, device=z.device)

    def _call(self, t, z, labels, entries):
        """The model's velocity. A model that writes to its inputs gets copies of them.

        Its first call shows whether it does. One that does not is given t, z and y as they are: a copy of them at every
        evaluation is most of what it costs beside the model. Solvers leave what they have handed out as it is, because
        the model may keep it.
        """
        y = labels.get("y")
        if self._writes is False:
            before = t._version + z._version + (0 if y is None else y._version)
            velocity = self._velocity(t, z, labels, entries)
            if before != t._version + z._version + (0 if y is None else y._version):
                raise RuntimeError(
                    "The model wrote to one of its inputs t, z, y, and had not done so at its first call, so that the "
                    "state is lost: let it write to a copy of its own, as in z = z.clone()."
                )
            return velocity
        given = [x for x in (t, z, y) if x is not None]
        copies = [x.clone() for x in given]
        versions = [] if self._writes else [x._version for x in copies]
        velocity = self._velocity(*copies[:2], dict.fromkeys(labels, None if y is None else copies[2]), entries)
        if self._writes is None:
            unwritten = versions == [x._version for x in copies]
            self._writes = not (unwritten and all(torch.equal(copy, x) for copy, x in zip(copies, given)))
        return velocity

    def _velocity(self, t, z, labels, entries):
        """The model at t and z, which it may write to."""
        self.count.calls += 1
        if t.dtype != self.time_dtype or not t.is_contiguous():
            t = t.to(self.time_dtype).contiguous()
        velocity = self.model(t, z if z.dtype == self.dtype else z.to(self.dtype), **labels, **entries, **self.kwargs)
        check_velocity(velocity, z)
        return _for_solver(velocity, z)


def _for_solver(velocity, z):
    """In a type that the solver of a state z takes."""
    as_it_is = velocity.dtype == z.dtype or (z.dtype == torch.float32 and velocity.dtype in _HALF)
    return velocity if as_it_is else velocity.to(z.dtype)


def weight_type(model):
    """The type of the model's first floating parameter; None where it has none, or one that no state can be cast to,
    or where the model says `casts`: it takes a state of any type and casts it itself."""
    if not isinstance(model, nn.Module) or getattr(type(model), "casts", False):
        return None
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return first if first in _HALF + _STATE else None

"""What a CUDA graph does, on a CPU: the operators of a function are written down once and run again on the same memory.

As in a graph, nothing of Python runs a second time: numbers are those of the first run, and what changes has to come
through tensors that stay where they are.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lfm_fast import _graphs


class Tape(TorchDispatchMode):
    """Stands for `lfm_fast._graphs.CudaGraph`. `recorded` counts tapes, `replayed` their runs, over all of them."""

    recorded = replayed = 0

    def __init__(self, function, device, warm_up=None, pool=None):
        super().__init__()
        self._steps, self._before = [], []
        (warm_up or function)()
        with self:
            self._result = function()
        with torch.no_grad():  # a graph's recording computes nothing
            for x in tree_leaves(self._result):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    x.fill_(torch.nan)
            for x, held in reversed(self._before):
                x.copy_(held)
        Tape.recorded += 1

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for place, argument in enumerate(operator._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[place] if place < len(args) else kwargs[argument.name]
                self._before += [(x.detach(), x.detach().clone()) for x in tree_leaves(written)]
        results = operator(*args, **kwargs)
        self._steps.append((operator, args, kwargs, _made(operator, results)))
        return results

    def __call__(self):
        Tape.replayed += 1
        with torch.no_grad():
            for operator, args, kwargs, kept in self._steps:
                for memory, x in zip(kept, _made(operator, operator(*args, **kwargs)), strict=True):
                    memory.copy_(x)
        return self._result


class Operators(TorchDispatchMode):
    """Every operator with its numbers, in `calls`; an end where one goes from one device to another. `only`: the device
    that all of them have to be on."""

    def __init__(self, only=None):
        super().__init__()
        self.calls, self._only = [], only

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        assert self._only is None or devices <= {self._only}, f"{operator} and the host"
        assert len(devices) < 2, f"{operator} goes from one device to another"
        self.calls.append(
            (operator.name(), [x for x in tree_leaves((args, kwargs)) if not isinstance(x, torch.Tensor)])
        )
        return result


def _made(operator, results):
    """The tensors among an operator's results that are no views of its arguments."""
    results = results if isinstance(results, (tuple, list)) else (results,)
    fresh = [x for x, returned in zip(results, operator._schema.returns) if returned.alias_info is None]
    return [x.detach() for x in tree_leaves(fresh) if isinstance(x, torch.Tensor)]


def record_on_the_cpu(monkeypatch):
    """Let the package take tapes for CUDA graphs, and the CPU for a device that has them."""
    monkeypatch.setattr(_graphs, "CudaGraph", Tape)
    monkeypatch.setattr(_graphs, "why_not", lambda device: None)
    monkeypatch.setattr(_graphs, "new_pool", lambda device: None)
    monkeypatch.setattr(Tape, "recorded", 0)
    monkeypatch.setattr(Tape, "replayed", 0)

"""torch.compile for networks: one graph for any batch, with and without labels."""

import contextlib
import types

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lfm_fast import _library


class Compiled:
    """`function(what, *tensors)`, compiled without a graph break; one graph serves every batch size of one or more.

    tensors: each (B, ...), or None. `what` is anything else, such as the module whose function it is. The compiler is
    told that B is unknown, because it would otherwise make one graph for a batch of 1 and one more for the rest. An
    empty batch, and a call from inside another compiled function, run the plain function. Options are torch.compile's;
    with dynamic=False there is a graph for every batch size, as there.

    A copy or a pickle of it is None: a copied network is not compiled until somebody compiles it.
    """

    def __init__(self, function, **options):
        _library.load()  # a graph from the compiler's cache on disk calls our kernels without loading them
        self._plain, self._any_batch = function, options.get("dynamic") is not False

        def known_batch(what, *tensors):
            batches = [x.shape[0] for x in tensors if x is not None]
            torch._check(batches[0] > 0)
            for batch in batches[1:]:
                torch._check(batch == batches[0])
            return function(what, *tensors)

        self._compiled = torch.compile(_with_own_code(known_batch), **{"fullgraph": True, **options})

    def __call__(self, what, *tensors: Tensor | None):
        if torch.compiler.is_compiling() or tensors[0].shape[0] == 0:
            return self._plain(what, *tensors)
        from torch._dynamo.decorators import mark_unbacked  # Dynamo takes seconds to import

        # a slice that begins inside its memory would get a graph of its own: rows of a table of modulations, say
        tensors = [x.clone() if x is not None and x.storage_offset() else x for x in tensors]
        for x in tensors:
            if x is not None and self._any_batch:
                mark_unbacked(x, 0)
        with _in_one_graph():
            return self._compiled(what, *tensors)

    def __reduce__(self):
        return _nothing, ()


def _nothing():
    return None


def _with_own_code(function):
    """The same function in a code object of its own. Dynamo counts recompilations per code object, and gives up after
    a few: two networks must not use up each other's."""
    code, defaults = function.__code__.replace(), function.__defaults__
    return types.FunctionType(code, function.__globals__, function.__name__, defaults, function.__closure__)


def _in_one_graph():
    """Inside DistributedDataParallel's forward Dynamo would cut graphs at gradient buckets, so that the exchange starts
    earlier. Blocks are small enough without, and the cut cannot handle checkpointing."""
    if DistributedDataParallel._get_active_ddp_module() is None:
        return contextlib.nullcontext()
    return torch._dynamo.config.patch(optimize_ddp=False)

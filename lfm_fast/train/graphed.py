"""The gradients of a step as CUDA graphs, which are replayed on each new batch. Never run on a GPU so far: opt-in.

The optimizer's pass stays outside: its learning rate, its step count and the clipping factor change from step to step,
and it is one launch as it is.
"""

from lfm_fast import _graphs


class GraphedGradients:
    """`add_gradients(*inputs) -> loss ()`, recorded once for each kind of inputs, and replayed.

    Inputs are copied to memory of their own that the graphs read. Gradients stay in memory, too: after the first part
    of a step (no Parameter has a gradient) the Parameters have those that its graph writes, and graphs of further parts
    add to them. All graphs share the memory between forward and backward pass.

    Args:
        add_gradients: a function of tensors (or None) and of the Parameters' memory, as `step.add_gradients_of_part`.
        trained: the Parameters it adds gradients to.
        device: a CUDA device.
    """

    def __init__(self, add_gradients, trained, device):
        self._add_gradients, self._trained, self._device = add_gradients, trained, device
        self._records = {}  # by kind of inputs, and the record whose gradients are added to
        self._owner = None  # the record whose gradients the Parameters have
        self._pool = None

    def __call__(self, *inputs):
        if self._without():
            self._owner = None
        kind = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        record = self._records.get((kind, self._owner))
        if record is None:
            record = self._records[kind, self._owner] = self._recorded(inputs)
        for memory, x in zip(record.inputs, inputs):
            if memory is not None:
                memory.copy_(x, non_blocking=True)
        loss, *gradients = record.graph()
        if self._owner is None:
            self._owner = record
            self._have(gradients)
        return loss

    def _without(self):
        return all(parameter.grad is None for parameter in self._trained)

    def _have(self, gradients):
        for parameter, gradient in zip(self._trained, gradients):
            parameter.grad = gradient

    def _recorded(self, inputs):
        """The graph for such inputs, by the gradients that the Parameters have, or have not, now."""
        kept = [parameter.grad for parameter in self._trained]
        memory = [None if x is None else x.to(self._device, copy=True).contiguous() for x in inputs]

        def first():
            self._have([None] * len(kept))
            loss = self._add_gradients(*memory)
            return [loss, *(parameter.grad for parameter in self._trained)]

        def warm_up():
            first()
            self._have([None] * len(kept))

        def further():
            self._have(kept)
            return [self._add_gradients(*memory)]

        if self._pool is None:
            self._pool = _graphs.new_pool(self._device)
        function = first if self._owner is None else further
        graph = _graphs.CudaGraph(function, self._device, warm_up=warm_up, pool=self._pool)
        self._have(kept)
        return _Record(graph, memory)


class _Record:
    def __init__(self, graph, inputs):
        self.graph, self.inputs = graph, inputs

"""flow_matching's networks: called model(x, t, **extras), time from noise to data."""

from collections.abc import Callable

from torch import Tensor

from lfm_fast.interop.adapter import Adapter


class FlowMatchingVelocity(Adapter):
    """A network (or ModelWrapper) of the flow_matching library as our velocity field.

        u(z, t) = -model(z, 1 - t, **extras)                predicts="velocity"
        u from model(z, 1 - t, **extras) by `path`          predicts="data" or "noise" (its x_1 and x_0)

    model: called model(x (B, ...), t (B,), **extras), t = 0 being the source (noise) and t = 1 the data. labels: the
    name of the extra that the labels y are, or a function from y to a dict of extras; it has no usual name, so it has
    to be told where y is given. Other extras are `model_kwargs` of `lfm_fast.sample`. path: what the scheduler was, for
    predictions other than velocities (CondOTScheduler is Linear()).

    Raises ValueError for what cannot be used, before the model is called.

    >>> field = FlowMatchingVelocity(lambda x, t, label: x + label[:, None], labels="label")
    >>> field(torch.tensor(0.2), torch.ones(2, 3), y=torch.tensor([1, 2]))[:, 0].tolist()
    [-2.0, -3.0]

    Source: Lipman et al., arXiv 2412.06264, section 4; the library's documentation of ModelWrapper and ODESolver.
    """

    reverses = True

    def __init__(
        self,
        model,
        *,
        labels: str | Callable[[Tensor], dict] | None = None,
        predicts: str = "velocity",
        path=None,
        null_label: int | None = None,
    ):
        super().__init__(model, predicts=predicts, path=path, null_label=null_label)
        if not (labels is None or isinstance(labels, str) or callable(labels)):
            raise ValueError(f"labels is {labels!r}, expected the name of an extra or a function from y to extras.")
        self.labels = labels

    def call(self, z: Tensor, time: Tensor, y: Tensor | None, **kwargs):
        return self.network(z, time, **self._extras(y), **kwargs)

    def _extras(self, y):
        if y is None:
            return {}
        if self.labels is None:
            raise ValueError("labels y were given, but not which extra of the model they are; give labels='NAME'.")
        return {self.labels: y} if isinstance(self.labels, str) else self.labels(y)

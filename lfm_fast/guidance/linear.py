"""Classifier-free guidance as the linear blend that a solver's fused step makes."""

import torch

from lfm_fast.guidance.network import Rows

_SLACK = 1e-7  # times are rounded to float32 on the way; half an ulp at 1 is 6e-8


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

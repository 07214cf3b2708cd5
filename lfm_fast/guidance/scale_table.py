"""The scales of an integration as numbers in memory that stays, which a CUDA graph reads."""

import torch


class ScaleTable:
    """Stands for a `Scale` at times that are known beforehand: (times, B) numbers, written by `take`.

    Where no sample is guided at a time, nobody asks for the unconditional velocity, which a graph cannot change: what
    `take` returns belongs to the graph. Where some are, all are asked for, and 1 times the one and 0 times the other
    is exact.
    """

    def __init__(self, times, batch_size, device, dtype):
        self._numbers = {time: number for number, time in enumerate(dict.fromkeys(times))}
        self._table = torch.empty(len(self._numbers), batch_size, device=device, dtype=dtype)
        self.guided = ()  # whether any sample is, by time

    def take(self, scale):
        """Write the numbers of a Scale, the last sample's for those that it has none for; returns when it guides."""
        batch_size = self._table.shape[1]
        count = batch_size if scale.values is None else len(scale.values)
        like = self._table.new_empty(count, 1, device="cpu")
        rows = [scale(None, None, like, time)[0] for time in self._numbers]
        self.guided = tuple(row is not None for row in rows)
        nothing = like.new_full((count,), scale.none)
        numbers = torch.stack([nothing if row is None else row for row in rows])
        self._table.copy_(torch.cat([numbers, numbers[:, -1:].expand(-1, batch_size - count)], 1))
        return self.guided

    def check(self, batch_size):
        """There is a number for every sample."""

    def __call__(self, samples, t, z, time=None, times=None):
        number = self._numbers[time]
        return (self._table[number], None) if self.guided[number] else (None, None)

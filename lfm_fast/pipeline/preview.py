"""Pictures of where a batch is going, step by step."""

import torch

from lfm_fast.solvers.grids import time_grid


class Preview:
    """A callback of `sample` that shows where the batch is going, and calls the user's own first."""

    def __init__(self, show, flow, z_1, arguments):
        self.show, self.flow, self.arguments, self.callback = show, flow, arguments, arguments.get("callback")
        self.t, self.z, self.data = None, z_1, z_1

    def __call__(self, step, t, z):
        if self.callback is not None and self.callback(step, t, z) is False:
            return False
        now = torch.as_tensor(t, dtype=torch.float64).expand(len(z))  # one for all, or each sample's own
        dt = (now - (self._start() if self.t is None else self.t)).to(z).view(-1, *[1] * (z.ndim - 1))
        # a sample whose time stands still has arrived, or its attempt was refused: what was known of it holds
        moved = dt != 0
        velocity = (z - self.z) / torch.where(moved, dt, 1)
        self.data = torch.where(moved, self.flow.path.data_from_velocity(velocity, z, now.to(z)), self.data)
        self.t, self.z = now, z.clone()
        return self.show(step, t, self.flow.decode(self.data))

    def _start(self):
        """The time at which the state begins to move: a grid's first, or a later one that the guidance waits for."""
        grid, num_steps = self.arguments.get("time_grid"), self.arguments.get("num_steps", 50)
        grid = "lfm" if grid is None and self.arguments.get("compat") == "lfm" else grid
        times = time_grid(grid, num_steps, t_end=self.arguments.get("t_end", 0.0), path=self.flow.path)
        return times[getattr(self.arguments.get("guidance"), "zero_steps", 0)]

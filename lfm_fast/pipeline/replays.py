"""Batches of a flow by CUDA graphs, which are kept from call to call."""

import torch

from lfm_fast.flow.paths import Path
from lfm_fast.sampler import Sampler


class Replays:
    """`lfm_fast.sample` by the newest Sampler, for as long as no more is asked of it than other batches."""

    def __init__(self):
        self._sampler = self._asked = None

    def __reduce__(self):  # a copy of a flow records graphs of its own
        return Replays, ()

    def sample(
        self, model, z1, batch_size, *, y=None, indices=None, seed=0, guidance_scale=None, model_kwargs=None, **settings
    ):
        """The latents of noise z1 (b, ...), in batches of `batch_size` or fewer; settings: of `lfm_fast.sample`.

        Raises ValueError for what a Sampler refuses.
        """
        of_samples = getattr(model, "sample_arguments", ())
        entries = {name: value for name, value in (model_kwargs or {}).items() if name in of_samples}
        shape = (batch_size, *z1.shape[1:])
        settings = {"method": "dopri5", **settings}  # what sample takes where nothing is said, and a Sampler refuses
        settings["model_kwargs"] = {name: x for name, x in (model_kwargs or {}).items() if name not in entries}
        asked = {**settings, "time_grid": _words(settings.get("time_grid")), "model": model, "shape": shape}
        if self._sampler is None or not _alike(asked, self._asked):
            self._sampler = None  # its memory is free for the next
            self._sampler, self._asked = Sampler(model, shape, cuda_graph=True, **settings), asked
        return self._sampler(z1, y, guidance_scale=guidance_scale, indices=indices, seed=seed, **entries)


def _words(grid):
    """A table of times that somebody may write to, as it is now."""
    return repr(grid.tolist() if isinstance(grid, torch.Tensor) else grid)


def _alike(one, other):
    """Whether two settings are the same: by value where that cannot change, else the very same object."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[name], other[name]) for name in one)
    if isinstance(one, (str, int, float, tuple, Path)) and type(one) is type(other):
        return one == other
    return one is other

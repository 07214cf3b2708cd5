"""Sampling batch after batch: what does not depend on the batch is made once, and on CUDA recorded into a graph."""

import copy

import torch

from lfm_fast import _graphs
from lfm_fast.flow.noise import check_seed
from lfm_fast.guidance import APG, Autoguidance, CFGZeroStar, GuidedField, LinearGuidance, Network, Rescale
from lfm_fast.guidance.scale_table import ScaleTable
from lfm_fast.ops import _registry
from lfm_fast.sampling import (
    after_zero_steps,
    check_null_label,
    check_numbers,
    check_tensors,
    choose_guidance,
    guided_run,
    planned,
)
from lfm_fast.solvers import METHODS, Settings, fixed
from lfm_fast.solvers.schedule import compile_schedule

_KEPT = 4  # kinds of calls whose memory is kept
_GRAPHED = (LinearGuidance, Rescale, CFGZeroStar, APG, Autoguidance)


class Sampler:
    """`lfm_fast.sample` by a method of fixed steps, for one batch after another: sampler(z1, y) -> z0.

    Schedule, times, weights of the steps, memory, and the model's sampling form (`DiT.prepare`, as long as the distinct
    labels are the same) are made in the first call and serve in the following. The result is that of `lfm_fast.sample`
    with the same arguments, to the bit. Where the model's weights have changed since, or what they are computed in
    (autocast, `ops.use_backend`), all is made anew.

    cuda_graph=True records all steps of a batch into one CUDA graph, which later calls replay: what the host has to do
    for a batch no longer depends on steps and layers. Opt-in, because it was never run on a GPU so far.

    Args:
        model: as of `lfm_fast.sample`.
        shape: (B, ...) of z1. Batches of fewer samples may come; a graph fills them up to B.
        null_label, guidance_interval, method, num_steps, time_grid, t_start, t_end, path, guidance, compat,
            model_kwargs: as of `lfm_fast.sample`, for all batches.
        guidance_scale: of the batches that bring none.
        cuda_graph: record and replay. For a network that reads nothing back to the host, and guidance by a scale,
            Rescale, CFGZeroStar, APG or Autoguidance.

    A call takes z1 (B, ...), y (B,) or None, and by name guidance_scale, indices, seed (of stochastic methods), and
    what the model names among its `sample_arguments`, such as condition. It returns (B, ...) in memory of its own.

    Raises ValueError for what `lfm_fast.sample` refuses; for methods that find their steps as they go; for what looks
    at single steps (callback, progress, trajectory, max_nfe, return_stats), and for cuda_graph elsewhere than on CUDA.
    RuntimeError for velocities that are not finite, and for a network that no graph can hold.

    >>> import torch, lfm_fast
    >>> model = lfm_fast.DiT(image_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=5, label_dropout=0.1)
    >>> sampler = lfm_fast.Sampler(model, (4, 4, 8, 8), null_label=5, guidance_scale=2.0, method="heun", num_steps=5)
    >>> for seed in range(3):
    ...     z0 = sampler(lfm_fast.noise(4, (4, 8, 8), seed=seed), y=torch.tensor([0, 1, 2, 3]))
    >>> z0.shape
    torch.Size([4, 4, 8, 8])

    Source: Dao et al., arXiv 2307.08698, section 3.
    """

    def __init__(
        self,
        model,
        shape,
        *,
        null_label=None,
        guidance_scale=1.0,
        guidance_interval=(0.0, 1.0),
        method="heun",
        num_steps=50,
        time_grid=None,
        t_start=1.0,
        t_end=0.0,
        path=None,
        guidance=None,
        compat=None,
        model_kwargs=None,
        cuda_graph=False,
        **others,
    ):
        if others:
            raise ValueError(f"{', '.join(others)}: a Sampler runs all steps at once; use lfm_fast.sample for that.")
        self.shape = _checked_shape(shape)
        check_numbers(num_steps, 1.0, 1.0, None, 0, compat)
        if null_label is not None:
            check_null_label(null_label, torch.int64)
        self._guidance = choose_guidance(guidance, guidance_scale, guidance_interval)
        self._interval, self._by_scale = guidance_interval, guidance is None
        self.solver, self.path, times = planned(model, method, num_steps, time_grid, t_start, t_end, path, compat)
        if self.solver.formula is None:
            names = ", ".join(name for name, row in METHODS.items() if row.formula is not None)
            raise ValueError(f"method {self.solver.name} finds its steps as it goes; a Sampler takes {names}.")
        self.times = after_zero_steps(self._guidance, times)
        self.model, self.null_label, self.model_kwargs = model, null_label, dict(model_kwargs or {})
        self.cuda_graph = cuda_graph
        if cuda_graph and type(self._guidance) not in _GRAPHED:
            raise ValueError(f"guidance by {type(self._guidance).__name__} cannot be recorded; leave cuda_graph out.")
        self._loops = {}  # by kind of call, the newest last
        self._known = self._pool = None

    def __call__(self, z1, y=None, *, guidance_scale=None, indices=None, seed=0, **entries):
        guidance = self._scaled(guidance_scale)
        self._check(z1, y, indices, entries)
        seed = check_seed(seed)
        if hasattr(guidance, "begin"):  # refuses what it cannot do
            guidance.begin(guided_run(self.solver, self.model, z1, y, self.null_label, self.path))
        # in inference mode the memory that is kept would be such as cannot be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            self._renew(z1.device)
            return self._loop(z1, y, entries)(z1, y, guidance, indices, seed, entries)

    def _scaled(self, guidance_scale):
        if guidance_scale is None:
            return self._guidance
        if not self._by_scale:
            raise ValueError("Both guidance and guidance_scale were given; give one of them.")
        return LinearGuidance(guidance_scale, self._interval)

    def _check(self, z1, y, indices, entries):
        of_samples = getattr(self.model, "sample_arguments", ())
        wrong = [name for name in entries if name not in of_samples]
        if wrong:
            raise ValueError(
                f"{wrong[0]} is no argument of one entry per sample of this model; arguments for all batches go into "
                "the Sampler's model_kwargs."
            )
        check_tensors(self.model, z1, y, indices, {**self.model_kwargs, **entries}, None)
        if y is not None and self.null_label is not None:
            check_null_label(self.null_label, y.dtype)
        if z1.shape[1:] != self.shape[1:] or len(z1) > self.shape[0]:
            raise ValueError(f"z1 is {tuple(z1.shape)}, but this Sampler was made for {self.shape}, or fewer samples.")
        reason = _graphs.why_not(z1.device) if self.cuda_graph else None
        if reason is not None:
            raise ValueError(f"cuda_graph is True, but {reason}; leave it out.")

    def _renew(self, device):
        """Let go what was made of the weights, or of the ways to compute, that were there before."""
        models = [self.model, getattr(self._guidance, "weak_model", None)]
        weights = [x for model in models if isinstance(model, torch.nn.Module) for x in _tensors(model)]
        places = [x.data_ptr() for x in weights]
        versions = [0 if x.is_inference() else x._version for x in weights]
        autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        autocast = autocast and torch.get_autocast_dtype(device.type)
        ways = [places, autocast, _registry._FORCED.get(), [getattr(model, "training", None) for model in models]]
        known = (ways, None if self.cuda_graph else versions)  # a graph reads the weights where they are
        if known != self._known:
            self._loops.clear()
        self._known = known

    def _loop(self, z1, y, entries):
        """What runs a call of this kind."""
        given = {name: None if x is None else (x.shape[1:], x.dtype) for name, x in sorted(entries.items())}
        kind = (z1.dtype, z1.device, None if y is None else y.dtype, str(given), None if self.cuda_graph else len(z1))
        loop = self._loops.pop(kind, None)
        if loop is None:
            loop = (_Graphed if self.cuda_graph else _Loop)(self)
        self._loops[kind] = loop
        while len(self._loops) > _KEPT:
            del self._loops[next(iter(self._loops))]
        return loop

    def pool(self, device):
        """Memory that all graphs share."""
        if self._pool is None:
            self._pool = _graphs.new_pool(device)
        return self._pool


class _Loop:
    """The integration of batches of one kind: network, field and compiled method, kept between them."""

    def __init__(self, sampler):
        self.sampler, self.run = sampler, None

    def __call__(self, z1, y, guidance, indices, seed, entries):
        z = z1.to(torch.promote_types(z1.dtype, torch.float32), copy=True)
        self.start(z, y, guidance, indices, seed, entries)
        return self.run.watched(self.run.field.watching(None)).z

    def start(self, z, y, guidance, indices, seed, entries, recorded=False):
        """Let the next run begin at z."""
        sampler = self.sampler
        if hasattr(guidance, "begin"):
            guidance = guidance.begin(guided_run(sampler.solver, sampler.model, z, y, sampler.null_label, sampler.path))
        if self.run is not None:
            field = self.run.field
            field.guidance = guidance
            field.network.restart(y, entries)
            self.run.start(z, indices, seed)
            return
        network = Network(sampler.model, z, y, sampler.null_label, {**sampler.model_kwargs, **entries})
        network.recorded = recorded
        settings = Settings(path=sampler.path, seed=seed, index=indices)
        self.run = fixed.Run(sampler.solver.formula, GuidedField(network, guidance), z, sampler.times, settings)


class _Graphed(_Loop):
    """The same as CUDA graphs, which read a batch from memory of their own."""

    def __init__(self, sampler):
        super().__init__(sampler)
        self._graphs = {}  # by what a graph cannot change
        self._memory = self._scales = None

    def __call__(self, z1, y, guidance, indices, seed, entries):
        z, y, index, entries = self._filled(z1, y, indices, entries)
        guided = self._scales.take(guidance.scale)
        guidance = copy.copy(guidance)
        guidance.scale, guidance.guided = self._scales, any(guided)

        def integrate():
            self.start(z, y, guidance, index, seed, entries, recorded=True)
            return self.run(self.run.field.watching(None)).z

        key = guided, seed if self.sampler.solver.stochastic else None
        if key not in self._graphs:
            self._graphs[key] = _graphs.CudaGraph(integrate, z1.device, pool=self.sampler.pool(z1.device))
        z0 = self._graphs[key]()
        self.run.check_end(z0)
        return z0[: len(z1)].clone()

    def _filled(self, z1, y, indices, entries):
        """The memory, holding this batch and, where that is smaller, its last sample again and again."""
        count, batch_size = len(z1), self.sampler.shape[0]
        if indices is None:
            indices = torch.arange(count)
        given = {"z": z1, "y": y, "index": indices, **entries}
        if self._memory is None:
            dtypes = {"z": torch.promote_types(z1.dtype, torch.float32)}
            self._memory = {
                name: x.new_empty((batch_size, *x.shape[1:]), device=z1.device, dtype=dtypes.get(name))
                for name, x in given.items()
                if x is not None
            }
            moments = compile_schedule(self.sampler.solver.formula, self.sampler.times, self.sampler.path).moments
            self._scales = ScaleTable(moments, batch_size, z1.device, dtypes["z"])
        for name, memory in self._memory.items():
            memory[:count].copy_(given[name])
            memory[count:].copy_(given[name][-1:].expand(batch_size - count, *memory.shape[1:]))
        found = {name: self._memory.get(name) for name in given}
        return found.pop("z"), found.pop("y"), found.pop("index"), found


def _tensors(model):
    yield from model.parameters()
    yield from model.buffers()


def _checked_shape(shape):
    whole = isinstance(shape, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not whole or len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape is {shape!r}, expected that of the batches, such as (16, 4, 32, 32).")
    return tuple(shape)

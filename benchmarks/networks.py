"""A DiT in inference: a forward, and guided sampling. DiT-S/2 on a CPU, any by name on a GPU (`gpu_sampling`)."""

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

import lfm_fast
from benchmarks.names import AGAIN, COMPILED, DIFFUSERS, DIFFUSERS_COMPILED, EAGER, FAST, REFERENCE
from benchmarks.plain import WITHOUT_OPS, forced
from benchmarks.settings import FULL
from benchmarks.workloads import Contender, Workload
from lfm_fast.interop.diffusers import DiffusersVelocity, to_diffusers

NETWORK, NUM_CLASSES, LABEL_DROPOUT = "DiT-S/2", 10, 0.1
LATENT_SHAPE = (4, 32, 32)
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}

# Inductor at its best for inference on a CPU. freezing: weights are constants, packed ahead; max_autotune: for each
# matrix product its own C++ template, with what follows it fused, and oneDNN's are measured while compiling. Which is
# faster differs between machines: full mode takes the one that is, the others what the documentation recommends.
INFERENCE_OPTIONS = [{"freezing": True, "max_autotune": True}, {"freezing": True}, {}]


def fill_zeros(model) -> None:
    """Give a new DiT weights under which its times and labels matter, as they do after training.

    Those that start as zero (adaLN-Zero) would leave nothing but zeros to compute; and with the embedders as small as
    they start, wrong conditions would change the result by less than bfloat16 rounds it, and no error would show them.
    """
    where = model.y_embedder.embedding_table.weight.device
    generator = torch.Generator(where).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.04 * torch.randn(parameter.shape, generator=generator, device=where))
        for weight in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[2].weight):
            weight.mul_(20)


def network(precision: str, name: str | None = None, device="cpu"):
    """The network of this name, NETWORK where there is none; its weights are drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = lfm_fast.create_model(name or NETWORK, num_classes=NUM_CLASSES, label_dropout=LABEL_DROPOUT).eval()
    fill_zeros(model)
    return model.to(getattr(torch, precision))


def fast_network(precision: str, name: str | None = None, device="cpu"):
    """The library at its fastest."""
    return lfm_fast.optimize(network("float32", name, device), precision=PRECISIONS.get(precision, precision))


def diffusers_network(precision: str, name: str | None = None, device="cpu") -> DiffusersVelocity:
    """diffusers' DiT with the same weights, called as ours."""
    return DiffusersVelocity(to_diffusers(network(precision, name, device)))


def fastest_compiled(build: Callable, run: Callable, choices=None):
    """(network, words): `build()` compiled with the options under which `run(network)` is fastest."""
    tried = []
    for options in choices or INFERENCE_OPTIONS[: None if FULL else 1]:
        model, seconds = build(), []
        nn.Module.compile(model, dynamic=False)  # PyTorch's own, not what our DiT makes of it
        # not among the options of compile: whether weights are constants is asked of the global setting, while tracing
        with inductor.patch(**options):
            for _ in range(4):
                start = time.perf_counter()
                run(model)
                seconds.append(time.perf_counter() - start)
        tried.append((min(seconds[1:]), " + ".join(options) or "defaults", model))
    _, words, model = min(tried, key=lambda choice: choice[0])
    return model, words


def latents(count: int, device="cpu") -> tuple[Tensor, Tensor]:
    """Noise (B, 4, 32, 32) and labels (B,)."""
    return lfm_fast.noise(count, LATENT_SHAPE, seed=0, device=device), torch.arange(count, device=device) % NUM_CLASSES


class Forward(Workload):
    """model(t, z, y) without gradients: every sample at a time and with a label of its own."""

    profiled = (FAST, EAGER)

    def __init__(self, batch_size: int, precision: str):
        self.precision, self.images = precision, batch_size
        self.z, self.y = latents(batch_size)
        self.t = torch.linspace(0.1, 0.9, batch_size)
        self.flops = batch_size * flops()

    def contenders(self):
        fast, plain = fast_network(self.precision), network(self.precision)
        return {
            FAST: self._calling(fast),
            REFERENCE: self._calling(plain, "reference"),
            AGAIN: self._calling(fast),
            EAGER: self._calling(plain, WITHOUT_OPS),
            DIFFUSERS: self._calling(diffusers_network(self.precision)),
        }

    def compiled(self, name):
        build = {COMPILED: network, DIFFUSERS_COMPILED: diffusers_network}[name]
        with forced(WITHOUT_OPS):
            model, words = fastest_compiled(lambda: build(self.precision), lambda model: self._run(model))
        return replace(self._calling(model, WITHOUT_OPS), how=words)

    def truth(self) -> list[Tensor]:
        with torch.no_grad():
            return [network("float64")(self.t.double(), self.z.double(), self.y)]

    def _calling(self, model, backend=None) -> Contender:
        return Contender(lambda: self._run(model), lambda: [self._run(model)], backend)

    def _run(self, model):
        with torch.no_grad():
            return model(self.t, self.z, self.y)


@functools.cache
def flops(name: str | None = None) -> int:
    """Of one image's forward."""
    settings = {"num_classes": NUM_CLASSES, "label_dropout": LABEL_DROPOUT}
    with torch.device("meta"):
        return lfm_fast.create_model(name or NETWORK, **settings).flops_per_sample()


class GuidedSampling(Workload):
    """Guided sampling by a fixed-step method: two network rows for each image and evaluation, in one forward.

    lfm_fast.sample against torchdiffeq around the network in plain PyTorch, and diffusers' network and scheduler, all
    over the same grid, with the state in float32.
    """

    scale = 1.5
    nfe_per_step = {"euler": 1, "heun": 2}

    def __init__(
        self,
        batch_size: int,
        num_steps: int,
        precision: str,
        method: str = "heun",
        name: str | None = None,
        device="cpu",
    ):
        self.precision, self.images, self.num_steps, self.method = precision, batch_size, num_steps, method
        self.name, self.device = name, device
        self.z_1, self.y = latents(batch_size, device)
        self.null_label = NUM_CLASSES
        self.labels = torch.cat([self.y, torch.full_like(self.y, self.null_label)])
        self.nfe = num_steps * self.nfe_per_step[method]
        self.flops = 2 * self.nfe * batch_size * flops(name)

    def contenders(self):
        fast, plain = fast_network(self.precision), network(self.precision)
        return {
            FAST: self._calling(self.ours, fast),
            REFERENCE: self._calling(self.ours, plain, "reference"),
            AGAIN: self._calling(self.ours, fast),
            EAGER: self._calling(self.torchdiffeq, plain, WITHOUT_OPS),
            DIFFUSERS: self._calling(self.diffusers, diffusers_network(self.precision)),
        }

    def compiled(self, name):
        build, sample = {
            COMPILED: (network, self.torchdiffeq),
            DIFFUSERS_COMPILED: (diffusers_network, self.diffusers),
        }[name]
        with forced(WITHOUT_OPS):
            model, words = fastest_compiled(lambda: build(self.precision), lambda model: sample(model, 2, self.z_1))
        return replace(self._calling(sample, model, WITHOUT_OPS), how=words)

    def facts(self, name, seconds):
        return {"nfe": self.nfe - (self.method == "heun" and name in (DIFFUSERS, DIFFUSERS_COMPILED))}

    def truth(self) -> list[Tensor]:
        return [self.torchdiffeq(network("float64", self.name, self.device), self.num_steps, self.z_1.double())]

    def truth_of(self, name):
        """diffusers' Heun makes its last step, from the smallest sigma to 0, an Euler step."""
        if self.method == "euler" or name not in (DIFFUSERS, DIFFUSERS_COMPILED):
            return super().truth_of(name)
        if self._diffusers_truth is None:
            model = network("float64", self.name, self.device)
            grid = torch.linspace(1, 0, self.num_steps + 1, dtype=torch.float64, device=self.device)
            z = self._odeint(model, self.z_1.double(), grid[:-1], "heun2")
            self._diffusers_truth = [self._odeint(model, z, grid[-2:], "euler")]
        return self._diffusers_truth

    _diffusers_truth = None

    def _calling(self, sample, model, backend=None) -> Contender:
        """A whole run; its memory is that of two steps."""
        return Contender(
            lambda: sample(model, self.num_steps, self.z_1),
            lambda: [sample(model, self.num_steps, self.z_1)],
            backend,
            peak=lambda: sample(model, 2, self.z_1),
        )

    def ours(self, model, num_steps, z_1) -> Tensor:
        settings = {"guidance_scale": self.scale, "null_label": self.null_label, "method": self.method}
        return lfm_fast.sample(model, z_1, y=self.y, num_steps=num_steps, **settings)

    def torchdiffeq(self, model, num_steps, z_1) -> Tensor:
        method = {"euler": "euler", "heun": "heun2"}[self.method]
        times = torch.linspace(1, 0, num_steps + 1, dtype=z_1.dtype, device=z_1.device)
        return self._odeint(model, z_1, times, method)

    def _odeint(self, model, z, times, method) -> Tensor:
        """The way to guide with torchdiffeq: both velocities from one call, blended by hand."""
        from torchdiffeq import odeint

        def velocity(t, z):
            both = model(t.expand(2 * len(z)), torch.cat([z, z]), self.labels).to(z.dtype)
            return self.scale * both[: len(z)] + (1 - self.scale) * both[len(z) :]

        with torch.no_grad():
            return odeint(velocity, z, times, method=method)[-1]

    def by_hand(self, model, num_steps, z_1) -> Tensor:
        """The same in a loop of one's own: nothing is checked, and times stand in one place for a CUDA graph."""
        grid, t = torch.linspace(1, 0, num_steps + 1).tolist(), z_1.new_empty(2 * len(z_1))
        heun = self.method == "heun"

        def velocity(time, z):
            torch.compiler.cudagraph_mark_step_begin()
            conditional, unconditional = model(t.fill_(time), torch.cat([z, z]), self.labels).to(z.dtype).chunk(2)
            return torch.lerp(unconditional, conditional, self.scale)

        with torch.no_grad():
            z = z_1
            for before, after in itertools.pairwise(grid):
                first = velocity(before, z)
                ahead = z + (after - before) * first
                z = z + 0.5 * (after - before) * (first + velocity(after, ahead)) if heun else ahead
        return z

    def diffusers(self, model, num_steps, z_1) -> Tensor:
        """The loop of a diffusers pipeline; latents stay in float32, as with the others."""
        scheduler = flow_match_scheduler(self.method, num_steps)
        trained, latents = scheduler.config.num_train_timesteps, z_1
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                both = torch.cat([latents, latents])
                conditional, unconditional = model(timestep / trained, both, self.labels).float().chunk(2)
                velocity = unconditional + self.scale * (conditional - unconditional)
                latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents


def flow_match_scheduler(method: str, num_steps: int):
    """diffusers' Euler or Heun scheduler over the times 1, 1 - 1/N, ..., 1/N, 0 (its own end at 0.001, then 0)."""
    import diffusers

    if method == "heun":
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        scheduler.sigma_min = 1 / num_steps  # its set_timesteps takes no sigmas
        scheduler.set_timesteps(num_steps)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1 - k / num_steps for k in range(num_steps)])
    return scheduler

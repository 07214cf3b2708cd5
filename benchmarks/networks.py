"""DiT-S/2 in inference: a forward, and guided sampling."""

import functools

import torch
from torch import Tensor

import lfm_fast
from benchmarks.names import AGAIN, COMPILED, DIFFUSERS, DIFFUSERS_COMPILED, EAGER, FAST, REFERENCE
from benchmarks.plain import WITHOUT_OPS
from benchmarks.workloads import Contender, Workload
from lfm_fast.interop.diffusers import DiffusersVelocity, to_diffusers

NETWORK, NUM_CLASSES, LABEL_DROPOUT = "DiT-S/2", 10, 0.1
LATENT_SHAPE = (4, 32, 32)
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}

# Inductor at its best for inference on a CPU: weights as constants, packed ahead; and for each matrix product its own
# C++ template (with what follows it fused) and oneDNN's, measured while compiling. See docs/performance.md.
BEST_INFERENCE = {"dynamic": False, "options": {"freezing": True, "max_autotune": True}}


def fill_zeros(model) -> None:
    """Give every weight that starts as zero (adaLN-Zero) a value, or the network would compute nothing but zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def network(precision: str):
    torch.manual_seed(0)
    model = lfm_fast.create_model(NETWORK, num_classes=NUM_CLASSES, label_dropout=LABEL_DROPOUT).eval()
    fill_zeros(model)
    return model.to(getattr(torch, precision))


def fast_network(precision: str):
    """The library at its fastest: what `optimize` makes of the network, where this version has it."""
    optimize = getattr(lfm_fast, "optimize", None)
    return network(precision) if optimize is None else optimize(network("float32"), precision=PRECISIONS[precision])


def diffusers_network(precision: str) -> DiffusersVelocity:
    """diffusers' DiT with the same weights, called as ours."""
    return DiffusersVelocity(to_diffusers(network(precision)))


def latents(count: int) -> tuple[Tensor, Tensor]:
    """Noise (B, 4, 32, 32) and labels (B,)."""
    return lfm_fast.noise(count, LATENT_SHAPE, seed=0), torch.arange(count) % NUM_CLASSES


class Forward(Workload):
    """model(t, z, y) without gradients: every sample at a time and with a label of its own."""

    profiled = (FAST, EAGER)

    def __init__(self, batch_size: int, precision: str):
        self.precision, self.images = precision, batch_size
        self.z, self.y = latents(batch_size)
        self.t = torch.linspace(0.1, 0.9, batch_size)
        self.flops = batch_size * _flops()

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
        model = {COMPILED: network, DIFFUSERS_COMPILED: diffusers_network}[name](self.precision)
        model.compile(**BEST_INFERENCE)
        return self._calling(model, WITHOUT_OPS)

    def truth(self) -> list[Tensor]:
        with torch.no_grad():
            return [network("float64")(self.t.double(), self.z.double(), self.y)]

    def _calling(self, model, backend=None) -> Contender:
        def call():
            with torch.no_grad():
                return model(self.t, self.z, self.y)

        return Contender(call, lambda: [call()], backend)


@functools.cache
def _flops() -> int:
    with torch.device("meta"):
        return lfm_fast.create_model(NETWORK, num_classes=NUM_CLASSES, label_dropout=LABEL_DROPOUT).flops_per_sample()


class GuidedSampling(Workload):
    """Guided sampling by a fixed-step method: two network rows for each image and evaluation, in one forward.

    lfm_fast.sample against torchdiffeq around the network in plain PyTorch, and diffusers' network and scheduler, all
    over the same grid, with the state in float32.
    """

    scale = 1.5
    nfe_per_step = {"euler": 1, "heun": 2}

    def __init__(self, batch_size: int, num_steps: int, precision: str, method: str = "heun"):
        self.precision, self.images, self.num_steps, self.method = precision, batch_size, num_steps, method
        self.z_1, self.y = latents(batch_size)
        self.null_label = NUM_CLASSES
        self.labels = torch.cat([self.y, torch.full_like(self.y, self.null_label)])
        self.nfe = num_steps * self.nfe_per_step[method]
        self.flops = 2 * self.nfe * batch_size * _flops()

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
        model = build(self.precision)
        model.compile(**BEST_INFERENCE)
        return self._calling(sample, model, WITHOUT_OPS)

    def facts(self, name, seconds):
        return {"nfe": self.nfe - (self.method == "heun" and name in (DIFFUSERS, DIFFUSERS_COMPILED))}

    def truth(self) -> list[Tensor]:
        return [self.ours(network("float64"), self.num_steps, self.z_1.double())]

    def truth_of(self, name):
        """diffusers' Heun makes its last step, from the smallest sigma to 0, an Euler step."""
        if self.method == "euler" or name not in (DIFFUSERS, DIFFUSERS_COMPILED):
            return super().truth_of(name)
        if self._other_truth is None:
            model, last = network("float64"), 1 / self.num_steps
            z = self.ours(model, self.num_steps - 1, self.z_1.double(), t_end=last)
            self._other_truth = [self.ours(model, 1, z, t_start=last, method="euler")]
        return self._other_truth

    _other_truth = None

    def _calling(self, sample, model, backend=None) -> Contender:
        """A whole run; its memory is that of two steps."""
        return Contender(
            lambda: sample(model, self.num_steps, self.z_1),
            lambda: [sample(model, self.num_steps, self.z_1)],
            backend,
            peak=lambda: sample(model, 2, self.z_1),
        )

    def ours(self, model, num_steps, z_1, **more) -> Tensor:
        settings = {"guidance_scale": self.scale, "null_label": self.null_label, "method": self.method, **more}
        return lfm_fast.sample(model, z_1, y=self.y, num_steps=num_steps, **settings)

    def torchdiffeq(self, model, num_steps, z_1) -> Tensor:
        from torchdiffeq import odeint

        def velocity(t, z):
            both = model(t.expand(2 * len(z)), torch.cat([z, z]).to(getattr(torch, self.precision)), self.labels)
            both = both.float()
            return self.scale * both[: len(z)] + (1 - self.scale) * both[len(z) :]

        with torch.no_grad():
            ends, options = torch.tensor([1.0, 0.0]), {"step_size": 1 / num_steps}
            method = {"euler": "euler", "heun": "heun2"}[self.method]
            return odeint(velocity, z_1, ends, method=method, options=options)[-1]

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

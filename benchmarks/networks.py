"""DiT-S/2 workloads: a forward, a training step, guided sampling."""

import copy

import torch
from torch import Tensor

import lfm_fast
from benchmarks.workloads import Workload
from lfm_fast import distributed
from lfm_fast.train import loop
from lfm_fast.train.config import TrainConfig
from lfm_fast.train.step import train_step

NETWORK, NUM_CLASSES, LABEL_DROPOUT = "DiT-S/2", 10, 0.1
LATENT_SHAPE = (4, 32, 32)


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


def latents(count: int) -> tuple[Tensor, Tensor]:
    """Noise (B, 4, 32, 32) and labels (B,)."""
    return lfm_fast.noise(count, LATENT_SHAPE, seed=0), torch.arange(count) % NUM_CLASSES


class Forward(Workload):
    """model(t, z, y) without gradients."""

    has_network = True

    def __init__(self, batch_size: int, precision: str):
        self.precision, self.images = precision, batch_size
        self.model = network(precision)
        self.z, self.y = latents(batch_size)
        self.t = torch.linspace(0.1, 0.9, batch_size)
        self.flops = batch_size * self.model.flops_per_sample()

    def call(self):
        with torch.no_grad():
            return self.model(self.t, self.z, self.y)

    def compile(self) -> None:
        self.model.compile(dynamic=False, options={"freezing": True})

    def truth(self) -> list[Tensor]:
        with torch.no_grad():
            return [network("float64")(self.t.double(), self.z.double(), self.y)]


class _Latents:
    """Latents in memory, as training reads them."""

    num_items, num_classes, latent_shape = 64, NUM_CLASSES, LATENT_SHAPE
    class_names = [str(label) for label in range(NUM_CLASSES)]

    def __init__(self):
        self.z_0 = lfm_fast.noise(self.num_items, LATENT_SHAPE, seed=5)
        self.y = torch.arange(self.num_items) % NUM_CLASSES

    def batch(self, sample_numbers, seed):
        items = sample_numbers % self.num_items
        return self.z_0[items], self.y[items]


class TrainingStep(Workload):
    """train.step.train_step: interpolant, network, loss, backward, AdamW (fused), EMA.

    Its result is the gradient of all weights at the start, the same loss on the same samples.
    """

    has_network = True

    def __init__(self, batch_size: int, precision: str):
        self.precision, self.images = precision, batch_size
        self.source, self.world = _Latents(), distributed.World()
        settings = {"data": "memory", "model": NETWORK, "batch_size": batch_size, "steps": 10**6, "seed": 0}
        settings |= {"num_classes": NUM_CLASSES, "label_dropout": LABEL_DROPOUT, "compile": "off", "device": "cpu"}
        self.config = TrainConfig(**settings, precision={"float32": "fp32", "bfloat16": "bf16"}[precision])
        self.path = loop.training_path(self.config)
        self.state = loop.build_state(self.config, self.source, self.world)
        fill_zeros(self.state.model)
        self.start = copy.deepcopy(self.state.model.state_dict())
        self.flops = 3 * batch_size * self.state.model.flops_per_sample()

    def call(self):
        train_step(self.state, self.source, self.config, self.path, self.world)

    def compile(self) -> None:
        self.state.model.compile(dynamic=False)

    def result(self) -> list[Tensor]:
        self.state.model.load_state_dict(self.start)
        return [self._gradient(self.state.model)]

    def truth(self) -> list[Tensor]:
        model = copy.deepcopy(self.state.model).double()
        model.load_state_dict(self.start)
        return [self._gradient(model, torch.float64)]

    def _gradient(self, model, dtype=torch.float32) -> Tensor:
        """d loss / d weights as one vector."""
        numbers = torch.arange(self.images)
        z_0, y = self.source.batch(numbers, self.config.seed)
        low = self.precision == "bfloat16" and dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            # called as train_step calls it: torch.compile makes another graph for a label passed by name
            loss = lfm_fast.flow_matching_loss(
                lambda t, z, y: model(t, z, y),
                z_0.to(dtype),
                y,
                path=self.path,
                seed=self.config.seed,
                indices=numbers,
            )
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)])


class GuidedSampling(Workload):
    """lfm_fast.sample with Heun and guidance: two network rows for each image and evaluation, in one forward."""

    has_network = True
    scale = 1.5

    def __init__(self, batch_size: int, num_steps: int, precision: str):
        self.precision, self.images, self.num_steps = precision, batch_size, num_steps
        self.model = network(precision)
        self.z_1, self.y = latents(batch_size)
        self.flops = 2 * num_steps * 2 * batch_size * self.model.flops_per_sample()

    def call(self):
        return self._sample(self.model, self.z_1)

    def _sample(self, model, z_1):
        null = self.model.null_label
        settings = {"guidance_scale": self.scale, "null_label": null, "method": "heun", "num_steps": self.num_steps}
        return lfm_fast.sample(model, z_1, y=self.y, **settings)

    def compile(self) -> None:
        self.model.compile(dynamic=False, options={"freezing": True})

    def truth(self) -> list[Tensor]:
        return [self._sample(network("float64"), self.z_1.double())]

    def others(self):
        return {"torchdiffeq heun2": (self._torchdiffeq, lambda: [self._torchdiffeq()])}

    def _torchdiffeq(self) -> Tensor:
        from torchdiffeq import odeint

        dtype, y = getattr(torch, self.precision), torch.cat([self.y, torch.full_like(self.y, self.model.null_label)])

        def velocity(t, z):
            both = self.model(t.expand(2 * len(z)), torch.cat([z, z]).to(dtype), y).float()
            return self.scale * both[: len(z)] + (1 - self.scale) * both[len(z) :]

        with torch.no_grad():
            ends, options = torch.tensor([1.0, 0.0]), {"step_size": 1 / self.num_steps}
            return odeint(velocity, self.z_1, ends, method="heun2", options=options)[-1]

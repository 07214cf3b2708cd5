"""A training step of DiT-S/2: the library's own, and what one writes with PyTorch or diffusers alone."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lfm_fast
from benchmarks import networks
from benchmarks.names import AGAIN, COMPILED, DIFFUSERS, DIFFUSERS_COMPILED, EAGER, FAST, FAST_COMPILED, REFERENCE
from benchmarks.networks import LABEL_DROPOUT, LATENT_SHAPE, NUM_CLASSES, PRECISIONS, fill_zeros
from benchmarks.plain import WITHOUT_OPS
from benchmarks.workloads import Contender, Workload
from lfm_fast import distributed
from lfm_fast.interop.diffusers import DiffusersVelocity, our_names
from lfm_fast.train import loop
from lfm_fast.train.compiling import compile_network
from lfm_fast.train.config import TrainConfig
from lfm_fast.train.step import train_step


class Latents:
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
    """train.step.train_step: interpolant, network, loss, backward, AdamW, average of the weights.

    The result of a contender is its gradient of all weights at the start, the same loss on the same samples.
    """

    profiled = (FAST, EAGER)

    def __init__(self, batch_size: int, precision: str):
        self.precision, self.images = precision, batch_size
        self.source, self.world = Latents(), distributed.World()
        settings = {"data": "memory", "model": networks.NETWORK, "batch_size": batch_size, "steps": 10**6, "seed": 0}
        settings |= {"num_classes": NUM_CLASSES, "label_dropout": LABEL_DROPOUT, "device": "cpu"}
        self.settings = {**settings, "precision": PRECISIONS[precision]}
        self.config = TrainConfig(**self.settings, compile="off")
        self.path = loop.training_path(self.config)
        self.flops = 3 * batch_size * networks._flops()

    def contenders(self):
        ours = Ours(self, "off")
        return {
            FAST: Contender(ours.step, ours.result),
            REFERENCE: Contender(ours.step, ours.result, "reference"),
            AGAIN: Contender(ours.step),
            EAGER: self._plain(networks.network("float32")),
            DIFFUSERS: self._plain(networks.diffusers_network("float32")),
        }

    def compiled(self, name):
        if name == FAST_COMPILED:
            ours = Ours(self, "block")
            return Contender(ours.step, ours.result)
        model = {COMPILED: networks.network, DIFFUSERS_COMPILED: networks.diffusers_network}[name]("float32")
        # Inductor's templates for matrix products take constant weights alone: there is nothing to tune
        nn.Module.compile(model, dynamic=False)
        return self._plain(model)

    def _plain(self, model) -> Contender:
        plain = Plain(self, model)
        return Contender(plain.step, plain.result, WITHOUT_OPS)

    def truth(self) -> list[Tensor]:
        return [as_one(self.gradient(networks.network("float64"), torch.float64))]

    def gradient(self, model, dtype=torch.float32) -> dict[str, Tensor]:
        """{name: d loss / d weight}."""
        numbers = torch.arange(self.images)
        z_0, y = self.source.batch(numbers, self.config.seed)
        low = self.precision == "bfloat16" and dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            # called as training does: torch.compile makes another graph for a label passed by name
            loss = lfm_fast.flow_matching_loss(
                lambda t, z, y: model(t, z, y),
                z_0.to(dtype),
                y,
                path=self.path,
                seed=self.config.seed,
                indices=numbers,
            )
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))


class Ours:
    """The library's step; compile as its command line's `--compile`."""

    def __init__(self, workload: TrainingStep, how: str):
        self.workload = workload
        self.state = loop.build_state(workload.config, workload.source, workload.world)
        fill_zeros(self.state.model)
        self.start = copy.deepcopy(networks.network("float32").state_dict())
        compile_network(self.state.model, TrainConfig(**workload.settings, compile=how), workload.world.device)

    def step(self) -> None:
        workload = self.workload
        train_step(self.state, workload.source, workload.config, workload.path, workload.world)

    def result(self) -> list[Tensor]:
        self.state.model.load_state_dict(self.start)
        return [as_one(self.workload.gradient(self.state.model))]


class Plain:
    """The same step as one writes it: PyTorch's generator and losses, its fused AdamW, a multi-tensor average."""

    decay = 0.9999

    def __init__(self, workload: TrainingStep, model):
        self.workload, self.model = workload, model
        self.start = copy.deepcopy(model.state_dict())
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.averaged = [weight.detach().clone() for weight in self.weights]
        config = workload.config
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.taken = 0

    def step(self) -> None:
        workload, batch = self.workload, self.workload.images
        z_0, y = workload.source.batch(torch.arange(self.taken, self.taken + batch), 0)
        self.taken += batch
        y = torch.where(torch.rand(batch) < LABEL_DROPOUT, NUM_CLASSES, y)
        t, noise = torch.rand(batch), torch.randn_like(z_0)
        z_t = torch.lerp(z_0, noise, t.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=workload.precision == "bfloat16"):
            velocity = self.model(t, z_t, y)
        F.mse_loss(velocity.float(), noise - z_0).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.weights, 1 - self.decay)

    def result(self) -> list[Tensor]:
        self.model.load_state_dict(self.start)
        gradients = self.workload.gradient(self.model)
        if isinstance(self.model, DiffusersVelocity):
            gradients = from_every_block(gradients, self.model)
        return [as_one(gradients)]


def from_every_block(gradients: dict[str, Tensor], model: DiffusersVelocity) -> dict[str, Tensor]:
    """diffusers' gradients under our names: that of an embedder, which it has in each block, is the sum of all."""
    prefix, first = "network.", "transformer_blocks.0."
    gradients = {name.removeprefix(prefix): gradient for name, gradient in gradients.items()}
    depth = model.network.config.num_layers
    for name in [name for name in gradients if name.startswith(first + "norm1.emb.")]:
        of_block = [gradients[name.replace(first, f"transformer_blocks.{k}.", 1)] for k in range(depth)]
        gradients[name] = torch.stack(of_block).sum(0)
    return our_names(gradients, depth)


def as_one(gradients: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector, in the order of their names."""
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])

"""A training step: the library's own, and what one writes with PyTorch or diffusers alone.

DiT-S/2 on a CPU; any network by name on a GPU (`gpu_training`).
"""

import contextlib
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
from lfm_fast.models.precision import float32_products
from lfm_fast.train import loop
from lfm_fast.train.compiling import compile_network
from lfm_fast.train.config import AUTOCAST, TrainConfig
from lfm_fast.train.graphed import GraphedGradients
from lfm_fast.train.step import gradients_on, train_step


class Latents:
    """Latents in memory, as training reads them."""

    num_classes, latent_shape = NUM_CLASSES, LATENT_SHAPE
    class_names = [str(label) for label in range(NUM_CLASSES)]

    def __init__(self, num_items: int = 64, device="cpu"):
        self.num_items = num_items
        self.z_0 = lfm_fast.noise(num_items, LATENT_SHAPE, seed=5, device=device)
        self.y = torch.arange(num_items, device=device) % NUM_CLASSES

    def batch(self, sample_numbers, seed):
        # indices on the CPU would make the host wait for the device, once for each of the two tensors
        items = (sample_numbers % self.num_items).to(self.z_0.device, non_blocking=True)
        return self.z_0[items], self.y[items]


class TrainingStep(Workload):
    """train.step.train_step: interpolant, network, loss, backward, AdamW, average of the weights.

    The result of a contender is its gradient of all weights at the start, the same loss on the same samples.
    precision: "float32" or "bfloat16", or another of `--precision`. network: a name, `networks.NETWORK` where None.
    """

    profiled = (FAST, EAGER)
    at_once = 16  # images of a part of the gradient in float64, whose activations would not fit otherwise

    def __init__(self, batch_size: int, precision: str, network: str | None = None, device="cpu", num_items: int = 64):
        self.precision, self.images, self.network = precision, batch_size, network or networks.NETWORK
        self.device = torch.device(device)
        self.source, self.world = Latents(num_items, device), distributed.World(device=self.device)
        settings = {"data": "memory", "model": self.network, "batch_size": batch_size, "steps": 10**6, "seed": 0}
        settings |= {"num_classes": NUM_CLASSES, "label_dropout": LABEL_DROPOUT, "device": self.device.type}
        self.settings = {**settings, "precision": PRECISIONS.get(precision, precision)}
        self.config = TrainConfig(**self.settings, compile="off")
        self.path = loop.training_path(self.config)
        self.flops = 3 * batch_size * networks.flops(self.network)

    def contenders(self):
        ours = Ours(self, "off")
        return {
            FAST: Contender(ours.step, ours.result),
            REFERENCE: Contender(ours.step, ours.result, "reference"),
            AGAIN: Contender(ours.step),
            EAGER: self._plain(self.built(networks.network)),
            DIFFUSERS: self._plain(self.built(networks.diffusers_network)),
        }

    def compiled(self, name):
        if name == FAST_COMPILED:
            ours = Ours(self, "block")
            return Contender(ours.step, ours.result)
        model = self.built({COMPILED: networks.network, DIFFUSERS_COMPILED: networks.diffusers_network}[name])
        # Inductor's templates for matrix products take constant weights alone: there is nothing to tune
        nn.Module.compile(model, dynamic=False)
        return self._plain(model)

    def built(self, build, dtype: str = "float32"):
        """A network of `networks`, of this workload's name and on its device."""
        return build(dtype, self.network, self.device)

    def _plain(self, model) -> Contender:
        plain = Plain(self, model)
        return Contender(plain.step, plain.result, WITHOUT_OPS)

    def truth(self) -> list[Tensor]:
        """In parts, whose means count by their sizes."""
        model, total = self.built(networks.network, "float64"), 0.0
        for numbers in torch.arange(self.images).split(self.at_once):
            total = total + as_one(self.gradient(model, torch.float64, numbers)) * (len(numbers) / self.images)
        return [total]

    def gradient(self, model, dtype=torch.float32, numbers: Tensor | None = None) -> dict[str, Tensor]:
        """{name: d loss / d weight} of the samples of these numbers, the whole batch's where None."""
        numbers = torch.arange(self.images) if numbers is None else numbers
        z_0, y = self.source.batch(numbers, self.config.seed)
        numbers = numbers.to(self.device)
        with self.products():
            with self.autocast(dtype == torch.float32):
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

    def products(self):
        """Around forward and backward pass: TF32 on CUDA unless float32 was asked for, as train.step has it."""
        tf32 = self.settings["precision"] != "fp32"
        return float32_products(tf32) if self.device.type == "cuda" else contextlib.nullcontext()

    def autocast(self, wanted: bool = True):
        """Around the forward pass of a network whose weights are in float32."""
        low = wanted and self.settings["precision"] in AUTOCAST
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)


class Ours:
    """The library's step; compile as its command line's `--compile`, cuda_graph as its `--cuda-graph`."""

    def __init__(self, workload: TrainingStep, how: str, cuda_graph: bool = False):
        self.workload = workload
        with torch.device(workload.device):
            self.state = loop.build_state(workload.config, workload.source, workload.world)
        fill_zeros(self.state.model)
        self.state.renew_copies()
        self.start = copy.deepcopy(workload.built(networks.network).state_dict())
        if workload.device.type == "cuda":
            # not compiled: attention's kernels are measured, and remembered for when its graph is traced
            workload.gradient(self._called())
        config = TrainConfig(**workload.settings, compile=how)
        compile_network(self._called(), config, workload.world.device)
        if cuda_graph:
            add_gradients = gradients_on(self.state, config, workload.path, workload.world, workload.source)
            self.state.graph = GraphedGradients(add_gradients, self.state.trained, workload.device)

    def _called(self):
        """What a step calls: the model, or its copy in bfloat16."""
        return self.state.network

    @property
    def update(self) -> tuple:
        """(whose, method): what changes the weights once their gradients are there."""
        return self.state.optimizer, "step"

    @property
    def network(self) -> tuple:
        """(whose, name): what a step calls as network."""
        return self.state, "network"

    def step(self) -> None:
        workload = self.workload
        train_step(self.state, workload.source, workload.config, workload.path, workload.world)

    def result(self) -> list[Tensor]:
        self.state.model.load_state_dict(self.start)
        self.state.renew_copies()
        return [as_one(self.workload.gradient(self._called()))]


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

    @property
    def update(self) -> tuple:
        return self, "_update"

    @property
    def network(self) -> tuple:
        return self, "model"

    def step(self) -> None:
        workload, batch, where = self.workload, self.workload.images, self.workload.device
        z_0, y = workload.source.batch(torch.arange(self.taken, self.taken + batch), 0)
        self.taken += batch
        y = torch.where(torch.rand(batch, device=where) < LABEL_DROPOUT, NUM_CLASSES, y)
        t, noise = torch.rand(batch, device=where), torch.randn_like(z_0)
        z_t = torch.lerp(z_0, noise, t.view(-1, 1, 1, 1))
        with workload.products():
            with workload.autocast():
                velocity = self.model(t, z_t, y)
            F.mse_loss(velocity.float(), noise - z_0).backward()
        self._update()

    def _update(self) -> None:
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

"""One optimizer step of flow matching, the whole pass on one screen."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lfm_fast import ops
from lfm_fast.flow import time_samplers
from lfm_fast.flow.noise import label_dropout_mask
from lfm_fast.models.precision import float32_products
from lfm_fast.train.config import AUTOCAST
from lfm_fast.train.ema import EMA
from lfm_fast.train.optimizer import AdamW


@dataclass
class TrainState:
    """Everything a step changes. `network` is how the model is called: itself, or DistributedDataParallel around it.

    Of a run in pure bfloat16 it is a copy of the model in bfloat16, and `copies` holds its Parameters by the model's:
    gradients are theirs, and they are the model's float32 weights, rounded after every step.
    """

    model: torch.nn.Module
    network: torch.nn.Module
    optimizer: AdamW
    ema: EMA
    copies: dict | None = None
    graph: Callable | None = None  # what stands for add_gradients_of_part: lfm_fast.train.graphed
    step: int = 0  # optimizer steps done
    samples: int = 0  # samples drawn, over all ranks; the next one's global number
    flow: dict | None = None  # what its checkpoints say about sampling from it: path, autoencoder, class names
    origin: dict | None = None  # and about what it learns from (lfm_fast.train.origin)
    loss_sum: torch.Tensor | None = None  # () float64: this rank's part of the losses of the steps not yet logged
    loss_steps: int = 0  # how many steps those are
    grad_norm: torch.Tensor | None = None  # () of the last step, before clipping
    data_seconds: float = 0.0  # that the steps not yet logged have waited for latents, labels and conditions

    @property
    def trained(self):
        """The Parameters whose gradients a backward pass makes."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return parameters if self.copies is None else [self.copies[parameter] for parameter in parameters]

    @torch.no_grad()
    def renew_copies(self):
        """Round the model's weights anew: they have come from a checkpoint."""
        if self.copies is not None:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))


def train_step(state, source, config, path, world):
    """Minimise the mean over the global batch of |v(t, z_t, y) - u_t|^2 / numel (arXiv 2210.02747, eq. 9) by one step.

    Rank r takes its slice of the sample numbers and passes over it in `accumulation_steps` parts; every random draw
    depends on (seed, sample number) alone and each loss is divided by the GLOBAL batch size, so the step is the same,
    up to rounding, however the batch is split over ranks and parts.
    """
    numbers = world.shard(config.batch_size, first=state.samples)  # (b,) int64
    parts = numbers.tensor_split(min(config.accumulation_steps, numbers.numel()))
    add_gradients = state.graph or gradients_on(state, config, path, world, source)
    loss = torch.zeros_like(state.loss_sum)
    for part, numbers in enumerate(parts):
        # data -> z_0, or the posteriors that it is drawn from
        began = time.perf_counter()
        given = _given(source, numbers, config.seed)
        state.data_seconds += time.perf_counter() - began
        latents, y, index, condition = (
            None if tensor is None else tensor.to(world.device, non_blocking=True) for tensor in given
        )
        # z_0 -> z_t -> model -> velocity -> loss -> gradient
        with _gradients_summed_over_ranks(state.network, last=part == len(parts) - 1):
            loss += add_gradients(latents, y, index, condition)
    # AdamW and the average of the weights, in one pass over them (ops.adamw_ema)
    state.grad_norm, scale = _clip(state.trained, config.clip_grad_norm)
    ema = state.ema
    followers = {"averaged": ema.averaged, "copies": state.copies}
    state.optimizer.step(gradient_scale=scale, ema_decay=ema.decay_at(state.step), **followers)
    for parameter in state.trained:
        parameter.grad = None
    state.loss_sum += loss  # not before: of a step whose data cannot be read nothing is kept
    state.step += 1
    state.loss_steps += 1
    state.samples += config.batch_size


def gradients_on(state, config, path, world, source):
    """`add_gradients_of_part` of what this source gives: (latents, y, index, condition) -> loss ()."""
    interpolate = getattr(source, "interpolate", interpolate_latents)
    return partial(add_gradients_of_part, state, config, path, world, interpolate=interpolate)


def interpolate_latents(z_0, coefficients, index, seed):
    """(z_t, target) of latents z_0 (B, C, h, w) and the noise of the samples numbered index (B,)."""
    return ops.interpolate(z_0, coefficients, index=index, seed=seed)


def add_gradients_of_part(
    state, config, path, world, latents, y, index, condition=None, *, interpolate=interpolate_latents
):
    """Add to the gradients those of the samples y (B,), numbered index (B,) among all drawn, and of what each is
    conditioned on, (B, ...) or None; returns their part of the loss, (). Their latents are z_0 (B, C, h, w), or what
    the source's `interpolate` takes in its place.

    A function of what the tensors hold and of the weights: nothing in it is read by the host, and nothing that
    Python knows changes from step to step, so that a CUDA graph can hold it (lfm_fast.train.graphed).
    """
    # t, noise -> z_t and the velocity to be learned
    t = time_samplers.draw(config.time_sampler, index, config.seed, path.t_min, path.t_max)  # (B,)
    coefficients = path.coefficients(t)  # (4, B): alpha, sigma, d_alpha, d_sigma
    z_t, target = interpolate(latents, coefficients, index, config.seed)
    y = _some_dropped(y, index, config, state.model.null_label) if config.num_classes else None
    given = {} if condition is None else {"condition": condition}
    with _products(config, world.device):
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision in AUTOCAST):
            velocity = state.network(t, z_t, y, **given)
        loss = ops.velocity_loss(velocity, target).sum() / config.batch_size
        (loss * world.size).backward()  # DistributedDataParallel divides by the number of ranks
    return loss.detach()


def _products(config, device):
    """Products of float32 tensors: of TF32 on CUDA unless float32 was asked for, forward and backward."""
    return float32_products(config.precision != "fp32") if device.type == "cuda" else contextlib.nullcontext()


def _given(source, numbers, seed):
    """(latents, y, numbers, condition) of the samples: z_0, or the posteriors that it is drawn from; labels; and what
    each is conditioned on beside them, as its task has it (lfm_fast/tasks), or None."""
    latents, y = getattr(source, "posteriors", source.batch)(numbers, seed)
    return latents, y, numbers, source.condition(numbers, seed) if hasattr(source, "condition") else None


def _some_dropped(y, index, config, null_label):
    """Labels (B,) with a share of them, chosen by sample number, replaced by the label that means none."""
    if not config.label_dropout:
        return y
    return y.masked_fill(label_dropout_mask(index, config.seed, config.label_dropout), null_label)


def _clip(parameters, largest):
    """The gradient's norm and the factor that brings it down to `largest`, both () float32; no factor if that is 0."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, torch.float32)))
    return norm, (largest / (norm + 1e-6)).clamp(max=1.0) if largest else None  # the optimizer's pass multiplies by it


def _gradients_summed_over_ranks(network, last):
    """Ranks exchange gradients in the last part of a step only."""
    return contextlib.nullcontext() if last or not hasattr(network, "no_sync") else network.no_sync()

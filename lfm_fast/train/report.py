"""What a run will cost and what it is costing: parameters, FLOPs, memory, the device's ceiling."""

import json
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lfm_fast.models import num_parameters
from lfm_fast.models.checkpointing import set_mode
from lfm_fast.tasks import task_named
from lfm_fast.train import memory
from lfm_fast.train.schedule import total_steps

try:
    import resource
except ImportError:  # Windows
    resource = None

# dense matrix-product peaks of bf16 in FLOP/s, from the vendors' data sheets
BF16_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device, precision):
    """The device's bf16 ceiling in FLOP/s where it is known, else None."""
    if device.type != "cuda" or precision not in ("bf16", "bf16-pure"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in BF16_PEAKS.items() if key in name), None)


def memory_used(device):
    """Bytes: the most that CUDA has handed out, or the most that this process has held (0 where nobody tells)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(config, world, latent_shape, num_items=None, table=0):
    """The dry run's text: resolved settings, parameters, FLOPs per image and a memory estimate.

    `table` is how many bytes of latents are kept in the device's memory.
    """
    pure = config.precision == "bf16-pure"
    with FakeTensorMode(), torch.device(world.device.type):  # shapes alone: no memory, whatever the size
        task = task_named(config.task)
        model = task.network(config, latent_shape)
        if pure:
            memory.to_bfloat16(model)
        set_mode(model, config.activation_checkpointing)
        samples = -(-config.batch_size // (world.size * config.accumulation_steps))
        step, one_more = (
            memory.of_step(model, n, latent_shape, config.precision, task.example(config, n, latent_shape))
            for n in (samples, samples + 1)
        )
    parameters = num_parameters(model)
    flops = model.flops_per_sample()
    state = {"weights": 6 if pure else 4, "AdamW": 8, "EMA": 4}  # bytes per parameter, float32, and a copy in bfloat16
    parts = {name: size * parameters for name, size in state.items()}
    # several ranks exchange gradients in memory that is there from the start
    exchanged = (2 if pure else 4) * parameters
    parts["gradients and activations"] = step.peak + exchanged if world.size > 1 else step.peak_with_gradients
    if table:
        parts["latents"] = table
    length = f"{config.steps} steps" if config.steps else f"{config.epochs:g} epochs"
    if config.epochs and num_items:
        length += f" = {total_steps(config, num_items)} steps over {num_items} items"
    lines = [json.dumps(config.as_dict(), indent=2)]
    lines += [
        f"network: {config.model}, latents {'x'.join(map(str, latent_shape))}, {parameters:,} parameters",
        f"length: {length}, {config.batch_size} images per step on {world.size} rank(s) of {world.device.type}",
        f"FLOPs per image: {3 * flops / 1e9:.2f} G in training (3 x the forward's {flops / 1e9:.2f} G)",
        f"memory per rank: {sum(parts.values()) / 1e9:.2f} GB at the peak of a step of {samples} samples in "
        f"{config.precision} (" + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()) + "), "
        "and PyTorch itself 0.2 GB",
        f"activations: {(one_more.peak - step.peak) / 1e6:.1f} MB per image at the peak, of which "
        f"{(one_more.kept - step.kept) / 1e6:.1f} wait for the backward pass; counted on tensors without storage, for "
        "the network as it runs without torch.compile",
    ]
    return "\n".join(lines)

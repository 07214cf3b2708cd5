"""Sample grids during training: the same noise and labels every time, so that grids of one run compare."""

import torch

import lfm_fast
from lfm_fast import pictures
from lfm_fast.models.conditioned import taken_apart
from lfm_fast.tasks import CONDITIONED, task_named

MOST_ROWS = 16  # of a grid; with more classes than this, evenly spaced ones are drawn
UNLABELLED_ROWS = 4
CONDITIONED_ROWS = 6
PER_FORWARD = 64
SAMPLING = {"method": "heun", "num_steps": 25}


def sample_grid(state, source, autoencoder, config, path, world):
    """(images (N, 3, H, W) in [-1, 1], row captions or None), sampled from the EMA weights on all ranks together."""
    if hasattr(source, "condition"):
        return _conditioned_grid(state, source, autoencoder, config, path, world), None
    labels, captions = grid_labels(source, config)
    return sample_images(state.ema.average, labels, source.latent_shape, autoencoder, config, path, world), captions


def _conditioned_grid(state, source, autoencoder, config, path, world):
    """(rows * columns, 3, H, W) in [-1, 1]: in each row what is given, the samples for it, and what it was made of."""
    numbers = torch.arange(CONDITIONED_ROWS)
    each = numbers.repeat_interleave(config.samples_per_class)
    condition = source.condition(numbers, config.seed)[each]
    images = sample_images(
        state.ema.average, None, source.latent_shape, autoencoder, config, path, world, condition=condition
    )
    task = task_named(config.task)
    images = task.finished(source, each, config.seed, (images + 1) / 2)
    inputs, truths = task.shown(source, numbers, config.seed)
    rows = images.unflatten(0, (CONDITIONED_ROWS, -1))
    return 2 * torch.cat([inputs[:, None], rows, truths[:, None]], dim=1).flatten(0, 1) - 1


def columns(config):
    """Pictures in a row of a grid."""
    return config.samples_per_class + (2 if config.task in CONDITIONED else 0)


def save_grid(file, images, columns, captions):
    pictures.save(pictures.grid((images + 1) / 2, columns=columns, captions=captions), file)


def grid_labels(source, config):
    """(labels (N,) int64 or None, row captions or None) of the run's grids."""
    if not config.num_classes:
        return None, None
    rows = min(config.num_classes, MOST_ROWS)
    classes = [row * config.num_classes // rows for row in range(rows)]
    names = dict(enumerate(source.class_names))
    captions = [names.get(label, f"class {label}") for label in classes]
    return torch.tensor(classes).repeat_interleave(config.samples_per_class), captions


@torch.no_grad()
def sample_images(model, labels, latent_shape, autoencoder, config, path, world, condition=None):
    """(N, 3, H, W) in [-1, 1] on every rank's CPU; picture i depends on (seed, i) and not on the number of ranks."""
    given = labels if condition is None else condition
    count = UNLABELLED_ROWS * config.samples_per_class if given is None else len(given)
    images = [torch.empty(0, 3, *(side * autoencoder.downsampling for side in latent_shape[1:]))]
    for numbers in world.shard(count).split(PER_FORWARD):
        if not numbers.numel():
            continue
        # another seed than training's: the noise of sample i of the data is not the noise of picture i
        z_1 = lfm_fast.noise(len(numbers), latent_shape, seed=config.seed + 1, indices=numbers, device=world.device)
        y = None if labels is None else labels[numbers].to(world.device)
        guided = y is not None and model.null_label is not None
        part = None if condition is None else condition[numbers].to(world.device)
        network, entries = taken_apart(model, part)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision not in ("fp32", "tf32")):
            z_0 = lfm_fast.sample(
                network,
                path.prior(z_1),
                y=y,
                guidance_scale=config.guidance_scale if guided else 1.0,
                null_label=model.null_label,
                **SAMPLING,
                path=path,
                model_kwargs=entries,
            )
        images.append(autoencoder.decode(z_0).cpu())
    return world.gather(torch.cat(images))

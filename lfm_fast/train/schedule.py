"""How long a run is and what the learning rate is at each step: plain functions of the settings."""

import math


def total_steps(config, num_items):
    """Optimizer steps of the whole run."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(config.epochs * num_items / config.batch_size))


def learning_rate(config, step, num_items):
    """The rate of optimizer step `step` = 0, 1, ...: linear warm-up, then constant or half a cosine.

    lr = final + (lr_0 - final) (1 + cos(pi p)) / 2, with p the share of the run done. With the length given in epochs
    p moves once per epoch, as in the published runs; with steps it moves at every step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    if config.epochs is not None:
        progress = math.floor(step * config.batch_size / num_items) / config.epochs
    else:
        progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine

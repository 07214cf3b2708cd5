"""Draw what a conditioned flow makes of held-out images: run `python scripts/show_task.py RUN [--output FILE]`.

One row for each image: what the flow is given, several samples for it, and the image that it was made of; with
--nearest also the training image closest to the first sample, which shows whether a sample is a copy. RUN is the folder
of a training run, whose settings say which images those are; of a folder of images, which is trained on whole, they are
the training images themselves. The first images of the order are taken as they come.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from lfm_fast import LatentFlow, pictures
from lfm_fast.data.latents import CachedLatents
from lfm_fast.tasks import task_named
from lfm_fast.train.config import TrainConfig
from lfm_fast.train.resume import settings_of


def show(run, output, rows=8, samples=4, seed=1, nearest=False, scale=2, **sampling):
    """Write the grid of a run to the file `output`."""
    config = dataclasses.replace(TrainConfig(**settings_of(run)), flip=False)
    flow, task = LatentFlow.from_pretrained(run), task_named(config.task)
    images = task.images(config, "held_out" if config.data in ("embedded", "embedded-layouts") else "train")
    source = task.source(config, CachedLatents.from_images(images, flow.autoencoder), images, flow.autoencoder)
    numbers = torch.arange(rows)
    given, truths = task.shown(source, numbers, 0)
    condition = source.condition(numbers, 0).repeat_interleave(samples, 0)
    drawn = flow.sample(rows * samples, condition=condition, seed=seed, **sampling)
    drawn = task.finished(source, numbers.repeat_interleave(samples), 0, drawn)
    columns = [given[:, None], drawn.unflatten(0, (rows, samples)), truths[:, None]]
    captions = ["given", *["sample"] * samples, "truth"]
    if nearest:
        training = task.images(config)
        references = training.batch(range(len(training)))
        closest = torch.from_numpy(pictures.nearest(drawn[::samples], references))
        columns.append(references[closest].float()[:, None] / 255)
        captions.append("nearest in training")
    grid = torch.cat(columns, 1).flatten(0, 1)
    pictures.save(pictures.grid(grid, columns=len(captions), column_captions=captions, scale=scale), output)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a training run of a task that conditions")
    parser.add_argument("--output", type=Path, default=Path("task.png"))
    parser.add_argument("--rows", type=int, default=8, help="how many images (%(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="of each (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the noise (%(default)s)")
    parser.add_argument("--nearest", action="store_true", help="show the training image closest to the first sample")
    arguments = vars(parser.parse_args())
    try:
        show(**arguments)
    except ValueError as error:
        parser.error(str(error).removeprefix("--resume "))  # the flag of training that takes such a folder
    print(f"wrote {arguments['output']}")


if __name__ == "__main__":
    main()

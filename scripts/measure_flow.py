"""Measure how a flow trained on the embedded set draws: run `python scripts/measure_flow.py [--model FOLDER]`.

Two numbers against the training images, by distance in pixels: how often the nearest one is of the category asked for,
and how far away it is for samples and, as the yardstick of what does not copy, for the held-out images. Prints JSON;
the shipped model's stands in lfm_fast/embedded/transformer/measured.json.
"""

import argparse
import json

import torch

from lfm_fast import LatentFlow, pictures
from lfm_fast.data import open_images


def rmse(images, references, nearest):
    """Root mean squared difference of pixels in [0, 1], (N,)."""
    return (images - references[nearest]).flatten(1).square().mean(1).sqrt()


def against_nearest(images, references):
    """(N,) index of the closest training image, and (N,) the distance to it."""
    nearest = torch.from_numpy(pictures.nearest(images, references))
    return nearest, rmse(images, references.float() / 255, nearest)


def measure(flow, per_class, seeds):
    """The report as a dictionary; every seed draws `per_class` images of each category."""
    training, held_out = (open_images("embedded", flow.image_size, split=name) for name in ("train", "held_out"))
    references, unseen = (source.batch(range(len(source))) for source in (training, held_out))
    y = torch.arange(len(flow.class_names)).repeat_interleave(per_class)
    sampling = {"guidance_scale": 2.0, "method": "heun", "num_steps": 25}
    hits, distances = [], []
    for seed in seeds:
        nearest, distance = against_nearest(flow.sample(len(y), y=y, seed=seed, **sampling), references)
        hits.append(training.labels[nearest] == y)
        distances.append(distance)
    by_class = torch.stack(hits).float().mean(0).view(-1, per_class).mean(1)
    yardstick = against_nearest(unseen.float() / 255, references)[1]
    return {
        "nearest_training_image_is_of_the_category_asked_for": {
            "over": f"{per_class} images a category for each of the seeds {list(seeds)}, {sampling}",
            "all": round(by_class.mean().item(), 2),
            **{name: round(share, 2) for name, share in zip(flow.class_names, by_class.tolist())},
        },
        "distance_to_nearest_training_image_rmse": {
            "over": "the same samples, and all held-out images; pixels in [0, 1]",
            "median_of_samples": round(torch.cat(distances).median().item(), 3),
            "median_of_held_out_images": round(yardstick.median().item(), 3),
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="as LatentFlow.from_pretrained takes it (%(default)s)")
    parser.add_argument("--per-class", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    args = parser.parse_args()
    print(json.dumps(measure(LatentFlow.from_pretrained(args.model), args.per_class, args.seeds), indent=2))


if __name__ == "__main__":
    main()

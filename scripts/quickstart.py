"""Train the embedded preset for a few minutes and show what came of it (run it through scripts/quickstart.sh).

Leaves in quickstart/: samples.png (one row per category), compare.png (the untrained network, this one, the shipped
one), nearest.png (samples over their nearest training images), loss.png, and a numbered folder in run/ with checkpoints
and metrics, beside those of earlier runs.
"""

import argparse
import contextlib
import io
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from lfm_fast import LatentFlow, pictures
from lfm_fast._terminal import plain_warnings
from lfm_fast.checkpoint import check_output
from lfm_fast.data import open_images
from lfm_fast.train.commands import command
from lfm_fast.train.compiling import can_compile_for_cpu
from lfm_fast.train.config import from_preset
from lfm_fast.train.journal import read_metrics
from lfm_fast.train.loop import train
from lfm_fast.train.resume import newest_step

PER_CLASS = 10
FEWEST_STEPS, MOST_STEPS = 200, 4000
TIMED_STEPS = 12


def steps_within(minutes, settings):
    """How many steps fit, by timing a few in a folder that is thrown away: a schedule has to know its length.

    Raises KeyboardInterrupt where a signal ended them, which training takes for a wish to stop and save.
    """
    print(f"Timing {TIMED_STEPS} steps first, to see how many fit into {minutes:g} minutes.", flush=True)
    # what training says of them is of that folder: a checkpoint that nobody will find, how to go on from it
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        quiet = {**settings, "output": folder, "sample_every": 0, "log_every": 4}
        run = train(from_preset("embedded", **quiet, steps=TIMED_STEPS))
        if newest_step(run) < TIMED_STEPS:
            raise KeyboardInterrupt
        steps_per_s = read_metrics(run)[-1]["steps_per_s"]
    steps = int(min(MOST_STEPS, max(FEWEST_STEPS, steps_per_s * 60 * minutes)))
    print(f"{steps_per_s:.1f} steps a second: {steps} steps will take about {steps / steps_per_s / 60:.1f} minutes.")
    return steps


def sample_rows(flow):
    """(N, 3, H, W): PER_CLASS images of every category, the same noise for every flow."""
    return flow.sample(len(rows(flow)), y=rows(flow), seed=1)


def rows(flow):
    return torch.arange(len(flow.class_names)).repeat_interleave(PER_CLASS)


def show(run, steps, output):
    """Write the pictures of a finished run and return, in words, how often samples look like their category."""
    flow, shipped = LatentFlow.from_pretrained(run), LatentFlow.from_pretrained("embedded")
    images, theirs = sample_rows(flow), sample_rows(shipped)
    pictures.grid(images, columns=PER_CLASS, captions=flow.class_names).save(output / "samples.png")
    panels = [
        ("before training", Image.open(run / "samples" / "0000000.png")),
        (f"after {steps} steps", pictures.grid(images, columns=PER_CLASS)),
        ("the shipped model", pictures.grid(theirs, columns=PER_CLASS)),
    ]
    pictures.side_by_side(panels).save(output / "compare.png")
    training_set = open_images("embedded", flow.image_size, split="train")
    references = training_set.batch(range(len(training_set)))
    some = images.unflatten(0, (-1, PER_CLASS))[:, :3].flatten(0, 1)  # three of each category, three categories a row
    pictures.samples_and_nearest(some, references, pairs_per_row=9).save(output / "nearest.png")
    pictures.loss_curve(run / "metrics.jsonl", output / "loss.png")

    def hits(samples):
        nearest = torch.from_numpy(pictures.nearest(samples, references))
        return f"{(training_set.labels[nearest] == rows(flow)).float().mean():.0%}"

    chance = f"{1 / len(flow.class_names):.0%}"
    said = f"{hits(images)} (the shipped model {hits(theirs)}, chance {chance})"
    return f"samples whose nearest training image is of the category asked for: {said}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.5, help="of training; default %(default)s")
    parser.add_argument("--steps", type=int, help="train this many steps instead")
    parser.add_argument("--output", type=Path, default=Path("quickstart"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    try:
        check_output(args.output)
        with plain_warnings("quickstart"):
            quickstart(args)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def quickstart(args):
    began = time.time()
    settings = {"device": args.device, "samples_per_class": PER_CLASS, "resume": "never"}
    settings["compile"] = "block" if torch.cuda.is_available() or can_compile_for_cpu() else "off"
    steps = args.steps or steps_within(args.minutes, settings)
    run = train(
        from_preset(
            "embedded",
            **settings,
            steps=steps,
            log_every=min(10, max(1, steps // 20)),
            sample_every=steps,
            checkpoint_every=steps,
            output=str(args.output / "run"),
        )
    )
    if newest_step(run) < steps:  # a signal; training has saved, and said how to go on
        print(f"No pictures yet. Draw some: {_draw(run)}")
        return
    summary = show(run, steps, args.output)
    print(f"\ndone in {time.time() - began:.0f} s; {summary}. Look at")
    print(f"  {args.output / 'samples.png'}   what the network draws now, one row per category")
    print(f"  {args.output / 'compare.png'}   before training, now, and the model that ships with the package")
    print(f"  {args.output / 'nearest.png'}   samples over the training images closest to them: more than copies?")
    print(f"  {args.output / 'loss.png'}      the loss curve")
    print(f"The checkpoint is in {run}/checkpoints. Draw more of a category:")
    print(f"  {_draw(run)}")


def _draw(run):
    return shlex.join([command("lfm-fast"), "sample", "--model", str(run), "--class", "Flags"])


if __name__ == "__main__":
    sys.exit(main())

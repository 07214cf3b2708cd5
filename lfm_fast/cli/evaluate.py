"""`lfm-fast evaluate`: how well samples keep to what they were asked for, on held-out images."""

import json
from pathlib import Path

from lfm_fast.cli.arguments import device_named, not_empty


def add(commands):
    says = "Measure how well a conditioned flow keeps to its conditions, on images that it was not trained on."
    parser = commands.add_parser(
        "evaluate",
        usage="%(prog)s --model MODEL [--FLAG VALUE ...]",
        help="measure a conditioned flow on held-out images",
        description=says,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--model", required=True, help="a training run's folder, a saved folder or a checkpoint file")
    add("--autoencoder", help="'embedded', a folder or a hub name; default: the one recorded with the model")
    add("--task", help="inpainting, semantic or layout; default: the one recorded with the model")
    add("--approach", help="inpainting: condition, project or project:resample; default: what suits the model")
    says = "'embedded' or images, of which what is held out (default: %(default)s)"
    add("--data", type=not_empty, default="embedded", help=says)
    add("--num-images", type=int, default=64, help="how many held-out images (default: %(default)s)")
    add("--method", help="solver (default: what suits the model)")
    add("--num-steps", type=int, help="steps of a fixed-step solver")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--output", type=Path, help="a .json file for the figures (default: they are printed alone)")


def run(args):
    from lfm_fast.checkpoint import atomic_write, check_output
    from lfm_fast.pipeline import LatentFlow
    from lfm_fast.tasks import task_named

    if args.num_images < 1:
        raise ValueError(f"--num-images is {args.num_images}; give 1 or more")
    if args.output is not None:
        if args.output.suffix != ".json":
            raise ValueError(f"--output {args.output} must end in .json")
        check_output(args.output.parent)
    flow = LatentFlow.from_pretrained(args.model, args.autoencoder, device=device_named(args.device))
    sampling = {name: getattr(args, name) for name in ("method", "num_steps") if getattr(args, name) is not None}
    name = args.task or flow.task.get("name")
    task = task_named(name)
    if args.approach is not None:
        if name != "inpainting":
            raise ValueError("--approach is of task inpainting; leave it out")
        sampling["approach"] = args.approach
    found = task.evaluate(flow, num_images=args.num_images, seed=args.seed, data=args.data, **sampling)
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    if args.output is not None:
        with atomic_write(args.output) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n")
        print(f"wrote {args.output}")

"""`lfm-fast sample`: pictures from noise."""

import sys
from pathlib import Path

from lfm_fast.cli.arguments import device_named

_GUIDANCE = {"plain": "LinearGuidance", "rescale": "Rescale", "apg": "APG", "cfg-zero": "CFGZeroStar"}
# flag that tells what to condition on -> task that makes images of it
_CONDITIONS = {"image": "inpainting", "label_map": "semantic", "layout": "layout"}
_COMPARED = 4  # images that --reuse solves both ways
_GRIDS = (
    "uniform, quadratic, logit, logit:A, karras, karras:RHO, shift:S, step:H, lfm or a .json file that tune-grid wrote"
)


def add(commands):
    says = "Draw images from a trained flow: the one that ships with the package, a run's, a saved one or LFM's."
    parser = commands.add_parser("sample", help="draw images from a trained flow", description=says)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--model", default="embedded", help="'embedded', a saved folder, a training run's folder or a checkpoint file")
    add("--autoencoder", help="'embedded', a folder or a hub name; default: the one recorded with the model")
    add("--num-images", type=int, default=16, help="how many (default: %(default)s)")
    add("--class", dest="label", metavar="NAME_OR_INDEX", help="label of all images; default: unconditional")
    add("--guidance-scale", type=float, help="towards the class; 1 is none; default: what suits the model")
    add("--guidance", choices=_GUIDANCE, help="what is made of the scale: plain (default), rescale, apg or cfg-zero")
    add("--guidance-interval", nargs=2, type=float, metavar=("LOW", "HIGH"), help="times in which there is guidance")
    add("--method", help="solver: euler, midpoint, heun, rk4, dopri5, ... (default: what suits the model, or dopri5)")
    add("--num-steps", type=int, help="steps of a fixed-step solver")
    add("--time-grid", metavar="GRID", help="times of a fixed-step solver: " + _GRIDS)
    add("--tolerance", type=float, help="atol and rtol of an adaptive solver")
    add("--reuse", type=float, metavar="ERROR", help="extrapolate velocities where the relative error is below this")
    add("--image", metavar="FILE", help="inpaint: a picture of any size; needs --mask")
    add("--mask", metavar="FILE", help="of the same size, white where the hole is")
    add("--fit", choices=("resize", "tile", "refuse"), help="a picture of another size (default: resize)")
    add("--approach", help="condition, project or project:resample; default: what suits the model")
    add("--label-map", metavar="FILE", help="for a flow of task semantic: a PNG of ids, or of the palette's colours")
    add("--layout", metavar="FILE", help="for a flow of task layout: a .json file of boxes, or of several such lists")
    add("--seed", type=int, default=0, help="image i depends on the seed and i alone (default: %(default)s)")
    add("--batch-size", type=int, help="images at a time (default: 64)")
    add(
        "--precision",
        choices=("fp32", "tf32", "bf16", "fp16"),
        help="of network and autoencoder (default: as they come)",
    )
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--output", default="samples.png", help="a .png file for one grid, or a folder (default: %(default)s)")


def run(args):
    from lfm_fast.models.optimize import optimize
    from lfm_fast.pictures import grid, save
    from lfm_fast.pipeline import LatentFlow
    from lfm_fast.solvers.grids import from_text

    output = Path(args.output)
    as_grid = _prepared(output)
    for name in ("guidance_scale", "guidance", "guidance_interval"):
        if args.label is None and getattr(args, name) not in (None, 1):
            raise ValueError(f"--{name.replace('_', '-')} guides towards a class; give --class too, or leave it out")
    task = _task(args)
    flow = LatentFlow.from_pretrained(args.model, args.autoencoder, device=device_named(args.device))
    if args.precision is not None:
        flow.model, flow.autoencoder = (optimize(part, args.precision) for part in (flow.model, flow.autoencoder))
    _require_condition(flow, task)
    _require_its_own(args, args.method or flow.sampling.get("method", "dopri5"))
    chosen = _guidance(args, flow) | {name: getattr(args, name) for name in ("method", "num_steps")}
    chosen["time_grid"] = None if args.time_grid is None else from_text(args.time_grid)
    chosen |= {"atol": args.tolerance, "rtol": args.tolerance, "progress": sys.stderr.isatty()}
    sampling = {name: value for name, value in chosen.items() if value is not None}
    if args.reuse is not None:
        sampling = _reusing(flow, args, sampling)
    common = {"num_images": args.num_images, "y": args.label, "seed": args.seed, "batch_size": args.batch_size}
    images = flow.sample(**common, **sampling) if task is None else task.generated(flow, args, **common, **sampling)
    if as_grid:
        save(grid(images), output)
    else:
        for number, image in enumerate(images):
            save(grid(image[None], padding=0), output / f"{number:06d}.png")
    print(f"wrote {len(images)} {'image' if len(images) == 1 else 'images'} to {output}")


def _task(args):
    """The task whose flag says what to condition on, or None."""
    from lfm_fast.tasks import task_named

    if args.image is None and args.mask is not None:
        raise ValueError("--mask belongs to --image, the picture to paint holes of; give both")
    for name in ("fit", "approach"):
        if args.image is None and getattr(args, name) is not None:
            raise ValueError(f"--{name} belongs to --image, the picture to paint holes of; leave it out")
    named = [flag for flag in _CONDITIONS if getattr(args, flag) is not None]
    if len(named) > 1:
        first, second = (flag.replace("_", "-") for flag in named[:2])
        raise ValueError(f"--{first} and --{second} belong to different tasks; give one of them")
    if named and args.reuse is not None:  # what it measures are plain samples
        raise ValueError(f"--reuse is not for --{named[0].replace('_', '-')}; leave it out")
    return task_named(_CONDITIONS[named[0]]) if named else None


def _require_condition(flow, task):
    """Raise ValueError, in the words of the command line, for a flow that is not told what it needs."""
    flags = {name: "--" + flag.replace("_", "-") for flag, name in _CONDITIONS.items()}
    wanted = flow.task.get("name")
    if task is None and wanted in flags and getattr(flow.model, "needs_condition", False):
        more = " and --mask" if wanted == "inpainting" else ""
        raise ValueError(f"this flow is of task {wanted}; give {flags[wanted]}{more}")


def _guidance(args, flow):
    """The arguments of sampling that say how to guide."""
    from lfm_fast import guidance

    if args.guidance is None and args.guidance_interval is None:
        return {"guidance_scale": args.guidance_scale}
    scale = flow.sampling.get("guidance_scale", 1.0) if args.guidance_scale is None else args.guidance_scale
    kind = getattr(guidance, _GUIDANCE[args.guidance or "plain"])
    return {"guidance": kind(scale, interval=args.guidance_interval or (0.0, 1.0))}


def _reusing(flow, args, sampling):
    """The same with velocities reused; solves some of the images both ways, and says what it saves and costs."""
    from lfm_fast.approximations import Reuse, compare
    from lfm_fast.flow.noise import noise
    from lfm_fast.guidance import LinearGuidance

    common = {**flow.defaults(args.label, sampling.get("guidance")), **sampling, "progress": False}
    scale, interval = common.pop("guidance_scale", 1.0), common.pop("guidance_interval", (0.0, 1.0))
    guidance = common.pop("guidance", None) or LinearGuidance(scale, interval)
    reuse, count = Reuse(guidance, args.reuse), min(args.num_images, _COMPARED)
    z_1 = flow.path.prior(noise(count, flow.latent_shape, seed=args.seed, device=flow.device))
    y = flow.labels(args.label, count)
    common |= {"model": flow.model, "y": None if y is None else y.to(flow.device), "path": flow.path}
    found = compare(z_1, {"guidance": guidance}, {"guidance": reuse}, **common)
    print(f"--reuse {args.reuse:g}, measured on the first {count}: {found}")
    return {name: value for name, value in sampling.items() if name != "guidance_scale"} | {"guidance": reuse}


def _require_its_own(args, method):
    """Raise ValueError for a setting that the solver would not look at."""
    from lfm_fast.solvers import get_solver
    from lfm_fast.solvers.grids import is_table

    if args.tolerance is not None and not get_solver(method).adaptive:
        raise ValueError(f"--tolerance is for adaptive solvers, and {method} takes fixed steps; give --num-steps")
    if args.num_steps is not None and get_solver(method).adaptive:
        raise ValueError(f"--num-steps is for fixed-step solvers, and {method} chooses its own; give --tolerance")
    if args.time_grid is not None and get_solver(method).adaptive:
        raise ValueError(f"--time-grid is for fixed-step solvers, and {method} chooses its own; give --tolerance")
    if args.reuse is not None and get_solver(method).adaptive:  # else said after the exact solve that it is held to
        raise ValueError(f"--reuse is for fixed-step solvers, and {method} judges its steps by evaluations; give heun")
    own = args.time_grid is not None and (is_table(args.time_grid) or args.time_grid.startswith("step:"))
    if args.num_steps is not None and own:
        raise ValueError(f"--num-steps is not for {args.time_grid}, which holds its own times; leave --num-steps out")


def _prepared(output):
    """Whether one .png is wanted rather than a folder. Raises ValueError now, before all the work."""
    from lfm_fast.checkpoint import check_output

    if output == Path():
        raise ValueError("--output is empty; give a .png file or a folder")
    if output.suffix.lower() in (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npz", ".npy"):
        raise ValueError(f"--output {output} must end in .png, or be a folder")
    as_grid = output.suffix.lower() == ".png"
    if as_grid and output.is_dir():
        raise ValueError(f"--output {output} is a folder; choose another place")
    check_output(output.parent if as_grid else output)
    return as_grid

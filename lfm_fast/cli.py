"""The command line, `lfm-fast`: one sub-command per function below, each a few lines over the library."""

import argparse
import sys
from pathlib import Path


def main(argv=None):
    """Run one sub-command; returns the exit status. The user's mistakes end in one sentence and status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = " ".join(["lfm-fast", *arguments[:1]])
    try:
        if arguments[:1] == ["train"]:  # it has a parser of its own, the one of train_fast.py
            return _train(arguments[1:])
        args = _parser().parse_args(arguments)
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a solver that cannot go on, a device that runs out of memory
        print(f"{command}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while modules are imported, too: that takes seconds
        print(f"{command}: interrupted", file=sys.stderr)
        return 130


def _parser():
    parser = argparse.ArgumentParser(prog="lfm-fast", description="Latent flow matching, fast.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a flow (the same flags as train_fast.py)", add_help=False)
    _add_sample(commands)
    _add_tune_grid(commands)
    _add_encode(commands)
    _add_convert(commands)
    _add_bench(commands)
    _add_info(commands)
    return parser


def _version():
    from lfm_fast import __version__

    return f"lfm_fast {__version__}"


def _train(arguments):
    from lfm_fast.train.config import parse_args
    from lfm_fast.train.loop import main as train

    return train(parse_args(arguments, prog="lfm-fast train"))


_GUIDANCE = {"plain": "LinearGuidance", "rescale": "Rescale", "apg": "APG", "cfg-zero": "CFGZeroStar"}
_COMPARED = 4  # images that --reuse solves both ways
_GRIDS = "uniform, quadratic, karras, karras:RHO, shift:S, step:H, lfm or a .json file that tune-grid wrote"


def _add_sample(commands):
    says = "Draw images from a trained flow: the one that ships with the package, a run's, a saved one or LFM's."
    parser = commands.add_parser("sample", allow_abbrev=False, help="draw images from a trained flow", description=says)
    parser.set_defaults(run=_sample)
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
    add("--seed", type=int, default=0, help="image i depends on the seed and i alone (default: %(default)s)")
    add("--batch-size", type=int, help="images at a time (default: 64)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--output", default="samples.png", help="a .png file for one grid, or a folder (default: %(default)s)")


def _sample(args):
    from lfm_fast.pictures import grid, save
    from lfm_fast.pipeline import LatentFlow
    from lfm_fast.solvers.grids import from_text

    output = Path(args.output)
    as_grid = _prepared(output)
    for name in ("guidance_scale", "guidance", "guidance_interval"):
        if args.label is None and getattr(args, name) not in (None, 1):
            raise ValueError(f"--{name.replace('_', '-')} guides towards a class; give --class too, or leave it out")
    flow = LatentFlow.from_pretrained(args.model, args.autoencoder, device=_device(args.device))
    _require_its_own(args, args.method or flow.sampling.get("method", "dopri5"))
    chosen = _guidance(args, flow) | {name: getattr(args, name) for name in ("method", "num_steps")}
    chosen["time_grid"] = None if args.time_grid is None else from_text(args.time_grid)
    chosen |= {"atol": args.tolerance, "rtol": args.tolerance, "progress": sys.stderr.isatty()}
    sampling = {name: value for name, value in chosen.items() if value is not None}
    if args.reuse is not None:
        sampling = _reusing(flow, args, sampling)
    images = flow.sample(args.num_images, y=args.label, seed=args.seed, batch_size=args.batch_size, **sampling)
    if as_grid:
        save(grid(images), output)
    else:
        for number, image in enumerate(images):
            save(grid(image[None], padding=0), output / f"{number:06d}.png")
    print(f"wrote {len(images)} images to {output}")


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


def _add_tune_grid(commands):
    short = "fit the times of a few solver steps to a model"
    says = "Fit the times of N solver steps to a model, for `lfm-fast sample --time-grid FILE` and `time_grid=`."
    parser = commands.add_parser("tune-grid", allow_abbrev=False, help=short, description=says)
    parser.set_defaults(run=_tune_grid)
    add = parser.add_argument
    add("--model", default="embedded", help="'embedded', a saved folder, a training run's folder or a checkpoint file")
    add("--method", default="heun", help="a fixed-step solver (default: %(default)s)")
    add("--num-steps", type=int, default=10, help="steps of the table (default: %(default)s)")
    add("--class", dest="label", metavar="NAME_OR_INDEX", help="label of all samples (default: each in turn)")
    add("--unconditional", action="store_true", help="without labels, so without guidance")
    add("--guidance-scale", type=float, help="towards the class; 1 is none; default: what suits the model")
    add("--num-samples", type=int, default=24, help="samples to fit (default: %(default)s)")
    add("--num-held-out", type=int, default=48, help="other samples, to measure the gain on (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the samples to fit; the others are of the next (default: %(default)s)")
    add("--rounds", type=int, default=3, help="improvements of the table at most (default: %(default)s)")
    add("--fine-steps", type=int, default=24, help="RK4 steps of the solution to come near (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--output", default="times.json", help="a .json file (default: %(default)s)")


def _tune_grid(args):
    from lfm_fast.checkpoint import check_output
    from lfm_fast.pipeline import LatentFlow
    from lfm_fast.tuning import tune_grid

    output = Path(args.output)
    if output.suffix != ".json":
        raise ValueError(f"--output {output} must end in .json")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; choose another place")
    check_output(output.parent)
    if args.unconditional and (args.label is not None or args.guidance_scale not in (None, 1)):
        raise ValueError("--unconditional leaves out labels and guidance; leave --class and --guidance-scale out too")
    flow = LatentFlow.from_pretrained(args.model, device=_device(args.device))
    labels = _labels(flow, args)
    sampling = flow.defaults(labels) | ({} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale})
    names = ("method", "num_steps", "num_samples", "num_held_out", "seed", "rounds", "fine_steps")
    sampling |= {name: getattr(args, name) for name in names}
    grid = tune_grid(
        flow.model,
        flow.latent_shape,
        labels=labels,
        path=flow.path,
        device=flow.device,
        on_round=lambda number, error: print(f"round {number}: mean error {error:.2e} on the noise of the fit"),
        **sampling,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    grid.save(output, model=str(args.model))
    print(f"{grid}\nwrote {output}")


def _labels(flow, args):
    """The labels that the samples of a fit take in turn, or None."""
    if args.unconditional:
        return None
    if args.label is not None:
        return flow.labels(args.label, 1)
    return list(range(flow.model.config["num_classes"])) or None


def _device(name):
    """The device asked for, or the best there is. Raises ValueError for one that this machine does not have."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not (number or "0").isdecimal() or int(number or 0) >= count:
        raise ValueError(f"--device {name} is not here; there is cpu" + (", cuda" if torch.cuda.is_available() else ""))
    return name


def _add_encode(commands):
    from lfm_fast.autoencoder import DEFAULT_HUB_NAME

    says = "Encode images once into a folder of latents, which `lfm-fast train --data` takes. Begun again, it goes on."
    parser = commands.add_parser(
        "encode", allow_abbrev=False, help="encode images into a latent cache, to train from", description=says
    )
    parser.set_defaults(run=_encode)
    add = parser.add_argument
    add("--data", required=True, help="'embedded' or a folder of images (class = sub-folder)")
    add("--image-size", type=int, default=256, help="side in pixels (default: %(default)s)")
    add("--autoencoder", default=DEFAULT_HUB_NAME, help="'embedded', a folder or a hub name (default: %(default)s)")
    add("--flip", action="store_true", help="store mirrored latents too")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--output", type=_folder, required=True, help="folder of the cache")


def _encode(args):
    from lfm_fast.autoencoder import load_autoencoder
    from lfm_fast.checkpoint import check_output
    from lfm_fast.data import open_images
    from lfm_fast.data.latents import encode_images
    from lfm_fast.train.source import latent_format

    device = _device(args.device)
    check_output(args.output)
    latent_format(args.autoencoder)  # its complaints before all images are read, and theirs before a download
    source = open_images(args.data, args.image_size, flip=args.flip)
    autoencoder = load_autoencoder(args.autoencoder, device=device)
    encode_images(source, autoencoder, args.output, flip=args.flip)
    if source.report.skipped:
        print(source.report.summary())
    print(f"wrote the latents of {len(source)} images to {args.output}")


def _add_convert(commands):
    short = "write a model (a run, a checkpoint) as one folder to load or share"
    says = "Write a model as one folder in diffusers' layout: model_index.json, transformer/ and vae/."
    parser = commands.add_parser("convert", allow_abbrev=False, help=short, description=says)
    parser.set_defaults(run=_convert)
    add = parser.add_argument
    add("--model", required=True, help="a training run's folder, a checkpoint file or a saved folder")
    add("--autoencoder", help="'embedded', a folder or a hub name; default: the one recorded with the model")
    add("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"), help="of the network's weights on disk")
    add("--output", type=_folder, required=True, help="folder; a flow that is there already is replaced")


def _folder(text):
    if not text:  # it would be the current folder
        raise argparse.ArgumentTypeError("it is empty; give a folder")
    return Path(text)


def _convert(args):
    import torch

    from lfm_fast.checkpoint import check_output
    from lfm_fast.pipeline import LatentFlow

    check_output(args.output)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    LatentFlow.from_pretrained(args.model, args.autoencoder).save_pretrained(args.output, dtype=dtype)
    print(f"wrote {args.output}")


_BENCHMARKS = ("ops", "forward", "train_step", "sampling", "solvers", "data", "startup")


def _add_bench(commands):
    says = "compare the speed with what else one would use, and draw tables and pictures of it"
    parser = commands.add_parser("bench", allow_abbrev=False, help=says, description=f"{says[0].upper()}{says[1:]}.")
    parser.set_defaults(run=_bench)
    add = parser.add_argument
    add("--mode", choices=("quick", "standard", "full"), help="how much (default: standard, minutes on two cores)")
    add("--only", nargs="+", choices=_BENCHMARKS, metavar="GROUP", help=f"some of {', '.join(_BENCHMARKS)}")
    add("--report", nargs="+", type=Path, metavar="RESULT.json", help="draw results of before instead of measuring")
    add("--output", type=_folder, help="folder of benchmarks.md and images/ (default: the repository's docs/)")


def _bench(args):
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "conftest.py").is_file():
        raise ValueError("the benchmarks are not part of an installed package; run this from a clone of the repository")
    if args.report and (args.mode or args.only):
        raise ValueError("--mode and --only say what to measure, but --report draws what was measured before")
    _check_can_bench(("matplotlib",) if args.report else ("matplotlib", "pytest", "pytest_benchmark"))
    from lfm_fast.checkpoint import check_output

    output = (args.output or root / "docs").absolute()
    check_output(output)
    status, results = (0, args.report) if args.report else _measured(args, root)
    command = ["-m", "benchmarks.report", *(str(path.absolute()) for path in results), "--output", str(output)]
    return _python(command, root) or status


def _check_can_bench(packages):
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"bench needs {', '.join(missing)}; pip install 'lfm_fast[test]' brings what it needs")


def _measured(args, root):
    """Run the suite; (exit status, [result file])."""
    import os
    import time

    mode = args.mode or "standard"
    words = [time.strftime("%Y-%m-%d"), "cpu", str(os.cpu_count()), "cores", *(args.only or []), mode]
    result = root / "benchmarks" / "results" / f"{'-'.join(words)}.json"
    groups = [word for group in args.only or [] for word in ("--group", group)]
    command = ["-m", "pytest", "benchmarks/", "--benchmark-only", f"--benchmark-json={result}", *groups]
    status = _python(command, root, LFM_FAST_BENCH=mode)
    if not result.is_file() or not result.stat().st_size:
        raise RuntimeError("the benchmarks did not end; what they said stands above")
    print(f"wrote {result}")
    return status, [result]


def _python(command, root, **environment):
    import os
    import subprocess

    return subprocess.run([sys.executable, *command], cwd=root, env={**os.environ, **environment}).returncode


def _add_info(commands):
    says = "say what is installed and which kernels run"
    parser = commands.add_parser("info", help=says, description=f"{says[0].upper()}{says[1:]}.")
    parser.set_defaults(run=_info)


def _info(args):
    import platform

    import torch

    from lfm_fast import _library, ops
    from lfm_fast.ops._registry import rows

    reason = _library.load()
    print(_version())
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    print(f"compiled CPU kernels: {'loaded' if reason is None else reason}")
    chosen = {name: ops.explain(name).backend for name in rows()}
    for backend in sorted(set(chosen.values())):
        print(f"  {backend} runs {', '.join(name for name in chosen if chosen[name] == backend)}")
    print(f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no device'}")


if __name__ == "__main__":
    sys.exit(main())

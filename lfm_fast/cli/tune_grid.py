"""`lfm-fast tune-grid`: the times of a few solver steps, fitted to a model."""

from pathlib import Path

from lfm_fast.cli.arguments import device_named


def add(commands):
    short = "fit the times of a few solver steps to a model"
    says = "Fit the times of N solver steps to a model, for `lfm-fast sample --time-grid FILE` and `time_grid=`."
    parser = commands.add_parser("tune-grid", help=short, description=says)
    parser.set_defaults(run=run)
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


def run(args):
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
    flow = LatentFlow.from_pretrained(args.model, device=device_named(args.device))
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

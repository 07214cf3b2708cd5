"""`lfm-fast convert`: models of ours and of other projects, into ours and theirs."""

from pathlib import Path

from lfm_fast.cli.arguments import folder

_FROM = ("lfm", "sit", "dit", "diffusers")
_USAGE = "%(prog)s --model MODEL --output PLACE [--FLAG VALUE ...]"
_TO = ("lfm_fast", "lfm", "diffusers")


def add(commands):
    short = "write a model (a run, a checkpoint, another project's) in another format"
    says = (
        "Write a model as one folder in diffusers' layout (model_index.json, transformer/ or unet/, vae/), as a file "
        "that LFM loads, or with diffusers' own class of network. What other projects' networks lose or gain is said."
    )
    parser = commands.add_parser("convert", usage=_USAGE, help=short, description=says)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--model", required=True, help="a training run's folder, a checkpoint file, a saved folder or one of LFM's")
    add("--from", dest="project", choices=_FROM, help="whose weights these are; default: ours or LFM's")
    add("--to", default="lfm_fast", choices=_TO, help="the format to write (default: %(default)s)")
    add("--autoencoder", help="'embedded', a folder or a hub name; default: the one recorded with the model")
    add("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"), help="of the network's weights on disk")
    add("--weights", default="ema", choices=("ema", "model"), help="of files that hold both (default: %(default)s)")
    add("--num-classes", type=int, help="of another project's label table, where its rows leave that open")
    add("--num-heads", type=int, help="of another project's network, where its width leaves that open")
    add("--network", metavar="NAME", help="of create_model, where the weights alone do not tell which network it is")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of --network, such as num_heads=8 channel_mult=[1,2]",
    )
    add("--epoch", type=int, default=0, help="in the name that --to lfm writes, model_EPOCH.pth (default: %(default)s)")
    add("--output", type=folder, required=True, help="folder, or a .pth file of LFM's; what is there is replaced")


def run(args):
    import torch

    from lfm_fast.checkpoint import check_output

    is_file = args.to == "lfm" and args.output.suffix == ".pth"
    check_output(args.output.parent if is_file else args.output)
    if args.to == "lfm" and args.dtype != "fp32":
        raise ValueError(f"--dtype {args.dtype} is not for --to lfm, whose files are in float32; leave --dtype out")
    _refuse_idle(args)
    if args.to == "lfm":
        written = _to_lfm(args)
    else:
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
        _flow(args).save_pretrained(args.output, dtype=dtype, as_diffusers=args.to == "diffusers")
        written = args.output
    print(f"wrote {written}")


def _refuse_idle(args):
    """Raise ValueError for a flag that would be without effect."""
    of_theirs = {"--num-classes": args.num_classes, "--num-heads": args.num_heads}
    if args.set and args.network is None:
        raise ValueError("--set is for the arguments of --network; give that too")
    if args.network and args.project is not None:
        raise ValueError("--network is for weights of ours and LFM's own; leave --from or --network out")
    idle = [flag for flag, value in of_theirs.items() if value is not None] if args.project is None else []
    idle += ["--weights"] if args.weights != "ema" and args.project in (None, "diffusers") else []
    if idle:
        raise ValueError(f"{idle[0]} is for other projects' files; give --from too, or leave it out")
    if args.epoch and args.to != "lfm":
        raise ValueError("--epoch is for --to lfm; leave it out")


def _flow(args):
    from lfm_fast.autoencoder import DEFAULT_HUB_NAME, load_autoencoder
    from lfm_fast.flow.paths import Linear
    from lfm_fast.pipeline import LatentFlow

    if args.project is None:
        return LatentFlow.from_pretrained(args.model, args.autoencoder, model=_network(args))
    field = _converted(args)
    beside = Path(args.model).expanduser() / "vae"
    autoencoder = load_autoencoder(args.autoencoder or (beside if beside.is_dir() else DEFAULT_HUB_NAME))
    return LatentFlow(field, autoencoder, path=getattr(field, "path", None) or Linear())


def _to_lfm(args):
    from lfm_fast.flow.paths import Linear
    from lfm_fast.interop.released import save_released
    from lfm_fast.pipeline.folders import read_network_of

    if args.project is None:
        model, path = read_network_of(args.model, _network(args))
        if not isinstance(path, Linear):
            raise ValueError(f"LFM's networks are trained on the straight path, and this one on {path}")
    else:
        model = _converted(args)
    return save_released(model, args.output, args.epoch)


def _network(args):
    """The network that --network and --set name, or None."""
    import json

    from lfm_fast.models import create_model

    if args.network is None:
        return None
    arguments = {}
    for word in args.set:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise ValueError(f"--set {word} is not NAME=VALUE")
        if name in arguments:
            raise ValueError(f"--set gives {name} twice")
        try:
            arguments[name] = json.loads(value)
        except ValueError:  # a word
            arguments[name] = value
    return create_model(args.network, **arguments)


def _converted(args):
    """The velocity field of another project's weights; says what became of it on the way."""
    from lfm_fast.interop.files import convert

    names = ("project", "weights", "num_classes", "num_heads")
    found = convert(args.model, **{name: getattr(args, name) for name in names})
    for note in found.notes:
        print(f"note: {note}")
    return found.field

"""`lfm-fast encode`: images to a latent cache."""

import signal
import sys
from pathlib import Path

from lfm_fast._terminal import one_of
from lfm_fast.cli.arguments import device_named, folder, not_empty

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add(commands):
    from lfm_fast.autoencoder import DEFAULT_HUB_NAME
    from lfm_fast.data.decoders import DECODERS
    from lfm_fast.data.encoding import STORES
    from lfm_fast.data.opening import LAYOUTS, SPLITS
    from lfm_fast.data.stored import CHECKS

    says = (
        "Encode images once into a folder of latents, which `lfm-fast train --data` takes. Begun again, it goes on. "
        "Started by torchrun (`torchrun --nproc-per-node N -m lfm_fast.cli encode ...`), every rank encodes its share."
    )
    parser = commands.add_parser(
        "encode",
        usage="%(prog)s --data DATA --output FOLDER [--FLAG VALUE ...]",
        help="encode images into a latent cache, to train from",
        description=says,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    says = "'embedded', images (folder, LMDB, tars, a list, ...) or another tool's latents"
    add("--data", type=not_empty, required=True, help=says)
    says = one_of(LAYOUTS, "how they lie there (default: what it looks like)")
    add("--from", dest="layout", choices=LAYOUTS, **says)
    add(
        "--split",
        choices=SPLITS,
        default="train",
        help="of data that has several (default: %(default)s)",
    )
    add("--compat", choices=("lfm",), help="lfm: the first 120,000 images of LSUN, as the reference takes them")
    add("--image-size", type=int, default=256, help="side in pixels (default: %(default)s)")
    add("--autoencoder", default=DEFAULT_HUB_NAME, help="'embedded', a folder or a hub name (default: %(default)s)")
    add("--precision", choices=("fp32", "tf32", "bf16", "fp16"), help="of the autoencoder (default: as it comes)")
    add("--flip", action="store_true", help="store mirrored latents too")
    add(
        "--store",
        choices=STORES,
        default="posterior",
        help="mean and log-variance, the mode alone, or one sample drawn once (default: %(default)s)",
    )
    add(
        "--check-images",
        choices=CHECKS,
        default="decode",
        help="of files, once: decode them whole, or read their headers alone (default: %(default)s)",
    )
    add("--decoder", choices=DECODERS, default="auto", help="of image files; auto is the faster (default: %(default)s)")
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="of the stored numbers (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draws of --store samples (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="images per forward (default: %(default)s)")
    add("--shard-size", type=int, default=4096, help="images per file (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--output", type=folder, required=True, help="folder of the cache")


def run(args):
    """Encode; a SIGTERM, as torchrun sends one to the other ranks when one has died, leaves whole shards alone."""
    from lfm_fast import distributed

    before = signal.signal(signal.SIGTERM, _stop)
    world = None
    try:
        world = distributed.start(args.device if args.device in ("cpu", "cuda") else "auto")
        return _encode(args, world)
    except (KeyboardInterrupt, _Stopped) as stop:
        whose = f"rank {world.rank}: " if world and world.size > 1 else ""
        print(f"lfm-fast encode: {whose}stopped; begin again and it goes on where it was", file=sys.stderr)
        return 143 if isinstance(stop, _Stopped) else 130
    finally:
        signal.signal(signal.SIGTERM, before)
        if world is not None:
            world.close()


def _encode(args, world):
    import torch

    from lfm_fast.autoencoder import load_autoencoder
    from lfm_fast.checkpoint import check_output
    from lfm_fast.data import open_images
    from lfm_fast.data.encoding import copy_latents, encode_images
    from lfm_fast.data.foreign_latents import latent_layout, open_latents
    from lfm_fast.train.source import latent_format

    device = world.device if world.size > 1 else device_named(args.device)
    dtype = getattr(torch, DTYPES[args.dtype])
    check_output(args.output)
    _require_another_place(args)
    latent_format(args.autoencoder)  # its complaints before all images are read, and theirs before a download
    if args.layout is None and latent_layout(args.data) is not None:
        _refuse_for_latents(args)
        autoencoder = load_autoencoder(args.autoencoder, device=device)
        latents = open_latents(args.data, autoencoder=autoencoder, image_size=args.image_size)
        cache = copy_latents(latents, args.output, dtype=dtype, shard_size=args.shard_size, world=world)
        what = f"{cache.num_items} latents"
    else:
        _require_lsun(args)
        images = {"layout": args.layout or "auto", "split": args.split, "compat": args.compat, "flip": args.flip}
        images |= {"check": args.check_images, "decoder": args.decoder, "device": device}
        source = world.main_first(lambda: open_images(args.data, args.image_size, **images))
        autoencoder = load_autoencoder(args.autoencoder, device=device, precision=args.precision)
        settings = {"store": args.store, "dtype": dtype, "seed": args.seed, "flip": args.flip}
        settings |= {"batch_size": args.batch_size, "shard_size": args.shard_size}
        encode_images(source, autoencoder, args.output, world=world, **settings)
        if world.is_main and source.report.skipped:
            print(source.report.summary())
        what = f"the latents of {len(source)} images"
    if world.is_main:
        print(f"wrote {what} to {args.output}")


def _refuse_for_latents(args):
    """Latents are copied with the mirror images that they have: what is said of encoding would go unheard."""
    said = {"--flip": args.flip, "--precision": args.precision, "--store": args.store != "posterior"}
    said |= {"--split": args.split != "train", "--compat": args.compat, "--decoder": args.decoder != "auto"}
    for flag in (name for name, value in said.items() if value):
        raise ValueError(f"{flag} is of encoding images, but {args.data} holds latents, which are copied; leave it out")


def _require_another_place(args):
    if args.data != "embedded" and args.output.expanduser().resolve() == Path(args.data).expanduser().resolve():
        raise ValueError(f"--output {args.output} is where --data lies; choose another folder")


def _require_lsun(args):
    from lfm_fast.data.opening import layout_of

    layout = args.layout or layout_of(args.data)
    if args.compat is not None and layout != "lsun":
        raise ValueError(f"--compat is for LSUN, and {args.data} is read as {layout}; leave it out, or give --from")


class _Stopped(BaseException):
    """SIGTERM has come."""


def _stop(*_):
    raise _Stopped

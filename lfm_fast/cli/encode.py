"""`lfm-fast encode`: images to a latent cache."""

from lfm_fast.cli.arguments import device_named, folder


def add(commands):
    from lfm_fast.autoencoder import DEFAULT_HUB_NAME

    says = "Encode images once into a folder of latents, which `lfm-fast train --data` takes. Begun again, it goes on."
    parser = commands.add_parser(
        "encode", allow_abbrev=False, help="encode images into a latent cache, to train from", description=says
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--data", required=True, help="'embedded', or images: a folder (class = sub-folder), LMDB, tars, a list, ...")
    add("--from", dest="layout", metavar="LAYOUT", help="how they lie there (default: what it looks like)")
    add("--image-size", type=int, default=256, help="side in pixels (default: %(default)s)")
    add("--autoencoder", default=DEFAULT_HUB_NAME, help="'embedded', a folder or a hub name (default: %(default)s)")
    add("--flip", action="store_true", help="store mirrored latents too")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--output", type=folder, required=True, help="folder of the cache")


def run(args):
    from lfm_fast.autoencoder import load_autoencoder
    from lfm_fast.checkpoint import check_output
    from lfm_fast.data import open_images
    from lfm_fast.data.latents import encode_images
    from lfm_fast.train.source import latent_format

    device = device_named(args.device)
    check_output(args.output)
    latent_format(args.autoencoder)  # its complaints before all images are read, and theirs before a download
    source = open_images(args.data, args.image_size, layout=args.layout or "auto", flip=args.flip)
    autoencoder = load_autoencoder(args.autoencoder, device=device)
    encode_images(source, autoencoder, args.output, flip=args.flip)
    if source.report.skipped:
        print(source.report.summary())
    print(f"wrote the latents of {len(source)} images to {args.output}")

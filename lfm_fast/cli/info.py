"""`lfm-fast info`: what is installed and which kernels run, or what lies in a folder of latents."""

from lfm_fast import __version__
from lfm_fast.cli.arguments import not_empty

_USAGE = "%(prog)s [FOLDER] [--verify]"


def add(commands):
    says = "say what is installed and which kernels run, or what lies in a folder of latents"
    parser = commands.add_parser("info", usage=_USAGE, help=says, description=f"{says[0].upper()}{says[1:]}.")
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=not_empty, nargs="?", help="folder of latents (default: what is installed)")
    parser.add_argument("--verify", action="store_true", help="compare the checksum of every shard, whatever is noted")


def run(args):
    if args.folder is not None:
        return _latents(args.folder, args.verify or None)
    return _installed()


def _latents(folder, verify):
    from lfm_fast.data.foreign_latents import OURS, latent_layout, open_latents

    layout = latent_layout(folder)
    # another tool's are in a unit that they do not say: shown as they lie there
    cache = open_latents(folder, scaling=None if layout in (OURS, None) else 1.0, verify=verify)
    made, mirrored = cache.provenance, " and their mirror images" if cache.has_flip else ""
    print(f"{cache.num_items} images{mirrored} in {len(cache.class_names)} classes, latents {cache.latent_shape}")
    print(f"layout: {layout}, {made['store']} in {str(cache.dtype).removeprefix('torch.')}")
    if made.get("fingerprint"):
        print(f"autoencoder: {made['autoencoder']}, fingerprint {made['fingerprint']}")
        decoded = f", decoder {made['decoder']}" if "decoder" in made else ""
        print(f"images: {made['source']}, {made['image_size']} pixels, list {made['images_digest']}{decoded}")
    for name, values in (("mean", cache.mean), ("standard deviation", cache.std)):
        print(f"{name}: {', '.join(f'{value:.4g}' for value in values.tolist())}")
    if cache.variance_note() and layout == OURS:
        print(cache.variance_note())


def _installed():
    import platform

    import torch

    from lfm_fast import _library, ops
    from lfm_fast.ops._registry import rows

    reason = _library.load()
    print(f"lfm_fast {__version__}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    print(f"compiled CPU kernels: {'loaded' if reason is None else reason}")
    chosen = {name: ops.explain(name).backend for name in rows()}
    for backend in sorted(set(chosen.values())):
        print(f"  {backend} runs {', '.join(name for name in chosen if chosen[name] == backend)}")
    print(f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no device'}")

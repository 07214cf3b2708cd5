"""`lfm-fast info`: what is installed and which kernels run."""

from lfm_fast import __version__


def add(commands):
    says = "say what is installed and which kernels run"
    parser = commands.add_parser("info", help=says, description=f"{says[0].upper()}{says[1:]}.")
    parser.set_defaults(run=run)


def run(args):
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

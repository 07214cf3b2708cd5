"""The command line, `lfm-fast`: a file for each sub-command, each a few lines over the library."""

import sys

from lfm_fast import __version__
from lfm_fast._terminal import Parser, start
from lfm_fast.cli import bench, convert, encode, evaluate, info, sample, tune_grid

# modules with add(commands), which makes the sub-command's parser and sets `run`, a function of its arguments that
# returns the exit status or None; in the order of the help
COMMANDS = (sample, evaluate, tune_grid, encode, convert, bench, info)

_DESCRIPTION = "Latent flow matching, fast. lfm-fast COMMAND --help says what a command takes."


def main(argv=None):
    """Run one sub-command; returns the exit status. The user's mistakes end in one sentence and status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = " ".join(["lfm-fast", *arguments[:1]])
    return start(command, lambda: _run(command, arguments))


def _run(command, arguments):
    try:
        if arguments[:1] == ["train"]:  # it has a parser of its own, the one of train_fast.py
            return _train(arguments[1:])
        if not arguments:
            _parser().print_help()
            return 2
        args = _parser().parse_args(arguments)
        return args.run(args) or 0
    except BrokenPipeError:  # nobody reads any more
        raise
    except (ValueError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a solver that cannot go on, a device that runs out of memory
        print(f"{command}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1


def _parser():
    parser = Parser(prog="lfm-fast", usage="%(prog)s COMMAND [--FLAG VALUE ...]", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"lfm_fast {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands", prog="lfm-fast"
    )
    commands.add_parser("train", help="train a flow (the same flags as train_fast.py)", add_help=False)
    for command in COMMANDS:
        command.add(commands)
    return parser


def _train(arguments):
    from lfm_fast.train.config import parse_args
    from lfm_fast.train.loop import main as train

    return train(parse_args(arguments, prog="lfm-fast train"))

"""Train a latent flow: `torchrun train_fast.py`, or `python train_fast.py` for one process; see `--help`."""

import sys


def main():
    """Parse the command line and train; returns the exit status."""
    try:
        from lfm_fast._terminal import plain_warnings

        with plain_warnings("train_fast.py"):  # importing the rest may warn, too
            from lfm_fast.train.config import parse_args
            from lfm_fast.train.loop import main as train

            return train(parse_args())
    except KeyboardInterrupt:  # while modules are imported, which takes seconds
        print("error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

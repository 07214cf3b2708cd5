"""Train a latent flow: `torchrun train_fast.py`, or `python train_fast.py` for one process; see `--help`."""

import sys


def main():
    """Parse the command line and train; returns the exit status."""
    from lfm_fast._terminal import start

    return start("train_fast.py", _train)


def _train():
    from lfm_fast.train.config import parse_args
    from lfm_fast.train.loop import main as train

    return train(parse_args())


if __name__ == "__main__":
    sys.exit(main())

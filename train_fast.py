"""Train a latent flow: `torchrun train_fast.py`, or `python train_fast.py` for one process; see `--help`."""

import sys

from lfm_fast.train.config import parse_args
from lfm_fast.train.loop import main

if __name__ == "__main__":
    sys.exit(main(parse_args()))

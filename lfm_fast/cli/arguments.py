"""What the arguments of several commands mean."""

import argparse
from pathlib import Path


def device_named(name):
    """The device asked for, or the best there is. Raises ValueError for one that this machine does not have."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not (number or "0").isdecimal() or int(number or 0) >= count:
        raise ValueError(f"--device {name} is not here; there is cpu" + (", cuda" if torch.cuda.is_available() else ""))
    return name


def not_empty(text):
    """The name of something to read."""
    if not text:  # it would be the current folder
        raise argparse.ArgumentTypeError("it is empty; give a name or a path")
    return text


def folder(text):
    """A folder to write to."""
    if not text:  # it would be the current folder
        raise argparse.ArgumentTypeError("it is empty; give a folder")
    return Path(text).expanduser()

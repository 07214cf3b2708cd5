"""torch.compile for training: when it pays, and whether this machine can."""

import os
import shutil
import sysconfig
from pathlib import Path

SHORTEST_COMPILED = 300  # steps of a CPU run for which --compile auto compiles


def compile_network(model, config, device):
    """In place, so that the names of the weights stay. Blocks compile in seconds, the whole network in a minute."""
    mode = config.compile
    if mode == "auto":
        worth_it = device.type == "cuda" or (_long_enough(config) and can_compile_for_cpu())
        mode = "block" if worth_it else "off"
    if mode != "off":
        model.compile({"full": "velocity", "block": "block"}[mode])


def _long_enough(config):
    """Compiling a small network's block takes about 15 s on two CPU cores and then saves two fifths of every step."""
    return config.steps is None or config.steps >= SHORTEST_COMPILED


def can_compile_for_cpu():
    """Inductor's CPU code needs a C++ compiler and Python's headers; without them the first step would fail."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return compiler is not None and shutil.which(compiler) is not None and headers.is_file()

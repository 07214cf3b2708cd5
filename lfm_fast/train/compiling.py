"""torch.compile for training: when it pays, and whether this machine can."""

import os
import shutil
import sysconfig
from pathlib import Path

from lfm_fast import _library
from lfm_fast.models.velocity_network import VelocityNetwork

SHORTEST_COMPILED = 300  # steps of a CPU run for which --compile auto compiles


def compile_network(model, config, device):
    """In place, so that the names of the weights stay. Blocks compile in seconds, the whole network in a minute."""
    mode = config.compile
    if mode == "auto":
        mode = "block" if device.type == "cuda" or _pays_on_a_cpu(config) else "off"
    if mode == "full":
        model.compile()
    elif mode == "block" and isinstance(model, VelocityNetwork):
        model.compile("block")
    elif mode == "block":
        for block in model.blocks:
            block.compile()


def _pays_on_a_cpu(config):
    """Not beside our compiled kernels: Inductor's code around them made 0.96 to 1.01 of a step's time (medians, float32
    and bfloat16, 16 and 256 tokens). Without them it was 0.88, after about 15 s of compiling on two cores."""
    long_enough = config.steps is None or config.steps >= SHORTEST_COMPILED
    return _library.load() is not None and long_enough and can_compile_for_cpu()


def can_compile_for_cpu():
    """Inductor's CPU code needs a C++ compiler and Python's headers; without them the first step would fail."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return compiler is not None and shutil.which(compiler) is not None and headers.is_file()

"""A training problem of seconds: a small network on latents in memory. Imported by tests, and run by them."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import torch

from lfm_fast.models import NETWORKS, DiT
from lfm_fast.train import loop
from lfm_fast.train.config import parse_args

NETWORKS["DiT-Tiny"] = (DiT, {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2})

SETTINGS = {
    "data": "tiny",
    "model": "DiT-Tiny",
    "batch_size": 8,
    "steps": 12,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "log_every": 1,
    "checkpoint_every": 4,
    "sample_every": 0,
    "seed": 3,
    "device": "cpu",
    "compile": "off",
}


def flags(**settings):
    """SETTINGS with `settings` over them, as command-line flags."""
    merged = {**SETTINGS, **settings}
    return [part for name, value in merged.items() for part in (f"--{name.replace('_', '-')}", str(value))]


class TinySource:
    """20 latents (4, 8, 8) in 3 classes: a pattern of each class and a little of each item's own."""

    num_items, num_classes, latent_shape = 20, 3, (4, 8, 8)
    class_names = ["a", "b", "c"]

    def __init__(self, delay=0.0):
        self.delay = delay  # seconds a batch takes, for tests that need a slow run
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(3, 4, 8, 8, generator=generator)
        self.labels = torch.arange(20) % 3
        self.latents = patterns[self.labels] + 0.1 * torch.randn(20, 4, 8, 8, generator=generator)
        self.asked = []

    def batch(self, sample_numbers, seed):
        self.asked.append(sample_numbers.clone())
        time.sleep(self.delay)
        items = sample_numbers * 7 % self.num_items
        return self.latents[items], self.labels[items]


class TinyAutoencoder:
    """Pictures at twice the latent's side: the first three channels, each value four times."""

    downsampling, latent_channels = 2, 4

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).clamp(-1, 1)


class Run:
    """`tiny_run.py FLAGS` as a process forked from a server that has imported everything: starts at once.

    `environment` is added to the process's; `largest_file` is a limit in bytes, as a full disk would set one.
    """

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["tiny_run", "torch._dynamo"])  # an optimizer imports the latter, in seconds

    def __init__(self, flags, output, environment=None, largest_file=None):
        self.output = output
        here = Path(__file__).parent
        os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent.parent)])  # for the server's imports
        arguments = (list(flags), str(output), environment or {}, largest_file)
        self.process = self._context.Process(target=_in_child, args=arguments, daemon=True)
        self.process.start()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def wait_for(self, text, seconds=60):
        """Wait until the output holds `text`."""
        end = time.monotonic() + seconds
        while text not in self.text():
            assert time.monotonic() < end, self.text()
            assert self.process.is_alive(), self.text()
            time.sleep(0.005)

    def status(self):
        """Exit status, after the end; minus the signal's number if one ended it."""
        self.process.join(120)
        assert not self.process.is_alive(), self.text()
        return self.process.exitcode

    def text(self):
        return self.output.read_text() if self.output.exists() else ""


def _in_child(flags, output, environment, largest_file):
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if largest_file is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    run(flags)


def two_ranks(flags, folder, environment=None, meanwhile=None):
    """Both processes of a world of two gloo ranks, and their exit statuses; `meanwhile(runs)` is called in between."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= environment or {}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    runs = [Run(flags, folder / f"rank{k}.txt", {**shared, **rank}) for k, rank in enumerate(ranks)]
    if meanwhile is not None:
        meanwhile(runs)
    return runs, [run.status() for run in runs]


def run(flags=None):
    """Train by the flags and leave with the status of the command line. Compiles, if it is to, for TINY_BACKEND."""
    train, compile_dit = loop.train, DiT.compile
    if "TINY_BACKEND" in os.environ:
        DiT.compile = lambda model, *part: compile_dit(model, *part, backend=os.environ["TINY_BACKEND"])
    delay = float(os.environ.get("TINY_DELAY", "0"))
    source = TinySource(delay)
    source.num_items -= os.environ.get("TINY_FEWER") == os.environ.get("RANK", "0")  # as a rank that sees other data
    loop.train = lambda config: train(config, source, TinyAutoencoder())
    sys.exit(loop.main(parse_args(flags)))


if __name__ == "__main__":
    run()

"""The workloads by kind: what a specification (kind, arguments) builds, in this process or in another."""

from benchmarks.archives import ReadingArchives
from benchmarks.autoencoders import Autoencoding
from benchmarks.decoding import Decoding
from benchmarks.feeding import CacheFeeding, FolderFeeding
from benchmarks.latents import ResidentFeeding
from benchmarks.networks import Forward, GuidedSampling
from benchmarks.optimizer import OptimizerStep
from benchmarks.solving import AtEqualError, Overhead, Solving
from benchmarks.starting import Importing, Starting
from benchmarks.training import TrainingStep
from benchmarks.unets import UNetForward
from benchmarks.workloads import ForwardBackward, OpWorkload, Workload

KINDS = {
    "op": OpWorkload,
    "op and gradient": ForwardBackward,
    "optimizer": OptimizerStep,
    "forward": Forward,
    "u-net": UNetForward,
    "training": TrainingStep,
    "sampling": GuidedSampling,
    "solver": Solving,
    "at equal error": AtEqualError,
    "overhead": Overhead,
    "cached latents": CacheFeeding,
    "image folder": FolderFeeding,
    "resident latents": ResidentFeeding,
    "autoencoder": Autoencoding,
    "decoding": Decoding,
    "archives": ReadingArchives,
    "start": Starting,
    "import": Importing,
}


def build(specification: tuple[str, dict]) -> Workload:
    kind, arguments = specification
    return KINDS[kind](**arguments)

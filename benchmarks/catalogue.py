"""The workloads by kind: what a specification (kind, arguments) builds, in this process or in another."""

from benchmarks.networks import Forward, GuidedSampling, TrainingStep
from benchmarks.solving import Solving
from benchmarks.workloads import OpWorkload, Workload

KINDS = {"op": OpWorkload, "forward": Forward, "training": TrainingStep, "sampling": GuidedSampling, "solver": Solving}


def build(specification: tuple[str, dict]) -> Workload:
    kind, arguments = specification
    return KINDS[kind](**arguments)

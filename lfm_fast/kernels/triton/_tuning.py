"""Launching a Triton kernel with the fastest of its configurations, or, in the interpreter, with a named one.

`triton.autotune` needs a GPU's driver when it is defined over several configurations and would time kernels inside a
CUDA graph capture, so this does its work: the configurations are data that the tests can go through one by one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

_NUMBER: ContextVar[int | None] = ContextVar("lfm_fast_triton_configuration", default=None)
_COMPILED: ContextVar[list | None] = ContextVar("lfm_fast_triton_compiled", default=None)


@dataclass(frozen=True)
class Configuration:
    """Constants are the kernel's `tl.constexpr` arguments that only decide how its work is cut.

    A configuration must not change a bit of the result, or two runs whose timings differ would differ: what decides the
    order of a sum (its block, num_warps) is the same in all configurations of a kernel.
    """

    constants: dict = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


class Tuned:
    """A `triton.jit` kernel and the configurations it may run with, the default first.

    The kernel must only write to its outputs and never read them: tuning runs it many times. `options` are compiler
    options; unless they say otherwise `enable_fp_fusion` is False: a * b + c rounds twice, as in every other backend.
    """

    def __init__(self, kernel, *configurations: Configuration, **options):
        self.kernel = kernel
        self.configurations = configurations or (Configuration(),)
        self.options = {"enable_fp_fusion": False, **options}
        self._best: dict = {}

    def __call__(self, programs: Callable[[dict], int], key: tuple, *args, **constants) -> None:
        """Launch on the first tensor's device; nothing where there are no programs to run.

        programs: how many, from a configuration's constants. key: what the fastest configuration depends on besides the
        kernel and the device, sizes as `bucket`. constants: `tl.constexpr` arguments, and num_warps where the sizes
        decide it.
        """
        if programs(self.configurations[0].constants) == 0:
            return
        device = next(a.device for a in args if isinstance(a, Tensor))

        def run(chosen: Configuration) -> None:
            self._run(chosen, (programs(chosen.constants),), args, constants)

        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            run(self._choose(run, device, key))

    def _run(self, chosen: Configuration, grid: tuple, args: tuple, constants: dict) -> None:
        settings = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, **self.options, **constants}
        compiled = _COMPILED.get()
        if compiled is None:
            self.kernel[grid](*args, **chosen.constants, **settings)
        else:
            compiled.append(self.kernel.warmup(*args, **chosen.constants, **settings, grid=grid))

    def _choose(self, run: Callable, device: torch.device, key: tuple) -> Configuration:
        number = _NUMBER.get()
        if number is not None:
            return self.configurations[number % len(self.configurations)]
        if device.type == "cpu":  # the interpreter, whose time goes by programs and not by elements
            return max(self.configurations, key=lambda c: sum(c.constants.values()))
        if len(self.configurations) == 1:
            return self.configurations[0]
        key = (device.index, *key)
        if key not in self._best:
            if torch.cuda.is_current_stream_capturing():
                return self.configurations[0]  # timing would synchronise, which breaks a capture; the next call tunes
            self._best[key] = min(self.configurations, key=lambda c: _seconds(run, c))
        return self._best[key]


def _seconds(run: Callable, chosen: Configuration) -> float:
    try:
        return triton.testing.do_bench(lambda: run(chosen), warmup=5, rep=25, return_mode="median")
    except (triton.OutOfResources, triton.runtime.errors.PTXASError):  # this GPU has too little for it
        return float("inf")


def bucket(size: int) -> int:
    """Sizes up to the same power of two share a tuning."""
    return max(size - 1, 0).bit_length()


@contextmanager
def use_configuration(number: int) -> Iterator[None]:
    """Within this context every kernel runs with its configuration of this number, modulo how many it has."""
    token = _NUMBER.set(number)
    try:
        yield
    finally:
        _NUMBER.reset(token)


@contextmanager
def compile_only() -> Iterator[list]:
    """Within this context kernels are compiled for the arguments they come with, not run; gives the list of them."""
    token = _COMPILED.set([])
    try:
        yield _COMPILED.get()
    finally:
        _COMPILED.reset(token)

"""Who is timed on a GPU: ways to run a network, each of which is built in a process of its own.

The library's kernels for GPUs are opt-in until a result shows them passing there. `rows` says which of them a way
takes:

    all        every kernel that does not refuse, as if it had been shown: what is to be measured
    shipped    what the table takes by itself today
    reference  none: each op step by step in PyTorch
    plain      the networks without the ops, on PyTorch's own fused kernels (`plain.py`)
"""

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu
from benchmarks.elsewhere import elsewhere
from benchmarks.plain import WITHOUT_OPS, forced
from lfm_fast import _graphs
from lfm_fast.models.registry import NETWORKS
from lfm_fast.ops import _registry

_LEFT_OUT = "this contender runs without it"
_SHORTEST, _LONGEST_REASON = 5.0, 200  # seconds a contender needs at the least; characters
_ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Way:
    """build: makes what is timed. package: what has to be installed. graph: whether it records CUDA graphs."""

    build: Callable
    precision: str = "bfloat16"
    rows: str = "plain"
    package: str | None = None
    graph: bool = False

    @property
    def largest_error(self) -> float:
        """Against float64; what is off by more is wrong."""
        return LARGEST_ERROR[self.precision]

    def why_not(self, device: torch.device) -> str | None:
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.precision in ("tf32", "fp8") and device.type != "cuda":
            return f"{self.precision} exists on CUDA alone"
        return _graphs.why_not(device) if self.graph else None


# roundings through a network and back: 2^-24, 2^-11, 2^-8 and 2^-4 each; a wrong kernel is off by 1e-1 and more, which
# in fp8 is not seen here, but in the loss curve (`gpu_training gate`)
LARGEST_ERROR = {"float32": 1e-5, "tf32": 5e-3, "bfloat16": 3e-2, "bf16-pure": 3e-2, "fp8": 0.3}


@contextmanager
def taking(rows: str) -> Iterator[None]:
    """Within: the ops run as `rows` says, in every thread; autograd's own does not see `ops.use_backend`."""
    before = {row: row.backends for row in _registry.rows().values()}
    reason = {"all": None, "reference": _LEFT_OUT, "plain": _LEFT_OUT}
    if rows in reason:
        for row, backends in before.items():
            row.backends = tuple(replace(backend, opt_in=reason[rows]) for backend in backends)
    try:
        with forced({"reference": "reference", "plain": WITHOUT_OPS}.get(rows)):
            yield
    finally:
        for row, backends in before.items():
            row.backends = backends


def in_turn(results: gpu.Results, ways: dict[str, Way], function: Callable, longest: float, title: str, told: dict):
    """Yields (name, function(name, told)) of each way, made in a process of its own; the results say why one fails.

    longest: seconds for one. In a smoke run all are in this process, and none is compiled for real.
    """
    told = {**told, "smoke": results.smoke}
    for name, way in ways.items():
        seconds, reason = min(longest, results.left()), way.why_not(results.device)
        if reason is None and seconds < _SHORTEST:
            reason = f"no time was left for it in {results.part}"
        if reason is None:
            try:
                found = function(name, told) if results.smoke else _alone(function, name, told, seconds)
            except Exception as error:  # whatever went wrong, the others are measured
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:_LONGEST_REASON]
        if reason is None:
            yield name, found
        else:
            results.not_run(f"{title}, {name}", reason)


def _alone(function: Callable, name: str, told: dict, seconds: float) -> dict:
    with elsewhere() as run:
        return run(function, name, told, seconds=seconds)


def host_times(call: Callable, device: torch.device, seconds: float, at_once: int, fewest: int = 5) -> list[float]:
    """Seconds of a call when one follows the other: what the host takes counts where the device waits for it.

    The host waits for the device every `at_once` calls.
    """
    found, began = [], None
    while began is None or len(found) < fewest or time.perf_counter() - began < seconds:
        gpu.wait(device)
        start = time.perf_counter()
        for _ in range(at_once):
            call()
        gpu.wait(device)
        if began is None:  # the first ones warm up
            began = time.perf_counter()
        else:
            found.append((time.perf_counter() - start) / at_once)
    return found


def compile_plain(model: torch.nn.Module, smoke: bool, mode: str) -> None:
    """torch.compile at its best, PyTorch's own and not what our DiT makes of it. A smoke run only traces."""
    options = {"backend": "eager"} if smoke else {"mode": mode}
    torch.nn.Module.compile(model, dynamic=False, fullgraph=True, **options)


def use_best_attention(network: str, batch_size: int, tokens: int, training: bool) -> str | None:
    """Leave PyTorch only the kernel of attention that is fastest for this network's bf16, for all of this process."""
    if gpu.device().type != "cuda":
        return None
    settings = NETWORKS[network][1]
    heads, width = settings["num_heads"], settings["hidden_size"] // settings["num_heads"]
    qkv = torch.randn(batch_size, tokens, 3, heads, width, device="cuda", dtype=torch.bfloat16, requires_grad=training)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    seconds = {}
    for name, backend in _ATTENTION.items():

        def call(backend=backend):
            with sdpa_kernel(backend):
                y = F.scaled_dot_product_attention(q, k, v)
            if training:
                torch.autograd.grad(y, qkv, torch.ones_like(y))

        with torch.set_grad_enabled(training):
            try:
                seconds[name] = gpu.median(gpu.timed({name: call}, torch.device("cuda"), 0.1)[name])
            except RuntimeError:
                seconds[name] = math.inf
    best = min(seconds, key=seconds.get)
    switches = {
        "flash": torch.backends.cuda.enable_flash_sdp,
        "cudnn": torch.backends.cuda.enable_cudnn_sdp,
        "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    }
    for (
        name,
        switch,
    ) in switches.items():  # the products stay, for float64: PyTorch takes them where nothing else serves
        switch(name == best)
    return best

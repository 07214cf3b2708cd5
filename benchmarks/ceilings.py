"""What this machine can do at best, measured: copying memory, and multiplying matrices."""

import functools
import os
import time
from pathlib import Path

import torch

from benchmarks.settings import QUICK

_FEWEST_TRIES, _SECONDS = (2, 0.0) if QUICK else (5, 0.5)
# the products of a DiT-S/2 block on four samples, and a square one: the ceiling is the best of them
_GEMM_SHAPES = ((1024, 384, 1536), (1024, 1536, 384), (2048, 2048, 2048))

LARGE = 2**20  # bytes of inputs from which a call is made to find them outside the cache

_best: dict = {}


def measured() -> dict:
    """{"copy_bytes_per_second", "gemm_flops_per_second": {dtype: ...}, "cache_bytes", "working_set_bytes"}.

    A ceiling is the BEST of all tries: what is measured against it may come close, and seldom passes it.
    """
    return _best or measure()


def measure() -> dict:
    """Measure now, and keep what is better than before: called at both ends of a run, since machines are shared."""
    gemm = _best.get("gemm_flops_per_second", {})
    _best["copy_bytes_per_second"] = max(_copy(), _best.get("copy_bytes_per_second", 0.0))
    _best["gemm_flops_per_second"] = {
        name: max(_gemm(getattr(torch, name)), gemm.get(name, 0.0)) for name in ("float32", "bfloat16")
    }
    _best["cache_bytes"], _best["working_set_bytes"] = cache_bytes(), working_set_bytes()
    return _best


@functools.cache
def cache_bytes() -> int:
    """Size of the largest cache, as Linux tells it (a virtual machine may be told all of its host's); else 64 MiB."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes) or 64 * 2**20


def working_set_bytes(device: str | torch.device = "cpu") -> int:
    """How many bytes of inputs to pass through so that no call finds its own in the cache: 1.25 times the cache, on a
    GPU 8 times, which does not throw out the oldest first.

    In quick mode, where no time counts, two sets of the smallest inputs that are held more than once.
    """
    if torch.device(device).type == "cuda":
        return 8 * torch.cuda.get_device_properties(device).L2_cache_size
    if QUICK:
        return 2 * LARGE
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(cache_bytes() * 5 // 4, memory // 8)


def _copy() -> float:
    """Bytes read and written per second by a copy of a tensor to another, both together larger than the cache."""
    source = torch.full((working_set_bytes() // 8,), 1.25)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _fastest(lambda: target.copy_(source))


def _gemm(dtype: torch.dtype) -> float:
    best = 0.0
    for rows, inner, columns in _GEMM_SHAPES:
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        seconds = _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        best = max(best, 2 * rows * inner * columns / seconds)
    return best


def _fastest(call) -> float:
    call()
    seconds, began = [], time.perf_counter()
    while len(seconds) < _FEWEST_TRIES or time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)

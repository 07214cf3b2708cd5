"""Attention on a GPU: every backend at every shape, and whether the table takes the best one."""

import functools
import itertools
import os
import tempfile
from contextlib import contextmanager

import torch

from benchmarks import gpu
from benchmarks.gpu import Results
from benchmarks.gpu_parts import attempt, until
from benchmarks.measure import spread
from benchmarks.workloads import relative_error
from lfm_fast.ops import _attention, _registry

HEADS = 16
BATCHES = (128, 512, 32, 8, 1)
WITHIN = 1.02  # of the best backend's time
BOUND = 550e12  # FLOP/s of attention over 256 tokens, about what the shape allows
FORWARD, BOTH = "forward", "forward and backward"
FLOPS = {FORWARD: 4, BOTH: 14}  # times T T d of a head: two products, and five more backward
LARGEST_ERROR = {torch.bfloat16: 3e-2, torch.float32: 2e-3}  # float32 may be multiplied as TF32, which rounds to 3e-4


@contextmanager
def measuring():
    """The row measures afresh, with the backends that are opt-in, and forgets it in the end."""
    with tempfile.TemporaryDirectory() as folder:
        before = {name: os.environ.get(name) for name in ("LFM_FAST_CACHE", "LFM_FAST_MEASURE")}
        os.environ.update(LFM_FAST_CACHE=folder, LFM_FAST_MEASURE="always")
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def arguments(shape: tuple, dtype: torch.dtype, direction: str, device) -> tuple:
    """Slices of a fused (B, T, 3, heads, d), as a network has them."""
    row = _registry.row("attention")
    q, k, v, scale = row.bind(**row.arguments(shape=shape, dtype=dtype, layout="fused", device=device.type))
    return *(x.requires_grad_(direction == BOTH) for x in (q, k, v)), scale


def backends(args: tuple) -> dict[str, str | None]:
    """{name: why it does not serve these}."""
    row, (q, k, _, _) = _registry.row("attention"), args
    found = {b.name: b.refusal(args, forced=True) for b in row.backends}
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > _attention._MOST_WEIGHTS:
        found["math"] = "its weights would take too much memory"
    return found


def run(name: str, args: tuple, gradient: torch.Tensor | None) -> list[torch.Tensor]:
    """The result, with a gradient those of q, k and v."""
    result = _registry.row("attention").kernels[name](*args)
    return [result] if gradient is None else list(torch.autograd.grad(result, args[:3], gradient))


def truth(args: tuple, gradient: torch.Tensor | None, few: int) -> list[torch.Tensor]:
    """Of the first samples, in float64."""
    q, k, v = (x.detach()[:few].double().requires_grad_(gradient is not None) for x in args[:3])
    result = _registry.row("attention").reference(q, k, v, args[3])
    return [result] if gradient is None else list(torch.autograd.grad(result, (q, k, v), gradient[:few].double()))


def compare(results: Results, shape: tuple, dtype: torch.dtype, direction: str) -> dict[str, float]:
    """Every backend in turns; a line says whether the table's choice is among the best. Returns FLOP/s by backend."""
    batch, heads, tokens, width = shape
    args = arguments(shape, dtype, direction, results.device)
    gradient = torch.randn_like(args[0]).contiguous() if direction == BOTH else None
    refused = backends(args)
    names, few = [name for name, why in refused.items() if why is None], min(batch, 2)
    exact = truth(args, gradient, few)
    errors = {}
    for name in list(names):
        try:
            errors[name] = relative_error([x[:few] for x in run(name, args, gradient)], exact)
        except Exception as error:  # its own check had let it pass
            names.remove(name)
            refused[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    title = f"{tokens} tokens, {heads} x {width}, batch {batch}, {direction}"
    if not names:
        results.not_run(title, "; ".join(f"{name}: {why}" for name, why in refused.items()))
        return {}
    calls = {name: functools.partial(run, name, args, gradient) for name in names}
    times = gpu.timed(calls, results.device, 0.005 if results.smoke else 0.25)
    medians = {name: gpu.median(each) for name, each in times.items()}
    chosen, best = _registry.row("attention").choose(args), min(medians, key=medians.get)
    work = FLOPS[direction] * batch * heads * tokens * tokens * width
    rates = {name: work / seconds for name, seconds in medians.items()}
    right = all(error <= LARGEST_ERROR[dtype] for error in errors.values())
    told = ", ".join(f"{name} {rates[name] / 1e12:.0f}" for name in sorted(rates, key=rates.get, reverse=True))
    facts = {"errors": errors, "not_run": {k: v for k, v in refused.items() if v}, "flops_per_second": rates}
    facts |= {"seconds": {name: spread(each) for name, each in times.items()}, "chosen": chosen}
    facts["xformers_kernels"] = xformers_kernels(args) if "xformers" in names else None
    results.add(
        title, medians[chosen] / medians[best] if chosen in medians else float("inf"), "x the best", WITHIN,
        at_most=True, right=right, note=f"takes {chosen}; TFLOP/s: {told}", **facts,
    )  # fmt: skip
    return rates


def xformers_kernels(args: tuple) -> list[str]:
    """Which of its kernels xformers takes: its own need a CUDA runtime that may not be there, then it is flash's."""
    try:
        fmha = _attention._import_xformers().fmha
        inputs = fmha.Inputs(*(x.transpose(1, 2) for x in args[:3]))
        kinds = (fmha.ALL_FW_OPS, fmha.ALL_BW_OPS) if args[0].requires_grad else (fmha.ALL_FW_OPS,)
        return [next(k.NAME for k in kind if not k.not_supported_reasons(inputs)) for kind in kinds]
    except Exception as error:  # another version's interface: no reason to stop
        return [f"unknown ({type(error).__name__})"]


def attention(results: Results) -> None:
    """256 and 1024 tokens, heads of 64 and 72, batch 1 to 512: every backend, the table's choice beside the best."""
    if results.smoke:
        work = [((2, 2, 16, 8), torch.float32, direction) for direction in (FORWARD, BOTH)]
    else:
        shapes = itertools.product((256, 1024), BATCHES, (72, 64), (BOTH, FORWARD))
        work = [((batch, HEADS, t, width), torch.bfloat16, how) for t, batch, width, how in shapes]
        work.append(((128, HEADS, 256, 72), torch.float32, FORWARD))
    best, told = {}, False
    with measuring():
        for shape, dtype, direction in until(results, work, reserve=10.0):
            rates = {}
            with attempt(results, f"{shape}, {direction}"):
                if not told:
                    told = True
                    say_who_is_missing(results, arguments(shape, dtype, direction, results.device))
                rates = compare(results, shape, dtype, direction)
            if rates and dtype == torch.bfloat16 and shape[2] == 256:
                key = (shape[3], direction)
                best[key] = max(best.get(key, 0.0), *rates.values())
            gpu.release(results.device)
    for (width, direction), rate in best.items():
        title = f"256 tokens, heads of {width}, {direction}, the best of all"
        wanted = BOUND * 2 / 3 / 1e12 if direction == FORWARD else None
        results.add(title, rate / 1e12, "TFLOP/s", wanted, note="below: an own kernel is worth its while")


def say_who_is_missing(results: Results, args: tuple) -> None:
    for name, why in backends(args).items():
        if why is not None and name not in ("cpp", "math"):
            results.not_run(name, why)
